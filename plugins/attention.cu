// Causal attention over a KV cache of our own layout, with head norms, rotary embedding and the cache's update inside.
//
// A decode step is one kernel: every block rotates the query (and the new key) itself, covers a span of the cache, and the
// last block of a head to finish puts the spans together. A prefill rotates and appends first, then attends, on tensor cores
// where type and head dimension allow.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <algorithm>
#include <type_traits>

#include "cqil_trt.h"
#include "errors.h"
#include "launch.cuh"
#include "types.cuh"

using namespace cqil_trt;

namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 16;  // that share one key
constexpr int kGroups = kThreads / kLanes;
constexpr int kMaxSpans = 64;
constexpr int kMinSpan = 64;
constexpr int kMaxHeadDim = 256;
constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ size_t cache_elements(const cqil_attention_shape& s) {
    return size_t(s.max_batch) * s.kv_heads * s.capacity * s.head_dim;
}

int span_length(const cqil_attention_shape& s) {
    const int even = (s.capacity + kMaxSpans - 1) / kMaxSpans;
    return std::max(kMinSpan, (even + kGroups - 1) / kGroups * kGroups);
}

int span_count(const cqil_attention_shape& s) { return (s.capacity + span_length(s) - 1) / span_length(s); }

template <typename T>
__device__ float wide(T x) {
    return float(x);
}

template <typename T>
__device__ T narrow(float x) {
    return T(x);
}

struct Inputs {
    const void* qkv;
    const int32_t* past;
    const float* cos;
    const float* sin;
    const void* q_norm;
    const void* k_norm;
    void* cache;
};

// One head of one token, by `kLanes` lanes: lane i holds elements i * kElements … of head_dim. The partner of an element in
// the other half may be another lane's, so it is read again rather than exchanged.
template <typename T, int kElements>
struct Head {
    float value[kElements];

    // Reads, normalises when `norm` is given (rounding as the definition does: to T, then times the weight) and rotates
    // when `cos` is. `norms`: whether any head of the warp is normalised; its lanes then exchange sums together.
    __device__ void load(const T* row, bool norms, const T* norm, float eps, const float* cos, const float* sin, int dim,
                         int lane) {
        const int half = dim / 2;
        float scale = 1;
        if (norms) {
            float sum = 0;
            for (int j = lane; j < dim; j += kLanes) sum += wide(row[j]) * wide(row[j]);
            for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            scale = rsqrtf(sum / float(dim) + eps);
        }
        auto element = [&](int j) {
            const float x = wide(row[j]);
            return norm == nullptr ? x : wide(narrow<T>(wide(narrow<T>(x * scale)) * wide(norm[j])));
        };
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const int j = lane * kElements + i;
            value[i] = 0;
            if (j >= dim) continue;
            const float x = element(j);
            value[i] = cos == nullptr   ? x
                       : j < half       ? x * cos[j] - element(j + half) * sin[j]
                                        : x * cos[j - half] + element(j - half) * sin[j - half];
            // Queries and keys are rounded, as a separate rotation would have them.
            value[i] = wide(narrow<T>(value[i]));
        }
    }

    __device__ void read(const T* row, int dim, int lane) {
        if (dim == kLanes * kElements) {
            using Packet = typename std::conditional<
                kElements * sizeof(T) % 16 == 0, uint4,
                typename std::conditional<kElements * sizeof(T) % 8 == 0, uint2, T>::type>::type;
            constexpr int kPackets = int(kElements * sizeof(T) / sizeof(Packet));
            Packet packet[kPackets];
#pragma unroll
            for (int i = 0; i < kPackets; ++i)
                packet[i] = reinterpret_cast<const Packet*>(row + lane * kElements)[i];
#pragma unroll
            for (int i = 0; i < kElements; ++i) value[i] = wide(reinterpret_cast<const T*>(packet)[i]);
            return;
        }
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const int j = lane * kElements + i;
            value[i] = j < dim ? wide(row[j]) : 0;
        }
    }

    __device__ void write(T* row, int dim, int lane) const {
#pragma unroll
        for (int i = 0; i < kElements; ++i)
            if (const int j = lane * kElements + i; j < dim) row[j] = narrow<T>(value[i]);
    }
};

