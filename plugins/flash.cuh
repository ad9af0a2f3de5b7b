// Causal attention of prompts on tensor cores, in one pass over the keys (the online softmax of FlashAttention-2, arXiv
// 2307.08691).
//
// A block takes kFlashRows queries of one head, a warp 16 of them; keys and values come in tiles of as many. Queries,
// scores and results stay in registers: what the tensor cores give for two tiles of scores is what they take for
// weights. While a tile's values arrive its scores are computed, and while the next keys arrive the rest.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "linear.cuh"

namespace cqil_trt {

constexpr int kFlashRows = 64, kFlashWarps = kFlashRows / 16, kFlashThreads = 32 * kFlashWarps;
constexpr float kFlashLog2e = 1.4426950408889634f;

// `keys` and `values`: a layer's cache, [slots, kv_heads, capacity, dim]; queries and out [tokens, heads, dim]. `dim` is
// a multiple of 8.
struct Flash {
    const void *queries, *keys, *values;
    void* out;
    const int32_t* past;
    const int32_t* slots;  // null: sequence b is in slot b
    int length, heads, kv_heads, dim, capacity, group, first;
};

// Copies rows first to first + kFlashRows - 1 of [rows, dim] to shared memory, with zeros after the last row and in
// columns from dim on. Packets of 16 bytes are swizzled: the eight rows of a matrix have theirs in different banks.
template <typename T, int kDim>
__device__ void flash_tile(unsigned to, const T* from, int first, int rows, int dim) {
    constexpr int kPackets = kDim / 8, kStep = kFlashThreads / kPackets;
    const int row = threadIdx.x / kPackets, packet = threadIdx.x % kPackets;
    static_assert(kStep % 8 == 0, "a thread's packets are swizzled alike");
    const T* at = from + size_t(first + row) * dim + packet * 8;
    to += (row * kPackets + (packet ^ row % 8)) * 16;
#pragma unroll
    for (int i = 0; i < kFlashRows; i += kStep)
        copy_async(to + i * kPackets * 16, at + i * dim, first + row + i < rows && packet * 8 < dim);
    commit_copies();
}

// Grid: heads, tiles of queries, sequences. The tiles that see most begin first. Heads have kDim elements, or fewer
// unless kWhole.
template <typename T, int kDim, bool kWhole>
__global__ void __launch_bounds__(kFlashThreads, 3) flash_kernel(Flash f) {
    using Two = typename Pair<T>::Type;
    constexpr int kRowBytes = kDim * 2, kSteps = kDim / 16, kTiles = kFlashRows / 8;
    extern __shared__ __align__(256) char memory[];
    const unsigned keys_at = shared_address(memory), values_at = keys_at + kFlashRows * kRowBytes;
    release_successor();
    wait_for_predecessor();
    const int dim = kWhole ? kDim : f.dim;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, line = lane / 4, pair = lane % 4 * 2;
    const int head = blockIdx.x, sequence = blockIdx.z, kv = (head + f.first) / f.group;
    const int first = int(gridDim.y - 1 - blockIdx.y) * kFlashRows, past = f.past[sequence];
    const int count = min(past + min(first + kFlashRows, f.length), f.capacity);
    const int slot = f.slots == nullptr ? sequence : f.slots[sequence];
    const size_t from = (size_t(slot) * f.kv_heads + kv) * f.capacity * dim;
    const T *keys = static_cast<const T*>(f.keys) + from, *values = static_cast<const T*>(f.values) + from;
    flash_tile<T, kDim>(keys_at, keys, 0, count, dim);

    // Where a lane reads the first 16 rows and columns of a tile. Of other columns the swizzled packet differs in the
    // bits in which their number does.
    const unsigned of_keys = keys_at + (lane / 16 * 8 + lane % 8) * kRowBytes + (lane / 8 % 2 ^ lane % 8) * 16;
    const unsigned of_values = values_at + lane % 16 * kRowBytes + (lane / 16 ^ lane % 8) * 16;

    // A lane has elements of two rows of the warp's queries, scores and results: `line` and eight below.
    const size_t stride = size_t(f.heads) * dim;
    const size_t start = size_t(sequence) * f.length * stride + size_t(head) * dim;
    const int row = first + warp * 16 + line;
    unsigned query[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int of = row + part % 2 * 8, column = k * 16 + part / 2 * 8 + pair;
            const T* at = static_cast<const T*>(f.queries) + start + size_t(of) * stride + column;
            query[k][part] = of < f.length && (kWhole || column < dim) ? *reinterpret_cast<const unsigned*>(at) : 0;
        }
    float result[kDim / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    const float scale = rsqrtf(float(dim)) * kFlashLog2e;

    for (int tile = 0; tile < count; tile += kFlashRows) {
        wait_for_copies<0>();
        __syncthreads();
        flash_tile<T, kDim>(values_at, values, tile, count, dim);
        float score[kTiles][4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int n = 0; n < kTiles; n += 2) {
                if (!kWhole && k * 16 >= dim) continue;
                unsigned b[4];
                load_matrices(b, (of_keys ^ k * 32) + n * 8 * kRowBytes);
                multiply_accumulate<T>(score[n], query[k], b);
                multiply_accumulate<T>(score[n + 1], query[k], b + 2);
            }
        wait_for_copies<0>();
        __syncthreads();
        if (tile + kFlashRows < count) flash_tile<T, kDim>(keys_at, keys, tile + kFlashRows, count, dim);

        if (tile + kFlashRows > past + first + 1) {  // not all of its keys are seen by all
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int key = tile + n * 8 + pair + e % 2;
                    if (key > past + row + e / 2 * 8) score[n][e] = -INFINITY;
                }
        }
        // Every query sees key 0, so from the first tile on its maximum is a number.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float larger = most[half];
#pragma unroll
            for (int n = 0; n < kTiles; ++n) larger = fmaxf(larger, fmaxf(score[n][half * 2], score[n][half * 2 + 1]));
            for (int step = 1; step < 4; step *= 2) larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, step));
            const float before = power_of_2((most[half] - larger) * scale), shift = -larger * scale;
            most[half] = larger;
            sum[half] *= before;
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n) {
                result[n][half * 2] *= before;
                result[n][half * 2 + 1] *= before;
            }
