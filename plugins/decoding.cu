// Small single-GPU kernels of a decode step: RMSNorm, sums, gating, rows of a table, the likeliest token, the next
// step's input.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <type_traits>

#include "argmax.cuh"
#include "cqil_trt.h"
#include "errors.h"
#include "gating.cuh"
#include "launch.cuh"
#include "types.cuh"

using namespace cqil_trt;

namespace {

constexpr int kThreads = 1024;

constexpr int kMostValues = 16;  // of a row, that a thread of norms_kernel has

// kWidth elements, in one load where they are 16 bytes.
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Several {
    static constexpr int kCount = kWidth;
    T value[kWidth];
};

// The sum of x over the block, on every thread; `parts` is not used again.
__device__ float block_sum(float x, float* parts) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < int(blockDim.x / 32); ++i) x += parts[i];
    return x;
}

// A row's residual sum with the norm of what is added, and the norm of the sum (cqil_residual_norm). One block per row,
// which a thread's kEach times kWidth elements hold together.
template <typename T, int kWidth, int kEach>
__global__ void __launch_bounds__(kThreads)
    norms_kernel(const T* delta, const T* delta_norm, const T* residual, const T* weight, T* sum_out, T* normed,
                 int hidden, float eps, int kind) {
    using Part = Several<T, kWidth>;
    release_successor();
    const int parts = hidden / kWidth;
    const size_t row = size_t(blockIdx.x) * parts;
    auto load = [&](Part(&to)[kEach], const T* from, size_t first) {
        if (from == nullptr) return;
#pragma unroll
        for (int k = 0; k < kEach; ++k)
            if (const int i = k * blockDim.x + threadIdx.x; i < parts)
                to[k] = reinterpret_cast<const Part*>(from)[first + i];
    };
    Part before[kEach], after[kEach], x[kEach] = {}, added[kEach];
    load(before, delta_norm, 0);
    load(after, weight, 0);
    wait_for_predecessor();
    load(added, delta, row);
    load(x, residual, row);
    __shared__ float sums[2][kThreads / 32];
    // Calls use(k, e) for each of the thread's elements.
    auto each = [&](auto use) {
#pragma unroll
        for (int k = 0; k < kEach; ++k)
            if (int(k * blockDim.x + threadIdx.x) < parts)
#pragma unroll
                for (int e = 0; e < kWidth; ++e) use(k, e);
    };
    auto scale_of = [&](const Part(&of)[kEach], float* parts) {
        float square = 0;
        each([&](int k, int e) { square = fmaf(float(of[k].value[e]), float(of[k].value[e]), square); });
        return rsqrtf(block_sum(square, parts) / float(hidden) + eps);
    };
    auto times = [&](T value, float scale, T by) {
        const float scaled = float(value) * scale, factor = float(by);
        return kind == CQIL_NORM_ROUNDED  ? T(float(T(scaled)) * factor)
               : kind == CQIL_NORM_OFFSET ? T(scaled * (1 + factor))
                                          : T(scaled * factor);
    };
    auto store = [&](T* to, const Part(&from)[kEach]) {
#pragma unroll
        for (int k = 0; k < kEach; ++k)
            if (const int i = k * blockDim.x + threadIdx.x; i < parts) reinterpret_cast<Part*>(to)[row + i] = from[k];
    };
    if (delta_norm != nullptr) {
        const float scale = scale_of(added, sums[0]);
        each([&](int k, int e) { added[k].value[e] = times(added[k].value[e], scale, before[k].value[e]); });
    }
    if (delta != nullptr) {
        each([&](int k, int e) { x[k].value[e] = T(float(x[k].value[e]) + float(added[k].value[e])); });
        store(sum_out, x);
    }
    if (weight == nullptr) return;
    const float scale = scale_of(x, sums[1]);
    each([&](int k, int e) { x[k].value[e] = times(x[k].value[e], scale, after[k].value[e]); });
    store(normed, x);
}