// Rotates queries into `queries` [rows, heads, head_dim] and appends keys and values to the cache. Grid: rows, heads of all
// kinds / groups of a block.
template <typename T, int kElements>
__global__ void __launch_bounds__(kThreads) append_kernel(cqil_attention_shape s, Inputs in, T* queries) {
    release_successor();
    wait_for_predecessor();
    const int head = blockIdx.y * kGroups + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int row = blockIdx.x, sequence = row / s.length, dim = s.head_dim;
    const int heads = s.heads + 2 * s.kv_heads;
    // Lanes of a warp belong to two heads and exchange sums: those beyond the last head do its work again.
    const int h = min(head, heads - 1);
    const int position = in.past[sequence] + row % s.length, at = min(position, s.capacity - 1);
    const float *cos = in.cos + size_t(at) * (dim / 2), *sin = in.sin + size_t(at) * (dim / 2);
    const T* source = static_cast<const T*>(in.qkv) + (size_t(row) * heads + h) * dim;
    Head<T, kElements> x;
    const bool norms = in.q_norm != nullptr;
    const bool query = h < s.heads, key = !query && h < s.heads + s.kv_heads;
    const auto* norm = static_cast<const T*>(query ? in.q_norm : key ? in.k_norm : nullptr);
    x.load(source, norms, norm, s.eps, query || key ? cos : nullptr, sin, dim, lane);
    if (query) x.write(queries + (size_t(row) * s.heads + h) * dim, dim, lane);
    if (query || position >= s.capacity) return;
    const int kv = (h - s.heads) % s.kv_heads;
    T* cache = static_cast<T*>(in.cache) + (key ? 0 : cache_elements(s));
    x.write(cache + ((size_t(sequence) * s.kv_heads + kv) * s.capacity + position) * dim, dim, lane);
}

// A running softmax over keys: maximum (times log2 e), sum of weights, weighted values.
template <int kElements>
struct Softmax {
    float most = -INFINITY, sum = 0, value[kElements] = {};

    template <typename T>
    __device__ void add(float score, const Head<T, kElements>& v) {
        const float larger = fmaxf(most, score);
        const float before = exp2f(most - larger), weight = exp2f(score - larger);
        sum = sum * before + weight;
#pragma unroll
        for (int i = 0; i < kElements; ++i) value[i] = value[i] * before + weight * v.value[i];
        most = larger;
    }
};

