// Causal attention of prompts on tensor cores, in one pass over the keys (the online softmax of FlashAttention-2, arXiv
// 2307.08691).
//
// A block takes 64 or 128 queries of one head, a warp 16 or 32 of them; keys and values come in tiles of kFlashRows.
// Scores and results stay in registers, and queries where there is room for them: what the tensor cores give for two
// tiles of scores is what they take for weights. While a tile's values arrive its scores are computed, and while the
// next keys arrive the rest. With 32 queries a warp reads half as much from shared memory for each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kv_cache.cuh"
#include "linear.cuh"

namespace cqil_trt {

constexpr float kLog2e = 1.4426950408889634f;

// cap * tanh(x) * log2(e)
__device__ inline float capped(float x, float cap) {
    return cap * kLog2e * (1 - __fdividef(2, 1 + power_of_2(2 * kLog2e * x)));
}

constexpr int kFlashRows = 64, kFlashWarps = kFlashRows / 16, kFlashThreads = 32 * kFlashWarps;
static_assert(CQIL_CIRCLE_STEP % kFlashRows == 0, "a tile lies together in a circle");

// `keys` and `values`: a layer's cache, [slots, kv_heads, capacity, dim], which is a circle if a sequence has more
// `positions`; queries and out [tokens, heads, dim]. `dim` is a multiple of 8.
struct Flash {
    const void *queries, *keys, *values;
    void* out;
    const int32_t* past;
    const int32_t* slots;  // null: sequence b is in slot b
    int length, heads, kv_heads, dim, capacity, positions, group, first;
    int window;                // keys that a query sees, 0: all before it
    float scale, value_scale;  // of scores and of results
    float cap;                 // of scores, 0: none
};

// Enqueues it for heads of up to kFlashDim elements, of a half type; `fp8`: the cache has the type Fp8.
constexpr int kFlashDim = 256;
int flash_attention(const Flash& f, int dtype, bool fp8, int batch, cudaStream_t stream);

// Copies rows `row` to row + kRows - 1 of a matrix to shared memory. They are `stride` elements apart, and have
// `dim` elements. Rows `begin` to end - 1 are read; the others become zeros, as do columns from dim on.
// Packets of 16 bytes are swizzled: the eight rows of a matrix have theirs in different banks.
template <typename T, int kDim, int kRows = kFlashRows, typename C>
__device__ void flash_tile(unsigned to, const C* from, size_t stride, int row, int begin, int end, int dim) {
    constexpr int kPackets = kDim / 8, kStep = kFlashThreads / kPackets;
    const int first = threadIdx.x / kPackets, packet = threadIdx.x % kPackets;
    const C* at = from + size_t(row + first) * stride;
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
        const int in_tile = first + i, of = row + in_tile;
        const bool valid = of >= begin && of < end && packet * 8 < dim;
        const unsigned place = to + (in_tile * kPackets + (packet ^ in_tile % 8)) * 16;
        if constexpr (std::is_same_v<C, T>)
            copy_async(place, at + i * stride + packet * 8, valid);
        else
            store_shared(place, valid ? load_packet<T>(at + i * stride, packet) : uint4{});
    }
    commit_copies();
}