#pragma unroll
            for (int n = 0; n < kTiles; ++n)
#pragma unroll
                for (int e = half * 2; e < half * 2 + 2; ++e) {
                    score[n][e] = power_of_2(fmaf(score[n][e], scale, shift));
                    sum[half] += score[n][e];
                }
        }
#pragma unroll
        for (int k = 0; k < kTiles / 2; ++k) {
            unsigned weight[4];
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const float* two = &score[2 * k + part / 2][part % 2 * 2];
                const Two narrow = Pair<T>::narrow(two[0], two[1]);
                weight[part] = *reinterpret_cast<const unsigned*>(&narrow);
            }
#pragma unroll
            for (int n = 0; n < kDim / 8; n += 2) {
                if (!kWhole && n * 8 >= dim) continue;
                unsigned b[4];
                load_matrices<true>(b, (of_values ^ n * 16) + k * 16 * kRowBytes);
                multiply_accumulate<T>(result[n], weight, b);
                multiply_accumulate<T>(result[n + 1], weight, b + 2);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        for (int step = 1; step < 4; step *= 2) sum[half] += __shfl_xor_sync(~0u, sum[half], step);
        const int of = row + half * 8;
        if (of >= f.length) continue;
        T* to = static_cast<T*>(f.out) + start + size_t(of) * stride + pair;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
            if (kWhole || n * 8 < dim)
                *reinterpret_cast<Two*>(to + n * 8) =
                    Pair<T>::narrow(result[n][half * 2] / sum[half], result[n][half * 2 + 1] / sum[half]);
    }
}

// The widest heads: more results would not fit into registers.
constexpr int kFlashDim = 128;

template <typename T, int kDim, bool kWhole>
int flash(const Flash& f, int batch, cudaStream_t stream) {
    const dim3 grid(f.heads, (f.length + kFlashRows - 1) / kFlashRows, batch);
    constexpr size_t kBytes = size_t(2) * kFlashRows * kDim * 2;
    return launch(flash_kernel<T, kDim, kWhole>, {grid, kFlashThreads, stream, true, kBytes}, f);
}

// For heads of up to kFlashDim elements, a multiple of 8.
template <typename T>
int flash(const Flash& f, int batch, cudaStream_t stream) {
    if (f.dim == kFlashDim) return flash<T, kFlashDim, true>(f, batch, stream);
    if (f.dim > kFlashDim / 2) return flash<T, kFlashDim, false>(f, batch, stream);
    if (f.dim == kFlashDim / 2) return flash<T, kFlashDim / 2, true>(f, batch, stream);
    return flash<T, kFlashDim / 2, false>(f, batch, stream);
}

}  // namespace cqil_trt