// One query against a span of the keys. Decode (`queries` null): rotates query and new key itself; grid: heads, spans,
// sequences. Prefill: queries are rotated and keys appended; grid: heads, tokens, sequences, and a span is everything.
template <typename T, int kElements>
__global__ void __launch_bounds__(kThreads) attend_kernel(cqil_attention_shape s, Inputs in, const T* queries, int span,
                                                          float* partial, T* out) {
    release_successor();
    wait_for_predecessor();
    const int head = blockIdx.x, sequence = blockIdx.z, dim = s.head_dim;
    const int group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const bool decode = queries == nullptr;
    const int token = decode ? 0 : blockIdx.y, row = sequence * s.length + token;
    const int kv = (head + s.first) / s.group, heads = s.heads + 2 * s.kv_heads;
    const int position = in.past[sequence] + token, count = min(position + 1, s.capacity);
    const int spans = decode ? (count + span - 1) / span : 1;
    const int first = decode ? blockIdx.y * span : 0, last = decode ? min(first + span, count) : count;
    if (first >= last) return;

    const size_t line = (size_t(sequence) * s.kv_heads + kv) * s.capacity;
    T* keys = static_cast<T*>(in.cache) + line * dim;
    T* values = keys + cache_elements(s);
    Head<T, kElements> q, k, v;
    const int fresh = decode ? position : INT32_MAX;  // the one key that is not in the cache yet
    Softmax<kElements> softmax;
    const float scale = rsqrtf(float(dim)) * kLog2e;
    auto dot = [&] {
        float score = 0;
#pragma unroll
        for (int i = 0; i < kElements; ++i) score += q.value[i] * k.value[i];
        for (int step = kLanes / 2; step > 0; step /= 2) score += __shfl_xor_sync(~0u, score, step);
        return score * scale;
    };
    if (decode) {
        const T* source = static_cast<const T*>(in.qkv) + size_t(row) * heads * dim;
        const int at = min(position, s.capacity - 1);
        const float *cos = in.cos + size_t(at) * (dim / 2), *sin = in.sin + size_t(at) * (dim / 2);
        const bool norms = in.q_norm != nullptr;
        q.load(source + head * dim, norms, static_cast<const T*>(in.q_norm), s.eps, cos, sin, dim, lane);
        if (fresh >= first && fresh < last) {
            k.load(source + (s.heads + kv) * dim, norms, static_cast<const T*>(in.k_norm), s.eps, cos, sin, dim, lane);
            v.read(source + (s.heads + s.kv_heads + kv) * dim, dim, lane);
            const float score = dot();
            if (group == 0) softmax.add(score, v);
            // Of the query heads that read this key, the first appends it.
            const bool writes = head == 0 || (head - 1 + s.first) / s.group != kv;
            if (writes && group == 0) {
                k.write(keys + size_t(fresh) * dim, dim, lane);
                v.write(values + size_t(fresh) * dim, dim, lane);
            }
        }
    } else {
        q.read(queries + (size_t(row) * s.heads + head) * dim, dim, lane);
    }

    // All lanes of a warp stay in the loop together: they exchange sums. Several keys at once keep loads in flight.
    constexpr int kUnroll = 4;
    for (int base = first; base < last; base += kGroups * kUnroll) {
        Head<T, kElements> key[kUnroll], value[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int j = base + i * kGroups + group;
            const size_t at = size_t(min(j, s.capacity - 1)) * dim;
            if (j < last && j != fresh) {
                key[i].read(keys + at, dim, lane);
                value[i].read(values + at, dim, lane);
            }
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int j = base + i * kGroups + group;
            k = key[i];
            const float score = dot();
            if (j < last && j != fresh) softmax.add(score, value[i]);
        }
    }

    // The groups' results, put together by all threads.
    __shared__ float most[kGroups], sum[kGroups], part[kGroups][kMaxHeadDim];
    if (lane == 0) {
        most[group] = softmax.most;
        sum[group] = softmax.sum;
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i)
        if (const int j = lane * kElements + i; j < dim) part[group][j] = softmax.value[i];
    __syncthreads();
    float top = -INFINITY, total = 0;
    for (int g = 0; g < kGroups; ++g) top = fmaxf(top, most[g]);
    for (int g = 0; g < kGroups; ++g) total += sum[g] * exp2f(most[g] - top);
    T* result = out + (size_t(row) * s.heads + head) * dim;
    const size_t slot = (size_t(sequence) * s.heads + head) * gridDim.y;
    float* mine = partial + (slot + blockIdx.y) * (dim + 2);
    for (int j = threadIdx.x; j < dim; j += kThreads) {
        float x = 0;
        for (int g = 0; g < kGroups; ++g) x += part[g][j] * exp2f(most[g] - top);
        if (spans == 1)
            result[j] = narrow<T>(x / total);
        else
            mine[2 + j] = x;
    }
    if (spans == 1) return;
    if (threadIdx.x == 0) {
        mine[0] = top;
        mine[1] = total;
    }
    __threadfence();
    __syncthreads();
    __shared__ bool finishes;
    // Counters lie behind the cache; they are zero between steps.
    auto* counter = reinterpret_cast<unsigned*>(static_cast<T*>(in.cache) + 2 * cache_elements(s)) +
                    size_t(sequence) * s.heads + head;
    if (threadIdx.x == 0) {
        finishes = atomicAdd(counter, 1u) == unsigned(spans - 1);
        if (finishes) *counter = 0;
    }
    __syncthreads();
    if (!finishes) return;
    __threadfence();
    // Loads side by side, not one behind the other: with many spans their latency is what this takes.
    const float* all = partial + slot * (dim + 2);
    __shared__ float share[kMaxSpans];
    __shared__ float sums[kMaxSpans];
    if (threadIdx.x < kMaxSpans) {
        const bool used = int(threadIdx.x) < spans;
        share[threadIdx.x] = used ? __ldcg(all + threadIdx.x * (dim + 2)) : -INFINITY;
        sums[threadIdx.x] = used ? __ldcg(all + threadIdx.x * (dim + 2) + 1) : 0;
    }
    __syncthreads();
    top = -INFINITY;
    for (int i = 0; i < spans; ++i) top = fmaxf(top, share[i]);
    total = 0;
    for (int i = 0; i < spans; ++i) total += sums[i] * exp2f(share[i] - top);
    __syncthreads();
    if (threadIdx.x < kMaxSpans) share[threadIdx.x] = exp2f(share[threadIdx.x] - top) / total;
    __syncthreads();
    for (int j = threadIdx.x; j < dim; j += kThreads) {
        float x = 0;
#pragma unroll 8
        for (int i = 0; i < spans; ++i) x += __ldcg(all + i * (dim + 2) + 2 + j) * share[i];
        result[j] = narrow<T>(x);
    }
}