// Grid: heads, tiles of queries, sequences. The tiles that see most begin first. Heads have kDim elements, or fewer
// unless kWhole. A warp takes kParts times 16 queries.
template <typename T, typename C, int kDim, bool kWhole, int kParts>
__global__ void __launch_bounds__(kFlashThreads, kDim > 128 || kParts > 1 ? 2 : 3) flash_kernel(Flash f) {
    using Two = typename Pair<T>::Type;
    constexpr int kRowBytes = kDim * 2, kSteps = kDim / 16, kTiles = kFlashRows / 8,
                  kTileBytes = kFlashRows * kRowBytes;
    constexpr int kRows = kFlashRows * kParts;  // queries of the block
    constexpr bool kKeepsQueries = kDim <= 128 && kParts == 1;
    extern __shared__ __align__(512) char memory[];
    const unsigned keys_at = shared_address(memory), values_at = keys_at + kTileBytes;
    release_successor();
    wait_for_predecessor();
    const int dim = kWhole ? kDim : f.dim;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, line = lane / 4, pair = lane % 4 * 2;
    const int head = blockIdx.x, sequence = blockIdx.z, kv = (head + f.first) / f.group;
    const int first = int(gridDim.y - 1 - blockIdx.y) * kRows, position = f.past[sequence] + first;
    const int end = min(position + min(kRows, f.length - first), f.positions);
    // The first key that the block's first query sees.
    const int begin = f.window == 0 ? 0 : max(position + 1 - f.window, 0);
    const int slot = f.slots == nullptr ? sequence : f.slots[sequence];
    const size_t from = (size_t(slot) * f.kv_heads + kv) * f.capacity * dim;
    const C *keys = static_cast<const C*>(f.keys) + from, *values = static_cast<const C*>(f.values) + from;
    auto load = [&](unsigned to, const C* part, int tile) {
        const int row = tile % f.capacity, turn = tile - row;
        flash_tile<T, kDim>(to, part, dim, row, begin - turn, end - turn, dim);
    };
    const int first_tile = begin / kFlashRows * kFlashRows;
    load(keys_at, keys, first_tile);

    // Where a lane reads the first 16 rows and columns of a tile. Of other columns the swizzled packet differs in the
    // bits in which their number does.
    const unsigned of_keys = keys_at + (lane / 16 * 8 + lane % 8) * kRowBytes + (lane / 8 % 2 ^ lane % 8) * 16;
    const unsigned of_values = values_at + lane % 16 * kRowBytes + (lane / 16 ^ lane % 8) * 16;
    const unsigned of_queries = of_values + kTileBytes + warp * 16 * kParts * kRowBytes;

    // A lane has elements of two rows of each 16 of the warp's queries, scores and results: `line` and eight below.
    const size_t stride = size_t(f.heads) * dim;
    const size_t start = size_t(sequence) * f.length * stride + size_t(head) * dim;
    const T* queries = static_cast<const T*>(f.queries) + start;
    const int row = warp * 16 * kParts + line;
    unsigned query[kKeepsQueries ? kSteps : kParts][4];
    if constexpr (kKeepsQueries) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const int of = first + row + part % 2 * 8, column = k * 16 + part / 2 * 8 + pair;
                const bool valid = of < f.length && (kWhole || column < dim);
                query[k][part] = valid ? *reinterpret_cast<const unsigned*>(queries + size_t(of) * stride + column) : 0;
            }
    } else {
        flash_tile<T, kDim, kRows>(values_at + kTileBytes, queries, stride, first, 0, f.length, dim);
    }
    float result[kParts][kDim / 8][4] = {}, most[kParts][2], sum[kParts][2] = {};
#pragma unroll
    for (auto& of_part : most) of_part[0] = of_part[1] = -INFINITY;
    const float scale = f.cap == 0 ? f.scale * kLog2e : 1;

    for (int tile = first_tile; tile < end; tile += kFlashRows) {
        wait_for_copies<0>();
        __syncthreads();
        load(values_at, values, tile);
        float score[kParts][kTiles][4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            if (!kWhole && k * 16 >= dim) continue;
            if constexpr (!kKeepsQueries)
#pragma unroll
                for (int part = 0; part < kParts; ++part)
                    load_matrices(query[part], (of_queries ^ k * 32) + part * 16 * kRowBytes);
#pragma unroll
            for (int n = 0; n < kTiles; n += 2) {
                unsigned b[4];
                load_matrices(b, (of_keys ^ k * 32) + n * 8 * kRowBytes);
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    const unsigned (&a)[4] = query[kKeepsQueries ? k : part];
                    multiply_accumulate<T>(score[part][n], a, b);
                    multiply_accumulate<T>(score[part][n + 1], a, b + 2);
                }
            }
        }
        wait_for_copies<0>();
        __syncthreads();
        if (tile + kFlashRows < end) load(keys_at, keys, tile + kFlashRows);

        const bool before_window = f.window != 0 && tile < position + kRows - f.window;
        const bool some_hidden = tile + kFlashRows > position + 1 || before_window;  // not all keys are seen by all
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            auto& of_part = score[part];
            if (f.cap != 0) {
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) of_part[n][e] = capped(of_part[n][e] * (f.scale / f.cap), f.cap);
            }
            if (some_hidden) {
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int key = tile + n * 8 + pair + e % 2, newest = position + row + part * 16 + e / 2 * 8;
                        if (key > newest || (before_window && key <= newest - f.window)) of_part[n][e] = -INFINITY;
                    }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& top = most[part][half];
                float larger = top;
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
                    larger = fmaxf(larger, fmaxf(of_part[n][half * 2], of_part[n][half * 2 + 1]));
                for (int step = 1; step < 4; step *= 2) larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, step));
                // A query may see no key yet: its window begins in a later tile.
                const float base = larger == -INFINITY ? 0 : larger, shift = -base * scale;
                const float before = power_of_2((top - base) * scale);
                top = larger;
                sum[part][half] *= before;