// As norms_kernel with CQIL_NORM_ROUNDED and without delta_norm, of rows of any length. One block per row; in the
// second pass each thread revisits its own elements.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    long_norm_kernel(const T* delta, const T* residual, const T* weight, T* sum_out, T* normed, int hidden, float eps) {
    release_successor();
    wait_for_predecessor();
    const size_t row = size_t(blockIdx.x) * hidden;
    float square = 0;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
        float x = float(residual[row + i]);
        if (delta != nullptr) {
            const T rounded = T(x + float(delta[row + i]));
            sum_out[row + i] = rounded;
            x = float(rounded);
        }
        square = fmaf(x, x, square);
    }
    __shared__ float parts[kThreads / 32];
    const float scale = rsqrtf(block_sum(square, parts) / float(hidden) + eps);
    const T* from = delta != nullptr ? sum_out : residual;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x)
        normed[row + i] = T(float(T(float(from[row + i]) * scale)) * float(weight[i]));
}

// One block per row: the sums of the squares of its queries, and of some of its keys.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    head_squares_kernel(const T* qkv, float* out, int width, int queries, int first, int last, float query_factor,
                        float key_factor) {
    release_successor();
    wait_for_predecessor();
    const T* row = qkv + size_t(blockIdx.x) * width;
    auto squares = [&](int from, int to) {
        float sum = 0;
        for (int i = from + threadIdx.x; i < to; i += blockDim.x) sum = fmaf(float(row[i]), float(row[i]), sum);
        return sum;
    };
    __shared__ float parts[2][kThreads / 32];
    const float q = block_sum(squares(0, queries), parts[0]), k = block_sum(squares(first, last), parts[1]);
    if (threadIdx.x == 0) {
        out[2 * blockIdx.x] = q * query_factor;
        out[2 * blockIdx.x + 1] = k * key_factor;
    }
}

// A thread of the next three kernels has one part, `parts` of all or of a row.
template <typename T, int kWidth>
__global__ void scale_kernel(const Several<T, kWidth>* x, Several<T, kWidth>* out, size_t parts, float factor,
                             float cap) {
    release_successor();
    wait_for_predecessor();
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= parts) return;
    Several<T, kWidth> part = x[i];
#pragma unroll
    for (T& value : part.value) {
        const float y = float(value) * factor;
        value = T(cap == 0 ? y : cap * tanhf(y / cap));
    }
    out[i] = part;
}

template <typename T, int kWidth>
__global__ void add_kernel(const Several<T, kWidth>* x, const Several<T, kWidth>* y, Several<T, kWidth>* out,
                           size_t parts) {
    release_successor();
    wait_for_predecessor();
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= parts) return;
    Several<T, kWidth> sum = x[i];
    const Several<T, kWidth> added = y[i];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sum.value[e] = T(float(sum.value[e]) + float(added.value[e]));
    out[i] = sum;
}

template <typename T, int kWidth>
__global__ void gate_kernel(const Several<T, kWidth>* gate_up, Several<T, kWidth>* out, int parts, int gating) {
    release_successor();
    wait_for_predecessor();
    const int i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= parts) return;
    const size_t row = blockIdx.x;
    Several<T, kWidth> gate = gate_up[row * 2 * parts + i];
    const Several<T, kWidth> up = gate_up[(row * 2 + 1) * parts + i];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) gate.value[e] = gated(gate.value[e], up.value[e], gating);
    out[row * parts + i] = gate;
}