// Prefill on tensor cores: a block takes kTile queries of one head against tiles of kTile keys, a warp 16 of the queries.
// Scores are computed twice, first for each row's maximum and sum, then for the weights, so that nothing is rescaled.
constexpr int kTile = 64;
constexpr int kPad = 8;  // spreads rows over shared memory's banks

template <typename T, int kDim>
struct PrefillMemory {
    static constexpr int kRow = kDim + kPad, kScoreRow = kTile + 4, kWeightRow = kTile + kPad;
    alignas(128) T query[kTile][kRow];
    alignas(128) T key[kTile][kRow];
    alignas(128) T value[kTile][kRow];  // directly behind key: the results go where both were
    alignas(128) float score[kTile][kScoreRow];
    alignas(128) T weight[kTile][kWeightRow];
};

// Copies rows first … first + kTile - 1 of [rows, kDim], zeros beyond the last: a weight of 0 times NaN would be NaN.
template <typename T, int kDim>
__device__ void load_tile(T (*to)[kDim + kPad], const T* from, size_t stride, int first, int rows) {
    constexpr int kPackets = kDim * int(sizeof(T)) / 16;
    for (int i = threadIdx.x; i < kTile * kPackets; i += kThreads) {
        const int row = i / kPackets, packet = i % kPackets;
        uint4 data = {0, 0, 0, 0};
        if (first + row < rows) data = reinterpret_cast<const uint4*>(from + (first + row) * stride)[packet];
        reinterpret_cast<uint4*>(to[row])[packet] = data;
    }
}

