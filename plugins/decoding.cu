// What a decode step needs beside its network, each on one GPU: the next token of each sequence, and the KV cache.

#include <cuda_runtime.h>

#include "argmax.cuh"
#include "cqil_trt.h"
#include "errors.h"

using namespace cqil_trt;

namespace {

constexpr int kThreads = 1024;

// One block a row.
__global__ void __launch_bounds__(kThreads) row_argmax_kernel(const float* logits, int width, int offset, float* value,
                                                              int32_t* index) {
    const float* row = logits + size_t(blockIdx.x) * width;
    float best = -INFINITY;
    int32_t where = INT32_MAX;
    for (int i = threadIdx.x; i < width; i += kThreads) {
        const float x = row[i];
        if (better(x, i, best, where)) {
            best = x;
            where = i;
        }
    }
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
        // A rank without a part of the vocabulary offers what no other can lose to.
        index[blockIdx.x] = width ? where + offset : 0;
    }
}

__global__ void advance_kernel(const int32_t* next, int32_t* tokens, int32_t* past, int rows, int last) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    tokens[row] = next[row];
    past[row] = min(past[row] + 1, last);
}

// A block copies one token of one head: `units` of type U. Grid: length, heads, batch.
template <typename U>
__global__ void kv_append_kernel(U* keys, U* values, const U* k, const U* v, const int32_t* past, int capacity, int units) {
    const int token = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
    const int length = gridDim.x, heads = gridDim.y;
    const int position = past[sequence] + token;
    if (position < 0 || position >= capacity) return;
    const size_t row = size_t(sequence) * heads + head;
    const size_t from = (row * length + token) * units, to = (row * capacity + position) * units;
    for (int i = threadIdx.x; i < units; i += blockDim.x) {
        keys[to + i] = k[from + i];
        values[to + i] = v[from + i];
    }
}

template <typename U>
int append(void* keys, void* values, const void* k, const void* v, const int32_t* past, dim3 grid, int capacity,
           size_t row_bytes, cudaStream_t stream) {
    const int units = int(row_bytes / sizeof(U));
    kv_append_kernel<U><<<grid, units < 256 ? units : 256, 0, stream>>>(
        static_cast<U*>(keys), static_cast<U*>(values), static_cast<const U*>(k), static_cast<const U*>(v), past,
        capacity, units);
    CQIL_CUDA(cudaGetLastError());
    return 0;
}

}  // namespace

extern "C" {

int cqil_row_argmax(const float* logits, int rows, int width, int offset, float* value, int32_t* index, void* stream) {
    if (rows < 0 || width < 0) return fail("%d rows of %d", rows, width);
    if (rows == 0) return 0;
    row_argmax_kernel<<<rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(logits, width, offset, value, index);
    CQIL_CUDA(cudaGetLastError());
    return 0;
}

int cqil_advance(const int32_t* next, int32_t* tokens, int32_t* past, int rows, int last, void* stream) {
    if (rows < 0) return fail("%d rows", rows);
    if (rows == 0) return 0;
    advance_kernel<<<(rows + 255) / 256, 256, 0, static_cast<cudaStream_t>(stream)>>>(next, tokens, past, rows, last);
    CQIL_CUDA(cudaGetLastError());
    return 0;
}

int cqil_kv_append(void* keys, void* values, const void* k, const void* v, const int32_t* past, int batch, int heads,
                   int length, int capacity, int head_dim, cqil_dtype dtype, void* stream) {
    if (batch < 0 || heads < 0 || length < 0 || capacity < 1 || head_dim < 2 || head_dim % 2)
        return fail("%d sequences, %d heads of %d, %d tokens, room for %d", batch, heads, head_dim, length, capacity);
    if (heads > 65535 || batch > 65535) return fail("%d heads or %d sequences are more than a grid takes", heads, batch);
    if (batch == 0 || heads == 0 || length == 0) return 0;
    const size_t row_bytes = size_t(head_dim) * (dtype == CQIL_FLOAT32 ? 4 : 2);
    const dim3 grid(length, heads, batch);
    auto s = static_cast<cudaStream_t>(stream);
    return row_bytes % 16 ? append<uint32_t>(keys, values, k, v, past, grid, capacity, row_bytes, s)
                          : append<uint4>(keys, values, k, v, past, grid, capacity, row_bytes, s);
}

}  // extern "C"