#pragma unroll
                for (int n = 0; n < kDim / 8; ++n) {
                    result[part][n][half * 2] *= before;
                    result[part][n][half * 2 + 1] *= before;
                }
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
#pragma unroll
                    for (int e = half * 2; e < half * 2 + 2; ++e) {
                        of_part[n][e] = power_of_2(fmaf(of_part[n][e], scale, shift));
                        sum[part][half] += of_part[n][e];
                    }
            }
        }
#pragma unroll
        for (int k = 0; k < kTiles / 2; ++k) {
            unsigned weight[kParts][4];
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* two = &score[part][2 * k + i / 2][i % 2 * 2];
                    const Two narrow = Pair<T>::narrow(two[0], two[1]);
                    weight[part][i] = *reinterpret_cast<const unsigned*>(&narrow);
                }
#pragma unroll
            for (int n = 0; n < kDim / 8; n += 2) {
                if (!kWhole && n * 8 >= dim) continue;
                unsigned b[4];
                load_matrices<true>(b, (of_values ^ n * 16) + k * 16 * kRowBytes);
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    multiply_accumulate<T>(result[part][n], weight[part], b);
                    multiply_accumulate<T>(result[part][n + 1], weight[part], b + 2);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * kParts; ++i) {
        const int part = i / 2, half = i % 2, of = first + row + part * 16 + half * 8;
        float total = sum[part][half];
        for (int step = 1; step < 4; step *= 2) total += __shfl_xor_sync(~0u, total, step);
        if (of >= f.length) continue;
        const float factor = total > 0 ? f.value_scale / total : 0;  // 0: of a token that has no place
        T* to = static_cast<T*>(f.out) + start + size_t(of) * stride + pair;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
            if (kWhole || n * 8 < dim)
                *reinterpret_cast<Two*>(to + n * 8) =
                    Pair<T>::narrow(result[part][n][half * 2] * factor, result[part][n][half * 2 + 1] * factor);
    }
}

template <typename T, typename C, int kDim, bool kWhole, int kParts = 1>
int flash(const Flash& f, int batch, cudaStream_t stream) {
    constexpr int kRows = kFlashRows * kParts, kKept = kDim > 128 || kParts > 1 ? kParts : 0;
    const dim3 grid(f.heads, (f.length + kRows - 1) / kRows, batch);
    constexpr size_t kBytes = size_t(2 + kKept) * kFlashRows * kDim * 2;
    return launch(flash_kernel<T, C, kDim, kWhole, kParts>, {grid, kFlashThreads, stream, true, kBytes}, f);
}

// T: of queries and results; C: of the cache, T or Fp8. With 128 queries a block, three blocks at least for two of the
// `processors`: with one, a scheduler has one warp, whose products wait for its softmax. (Between 1.5 and two blocks for
// each, the first tokens of a prompt take a little longer than with 64 queries, and those after many others 10 to 25%
// less.)
template <typename T, typename C>
int flash(const Flash& f, int batch, int processors, cudaStream_t stream) {
    const int large_blocks = f.heads * ((f.length + 2 * kFlashRows - 1) / (2 * kFlashRows)) * batch;
    if constexpr (std::is_same_v<C, T>) {
        const bool large = 2 * large_blocks >= 3 * processors;
        if (f.dim == 128 && large) return flash<T, C, 128, true, 2>(f, batch, stream);
        if (f.dim == 64 && large) return flash<T, C, 64, true, 2>(f, batch, stream);
    }
    if (f.dim == kFlashDim) return flash<T, C, kFlashDim, true>(f, batch, stream);
    if (f.dim > 128) return flash<T, C, kFlashDim, false>(f, batch, stream);
    if (f.dim == 128) return flash<T, C, 128, true>(f, batch, stream);
    if (f.dim > 64) return flash<T, C, 128, false>(f, batch, stream);
    if (f.dim == 64) return flash<T, C, 64, true>(f, batch, stream);
    return flash<T, C, 64, false>(f, batch, stream);
}

}  // namespace cqil_trt