// Grid: tiles of queries, heads, sequences.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) prefill_kernel(cqil_attention_shape s, Inputs in, const T* queries, T* out) {
    using namespace nvcuda::wmma;
    release_successor();
    wait_for_predecessor();
    extern __shared__ char raw[];
    auto& m = *reinterpret_cast<PrefillMemory<T, kDim>*>(raw);
    using Memory = PrefillMemory<T, kDim>;
    const int head = blockIdx.y, sequence = blockIdx.z, kv = (head + s.first) / s.group;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, top = warp * 16;
    const int first = blockIdx.x * kTile, past = in.past[sequence];
    const int count = min(past + min(first + kTile, s.length), s.capacity);
    const size_t stride = size_t(s.heads) * kDim;
    const T* source = queries + size_t(sequence) * s.length * stride + size_t(head) * kDim;
    const T* keys = static_cast<const T*>(in.cache) + (size_t(sequence) * s.kv_heads + kv) * s.capacity * kDim;
    const T* values = keys + cache_elements(s);
    load_tile<T, kDim>(m.query, source, stride, first, s.length);

    // Two lanes share a row of the warp's scores, each has half of its columns.
    const int row = top + lane / 2, column = lane % 2 * (kTile / 2), position = past + first + row;
    const float scale = rsqrtf(float(kDim)) * kLog2e;
    float most = -INFINITY, sum = 0;
    auto scores = [&] {
#pragma unroll
        for (int n = 0; n < kTile; n += 16) {
            fragment<accumulator, 16, 16, 16, float> c;
            fill_fragment(c, 0.0f);
#pragma unroll
            for (int k = 0; k < kDim; k += 16) {
                fragment<matrix_a, 16, 16, 16, T, row_major> a;
                fragment<matrix_b, 16, 16, 16, T, col_major> b;
                load_matrix_sync(a, &m.query[top][k], Memory::kRow);
                load_matrix_sync(b, &m.key[n][k], Memory::kRow);
                mma_sync(c, a, b, c);
            }
            store_matrix_sync(&m.score[top][n], c, Memory::kScoreRow, mem_row_major);
        }
        __syncwarp();
    };
    for (int tile = 0; tile < count; tile += kTile) {
        __syncthreads();
        load_tile<T, kDim>(m.key, keys, kDim, tile, count);
        __syncthreads();
        scores();
        const int seen = min(min(position + 1, count) - tile - column, kTile / 2);  // columns of this lane that count
        float larger = most;
        for (int i = 0; i < seen; ++i) larger = fmaxf(larger, m.score[row][column + i] * scale);
        float added = 0;
        for (int i = 0; i < seen; ++i) added += exp2f(m.score[row][column + i] * scale - larger);
        if (seen > 0) {
            sum = sum * exp2f(most - larger) + added;
            most = larger;
        }
    }
    const float other = __shfl_xor_sync(~0u, most, 1), whole = fmaxf(most, other);
    sum *= most == -INFINITY ? 0.0f : exp2f(most - whole);
    sum += __shfl_xor_sync(~0u, sum, 1);
    const float inverse = sum > 0 ? 1 / sum : 0;

    fragment<accumulator, 16, 16, 16, float> result[kDim / 16];
#pragma unroll
    for (auto& part : result) fill_fragment(part, 0.0f);
    for (int tile = 0; tile < count; tile += kTile) {
        __syncthreads();
        load_tile<T, kDim>(m.key, keys, kDim, tile, count);
        load_tile<T, kDim>(m.value, values, kDim, tile, count);
        __syncthreads();
        scores();
        const int seen = min(position + 1, count) - tile - column;
        for (int i = 0; i < kTile / 2; ++i) {
            const float weight = i < seen ? exp2f(m.score[row][column + i] * scale - whole) * inverse : 0.0f;
            m.weight[row][column + i] = narrow<T>(weight);
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kTile; k += 16) {
            fragment<matrix_a, 16, 16, 16, T, row_major> a;
            load_matrix_sync(a, &m.weight[top][k], Memory::kWeightRow);
#pragma unroll
            for (int n = 0; n < kDim / 16; ++n) {
                fragment<matrix_b, 16, 16, 16, T, row_major> b;
                load_matrix_sync(b, &m.value[k][n * 16], Memory::kRow);
                mma_sync(result[n], a, b, result[n]);
            }
        }
    }
    __syncthreads();
    auto* wide_result = reinterpret_cast<float*>(m.key);  // [kTile][kDim]
    static_assert(sizeof(float) * kTile * kDim <= sizeof(m.key) + sizeof(m.value), "results fit where the tiles were");
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n)
        store_matrix_sync(wide_result + top * kDim + n * 16, result[n], kDim, mem_row_major);
    __syncwarp();
    for (int i = lane; i < 16 * kDim; i += 32) {
        const int r = top + i / kDim, j = i % kDim;
        if (first + r < s.length)
            out[(size_t(sequence) * s.length + first + r) * stride + size_t(head) * kDim + j] =
                narrow<T>(wide_result[r * kDim + j]);
    }
}

template <typename T, int kDim>
int prefill(const cqil_attention_shape& s, const Inputs& in, const T* queries, T* out, cudaStream_t stream) {
    constexpr int kBytes = int(sizeof(PrefillMemory<T, kDim>));
    const dim3 grid((s.length + kTile - 1) / kTile, s.heads, s.batch);
    return launch(prefill_kernel<T, kDim>, {grid, kThreads, stream, true, kBytes}, s, in, queries, out);
}