// One block per row of `width` elements or packets.
template <typename T>
__global__ void gather_rows_kernel(const T* __restrict__ table, const int32_t* indices, T* __restrict__ out,
                                   int width) {
    release_successor();
    wait_for_predecessor();
    const T* from = table + size_t(indices[blockIdx.x]) * width;
    T* to = out + size_t(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

template <typename T>
int gather_rows(const void* table, const int32_t* indices, void* out, int rows, int width, void* stream) {
    return launch(gather_rows_kernel<T>, {dim3(rows), 512, static_cast<cudaStream_t>(stream)},
                  static_cast<const T*>(table), indices, static_cast<T*>(out), width);
}

// One block per row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    row_argmax_kernel(const T* logits, int width, int offset, float* value, int32_t* index) {
    release_successor();
    wait_for_predecessor();
    const T* row = logits + size_t(blockIdx.x) * width;
    float best = -INFINITY;
    int32_t where = INT32_MAX;
    auto consider = [&](T logit, int i) {
        const float x = float(logit);
        if (better(x, i, best, where)) {
            best = x;
            where = i;
        }
    };
    constexpr int kPacket = 16 / sizeof(T), kAhead = 4;  // packets that a thread has in flight
    const int packets = reinterpret_cast<uintptr_t>(row) % 16 == 0 ? width / kPacket : 0;
#pragma unroll 1
    for (int first = threadIdx.x; first < packets; first += kAhead * kThreads) {
        // The last packet instead of those that are missing, as it may be considered again.
        auto number = [&](int k) { return min(first + k * kThreads, packets - 1); };
        Several<T, kPacket> packet[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) packet[k] = reinterpret_cast<const Several<T, kPacket>*>(row)[number(k)];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
#pragma unroll
            for (int j = 0; j < kPacket; ++j) consider(packet[k].value[j], number(k) * kPacket + j);
    }
    for (int i = packets * kPacket + threadIdx.x; i < width; i += kThreads) consider(row[i], i);
    auto reduce = [&] {
        for (int step = 16; step > 0; step /= 2) {
            const float other = __shfl_down_sync(~0u, best, step);
            const int32_t there = __shfl_down_sync(~0u, where, step);
            if (better(other, there, best, where)) {
                best = other;
                where = there;
            }
        }
    };
    __shared__ float values[kThreads / 32];
    __shared__ int32_t indices[kThreads / 32];
    reduce();
    if (threadIdx.x % 32 == 0) {
        values[threadIdx.x / 32] = best;
        indices[threadIdx.x / 32] = where;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = values[threadIdx.x];
    where = indices[threadIdx.x];
    reduce();
    if (threadIdx.x == 0) {
        value[blockIdx.x] = best;
        // A rank without a share of the vocabulary offers a value that loses to every other.
        index[blockIdx.x] = width ? where + offset : 0;
    }
}

// Begins a decode step of other rows; one block. Like advance_kernel it does not release its successor.
__global__ void __launch_bounds__(kThreads)
    arrange_kernel(const int32_t* slots, const int32_t* slot_tokens, const int32_t* slot_past, const int32_t* drafts,
                   int32_t* tokens, int32_t* past, int rows, int width, int last) {
    wait_for_predecessor();
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
        const int after = row % width;
        tokens[row] = after == 0 ? slot_tokens[slots[row]] : drafts[row];
        past[row] = min(slot_past[slots[row]] + after, last);
    }
    __threadfence();  // the step's attention reads `past` before it waits for this kernel
}

// Ends a decode step; one block. It does not release its successor, so the next step may read positions and caches
// early (launch.cuh).
__global__ void __launch_bounds__(kThreads)
    advance_kernel(const int32_t* next, const int32_t* slots, int32_t* tokens, int32_t* past, int32_t* slot_tokens,
                   int32_t* slot_past, uint32_t* counts, int vocabulary, int rows, int last, uint32_t* step,
                   volatile uint64_t* history, int history_slots, int stride) {
    wait_for_predecessor();
    const uint32_t now = *step;
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
        const int token = next[row], slot = slots[row], position = min(past[row] + 1, last);
        tokens[row] = slot_tokens[slot] = token;
        past[row] = slot_past[slot] = position;
        if (counts != nullptr) ++counts[size_t(slot) * vocabulary + token];  // no other row has this slot
        history[size_t(now % history_slots) * stride + row] = uint64_t(now + 1) << 32 | uint32_t(token);
    }
    __threadfence();  // the next step's attention reads `past` before it waits for this kernel
    __syncthreads();
    if (threadIdx.x == 0) *step = now + 1;
}