template <typename T, int kElements>
int attend(const cqil_attention_shape& s, const Inputs& in, void* out, void* scratch, cudaStream_t stream) {
    T* result = static_cast<T*>(out);
    if (s.length == 1)
        return launch(attend_kernel<T, kElements>, {dim3(s.heads, span_count(s), s.batch), kThreads, stream}, s, in, nullptr,
                      span_length(s), static_cast<float*>(scratch), result);
    T* queries = static_cast<T*>(scratch);
    const int heads = s.heads + 2 * s.kv_heads;
    const dim3 grid(s.batch * s.length, (heads + kGroups - 1) / kGroups);
    if (launch(append_kernel<T, kElements>, {grid, kThreads, stream}, s, in, queries)) return -1;
    if (out == nullptr) return 0;
    if constexpr (!std::is_same_v<T, float>) {
        if (s.head_dim == 64) return prefill<T, 64>(s, in, queries, result, stream);
        if (s.head_dim == 128) return prefill<T, 128>(s, in, queries, result, stream);
    }
    return launch(attend_kernel<T, kElements>, {dim3(s.heads, s.length, s.batch), kThreads, stream}, s, in, queries, 0,
                  nullptr, result);
}

template <typename T>
int attend(const cqil_attention_shape& s, const Inputs& in, void* out, void* scratch, cudaStream_t stream) {
    if (s.head_dim <= 64) return attend<T, 4>(s, in, out, scratch, stream);
    if (s.head_dim <= 128) return attend<T, 8>(s, in, out, scratch, stream);
    return attend<T, 16>(s, in, out, scratch, stream);
}

int check(const cqil_attention_shape& s) {
    if (s.batch < 0 || s.batch > s.max_batch || s.length < 0 || s.capacity < 1 || s.heads < 1 || s.kv_heads < 1)
        return fail("%d of %d sequences, %d tokens of %d, %d and %d heads", s.batch, s.max_batch, s.length, s.capacity,
                    s.heads, s.kv_heads);
    if (s.head_dim < 2 || s.head_dim % 2 || s.head_dim > kMaxHeadDim)
        return fail("head dimension %d is not an even number up to %d", s.head_dim, kMaxHeadDim);
    if (s.group < 1 || s.first < 0 || (s.heads - 1 + s.first) / s.group >= s.kv_heads)
        return fail("%d query heads from %d in groups of %d need more than %d key/value heads", s.heads, s.first, s.group,
                    s.kv_heads);
    if (s.dtype < CQIL_FLOAT32 || s.dtype > CQIL_BFLOAT16) return fail("type %d is not known", s.dtype);
    if (s.batch > 65535 || s.length > 65535) return fail("%d sequences or %d tokens are too many", s.batch, s.length);
    return 0;
}

}  // namespace

extern "C" {

size_t cqil_attention_cache_bytes(const cqil_attention_shape* s) {
    return 2 * cache_elements(*s) * element_bytes(s->dtype) + align(sizeof(unsigned) * s->max_batch * s->heads);
}

size_t cqil_attention_scratch_bytes(const cqil_attention_shape* s) {
    const size_t queries = size_t(s->batch) * s->length * s->heads * s->head_dim * element_bytes(s->dtype);
    const size_t partial = size_t(s->batch) * s->heads * span_count(*s) * (s->head_dim + 2) * sizeof(float);
    return align(std::max(queries, partial));
}

int cqil_attention(const cqil_attention_shape* s, const void* qkv, const int32_t* past, const float* cos, const float* sin,
                   const void* q_norm, const void* k_norm, void* cache, void* out, void* scratch, void* stream) {
    if (check(*s)) return -1;
    if ((q_norm == nullptr) != (k_norm == nullptr)) return fail("one head norm of two is given");
    if (s->length == 1 && out == nullptr) return fail("one new token attends at once");
    if (s->batch == 0 || s->length == 0) return 0;
    const Inputs in = {qkv, past, cos, sin, q_norm, k_norm, cache};
    auto st = static_cast<cudaStream_t>(stream);
    return by_type(s->dtype, [&](auto* type) {
        return attend<std::remove_pointer_t<decltype(type)>>(*s, in, out, scratch, st);
    });
}

}  // extern "C"