// Ends a step with drafts, as advance_kernel ends others; one block, a thread for each sequence.
__global__ void __launch_bounds__(kThreads)
    accept_kernel(const int32_t* next, const int32_t* tokens, const int32_t* drafted, const int32_t* slots,
                  const int32_t* past, int32_t* slot_tokens, int32_t* slot_past, uint32_t* counts, int vocabulary,
                  int rows, int width, int last, uint32_t* step, volatile uint64_t* history, int history_slots,
                  int stride) {
    wait_for_predecessor();
    const uint32_t now = *step;
    for (int row = threadIdx.x; row < rows; row += blockDim.x)
        history[size_t(now % history_slots) * stride + row] = uint64_t(now + 1) << 32 | uint32_t(next[row]);
    for (int i = threadIdx.x; i < rows / width; i += blockDim.x) {
        const int first = i * width, slot = slots[first];
        int at = 0;
        for (;; ++at) {
            const int token = next[first + at];
            if (counts != nullptr) ++counts[size_t(slot) * vocabulary + token];  // no other sequence has this slot
            if (at == drafted[i] || token != tokens[first + at + 1]) break;
        }
        slot_tokens[slot] = next[first + at];
        slot_past[slot] = min(past[first] + at + 1, last);
    }
    __syncthreads();
    if (threadIdx.x == 0) *step = now + 1;
}

bool is_power_of_2(int x) { return x > 0 && (x & (x - 1)) == 0; }

// The arguments of norms_kernel.
template <typename T>
struct Norms {
    const T *delta, *delta_norm, *residual, *weight;
    T *sum, *normed;
    int rows, hidden;
    float eps;
    cqil_norm kind;
};

template <int kWidth, int kEach, typename T>
int norms(const Norms<T>& n, cudaStream_t stream) {
    const int threads = ((n.hidden / kWidth + kEach - 1) / kEach + 31) / 32 * 32;
    return launch(norms_kernel<T, kWidth, kEach>, {dim3(n.rows), dim3(threads), stream}, n.delta, n.delta_norm,
                  n.residual, n.weight, n.sum, n.normed, n.hidden, n.eps, int(n.kind));
}

// Whether `count` elements at each of the addresses are whole parts of 16 bytes.
template <typename T>
bool in_packets(size_t count, std::initializer_list<const void*> addresses) {
    uintptr_t all = count * sizeof(T);
    for (const void* address : addresses) all |= reinterpret_cast<uintptr_t>(address);
    return all % 16 == 0;
}

template <typename T>
int norms(const Norms<T>& n, cudaStream_t stream) {
    constexpr int kPacket = 16 / sizeof(T);
    if (n.hidden > kThreads * kMostValues) {
        if (n.delta_norm != nullptr || n.kind != CQIL_NORM_ROUNDED)
            return fail("a row of %d elements is too long for its norms", n.hidden);
        return launch(long_norm_kernel<T>, {dim3(n.rows), kThreads, stream}, n.delta, n.residual, n.weight, n.sum,
                      n.normed, n.hidden, n.eps);
    }
    if (!in_packets<T>(n.hidden, {n.delta, n.delta_norm, n.residual, n.weight, n.sum, n.normed}))
        return norms<1, kMostValues>(n, stream);
    if (n.hidden <= kThreads * kPacket) return norms<kPacket, 1>(n, stream);
    return norms<kPacket, kMostValues / kPacket>(n, stream);
}

// Calls `run` with a null pointer of the parts that a kernel takes at once: 16 bytes where `count` elements, at each of
// the addresses, are whole parts of them, else one element.
template <typename T, typename F>
int in_parts(size_t count, std::initializer_list<const void*> addresses, F run) {
    if (in_packets<T>(count, addresses)) return run(static_cast<Several<T, 16 / sizeof(T)>*>(nullptr));
    return run(static_cast<Several<T, 1>*>(nullptr));
}

// A thread for each of the parts.
Launch over(size_t parts, void* stream) { return {dim3((parts + 255) / 256), 256, static_cast<cudaStream_t>(stream)}; }

}  // namespace

extern "C" {

int cqil_residual_norm(const void* delta, const void* delta_norm, const void* residual, const void* weight, void* sum,
                       void* normed, int rows, int hidden, float eps, cqil_norm norm, cqil_dtype dtype, void* stream) {
    if (rows < 0 || hidden < 1) return fail("%d rows of %d", rows, hidden);
    if (norm < CQIL_NORM_ROUNDED || norm > CQIL_NORM_OFFSET) return fail("norms of kind %d", int(norm));
    if (delta_norm == nullptr && (residual == nullptr || weight == nullptr)) return fail("a norm lacks its operands");
    if (delta_norm != nullptr && delta == nullptr) return fail("delta_norm is given, and no delta");
    if (rows == 0) return 0;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Norms<T> n = {static_cast<const T*>(delta),
                            static_cast<const T*>(delta_norm),
                            static_cast<const T*>(residual),
                            static_cast<const T*>(weight),
                            static_cast<T*>(sum),
                            static_cast<T*>(normed),
                            rows,
                            hidden,
                            eps,
                            norm};
        return norms(n, static_cast<cudaStream_t>(stream));
    });
}

int cqil_add(const void* x, const void* y, void* out, size_t count, cqil_dtype dtype, void* stream) {
    if (count == 0) return 0;
    if (count > size_t(INT32_MAX) * 256) return fail("%zu elements", count);
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return in_parts<T>(count, {x, y, out}, [&](auto* part) {
            using Part = std::remove_pointer_t<decltype(part)>;
            const size_t parts = count / Part::kCount;
            return launch(add_kernel<T, Part::kCount>, over(parts, stream), static_cast<const Part*>(x),
                          static_cast<const Part*>(y), static_cast<Part*>(out), parts);
        });
    });
}

int cqil_scale(const void* x, void* out, size_t count, float factor, float cap, cqil_dtype dtype, void* stream) {
    if (count == 0) return 0;
    if (count > size_t(INT32_MAX) * 256) return fail("%zu elements", count);
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return in_parts<T>(count, {x, out}, [&](auto* part) {
            using Part = std::remove_pointer_t<decltype(part)>;
            const size_t parts = count / Part::kCount;
            return launch(scale_kernel<T, Part::kCount>, over(parts, stream), static_cast<const Part*>(x),
                          static_cast<Part*>(out), parts, factor, cap);
        });
    });
}

int cqil_head_squares(const void* qkv, float* out, int rows, int heads, int kv_heads, int head_dim, int first_key,
                      int last_key, float query_factor, float key_factor, cqil_dtype dtype, void* stream) {
    if (rows < 0 || heads < 0 || kv_heads < 0 || head_dim < 1 || first_key < 0 || last_key > kv_heads)
        return fail("%d rows of %d and %d heads of %d, keys from %d to %d", rows, heads, kv_heads, head_dim, first_key,
                    last_key);
    if (rows == 0) return 0;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch(head_squares_kernel<T>, {dim3(rows), kThreads, static_cast<cudaStream_t>(stream)},
                      static_cast<const T*>(qkv), out, (heads + 2 * kv_heads) * head_dim, heads * head_dim,
                      (heads + first_key) * head_dim, (heads + last_key) * head_dim, query_factor, key_factor);
    });
}

int cqil_gate(const void* gate_up, void* out, int rows, int inner, cqil_gating gating, cqil_dtype dtype, void* stream) {
    if (rows < 0 || inner < 1) return fail("%d rows of %d", rows, inner);
    if (gating != CQIL_SWIGLU && gating != CQIL_GEGLU) return fail("gating %d", int(gating));
    if (rows == 0) return 0;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return in_parts<T>(inner, {gate_up, out}, [&](auto* part) {
            using Part = std::remove_pointer_t<decltype(part)>;
            const int parts = inner / Part::kCount;
            return launch(gate_kernel<T, Part::kCount>,
                          {dim3(rows, (parts + 255) / 256), 256, static_cast<cudaStream_t>(stream)},
                          static_cast<const Part*>(gate_up), static_cast<Part*>(out), parts, int(gating));
        });
    });
}

int cqil_gather_rows(const void* table, const int32_t* indices, void* out, int rows, int hidden, cqil_dtype dtype,
                     void* stream) {
    if (rows < 0 || hidden < 1) return fail("%d rows of %d", rows, hidden);
    if (rows == 0) return 0;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const size_t bytes = hidden * sizeof(T);
        const bool aligned = (reinterpret_cast<uintptr_t>(table) | reinterpret_cast<uintptr_t>(out) | bytes) % 16 == 0;
        return aligned ? gather_rows<uint4>(table, indices, out, rows, int(bytes / 16), stream)
                       : gather_rows<T>(table, indices, out, rows, hidden, stream);
    });
}

int cqil_row_argmax(const void* logits, int rows, int width, int offset, cqil_dtype dtype, float* value, int32_t* index,
                    void* stream) {
    if (rows < 0 || width < 0) return fail("%d rows of %d", rows, width);
    if (rows == 0) return 0;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch(row_argmax_kernel<T>, {dim3(rows), kThreads, static_cast<cudaStream_t>(stream)},
                      static_cast<const T*>(logits), width, offset, value, index);
    });
}

int cqil_arrange(const int32_t* slots, const int32_t* slot_tokens, const int32_t* slot_past, const int32_t* drafts,
                 int32_t* tokens, int32_t* past, int rows, int width, int last, void* stream) {
    if (rows < 0 || width < 1 || rows % width != 0) return fail("%d rows, %d a sequence", rows, width);
    if (width > 1 && drafts == nullptr) return fail("no drafts for %d rows a sequence", width);
    if (rows == 0) return 0;
    auto st = static_cast<cudaStream_t>(stream);
    if (launch(arrange_kernel, {1, rows > 32 ? kThreads : 32, st}, slots, slot_tokens, slot_past, drafts, tokens, past,
               rows, width, last))
        return -1;
    return note_full_wait(st);
}

int cqil_advance(const int32_t* next, const int32_t* slots, int32_t* tokens, int32_t* past, int32_t* slot_tokens,
                 int32_t* slot_past, uint32_t* counts, int vocabulary, int rows, int last, uint32_t* step,
                 uint64_t* history, int history_slots, int stride, void* stream) {
    if (rows < 0 || !is_power_of_2(history_slots) || stride < rows)
        return fail("%d rows, a history of %d slots of %d", rows, history_slots, stride);
    if (rows == 0) return 0;
    auto st = static_cast<cudaStream_t>(stream);
    if (launch(advance_kernel, {1, rows > 32 ? kThreads : 32, st}, next, slots, tokens, past, slot_tokens, slot_past,
               counts, vocabulary, rows, last, step, history, history_slots, stride))
        return -1;
    return note_full_wait(st);
}

int cqil_accept(const int32_t* next, const int32_t* tokens, const int32_t* drafted, const int32_t* slots,
                const int32_t* past, int32_t* slot_tokens, int32_t* slot_past, uint32_t* counts, int vocabulary,
                int rows, int width, int last, uint32_t* step, uint64_t* history, int history_slots, int stride,
                void* stream) {
    if (rows < 0 || width < 1 || rows % width != 0 || !is_power_of_2(history_slots) || stride < rows)
        return fail("%d rows, %d a sequence, a history of %d slots of %d", rows, width, history_slots, stride);
    if (rows == 0) return 0;
    auto st = static_cast<cudaStream_t>(stream);
    if (launch(accept_kernel, {1, rows > 32 ? kThreads : 32, st}, next, tokens, drafted, slots, past, slot_tokens,
               slot_past, counts, vocabulary, rows, width, last, step, history, history_slots, stride))
        return -1;
    return note_full_wait(st);
}

}  // extern "C"
