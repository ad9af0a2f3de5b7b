// Matrix products of a decoder layer: out = activation(norm(x + delta) · Wᵀ + bias) * scale + residual, or both
// addends.
//
// Few rows (a decode step) are bound by reading W. Each warp streams it through a ring in shared memory to the tensor
// cores. The copies start before the previous kernel has finished (weights are constants), so memory hardly idles
// between kernels. More rows are multiplied by cuBLASLt where it is (library_linear.cu), else in tiles of x and W. A
// plain kernel takes the rest.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "cqil_trt.h"
#include "errors.h"
#include "gating.cuh"
#include "launch.cuh"
#include "linear.cuh"
#include "types.cuh"

using namespace cqil_trt;

namespace {

// On tensor cores W is the left operand, so few rows of x waste little.

// Up to sixteen rows: streaming W, 16 rows of it at a time (if gated, 8 of gate and 8 of up). A block takes every
// gridDim.x-th of these tiles, up to kTiles of them in a pass, so that it reads x once a pass. Its warps share the
// depth, each with a ring of its own, and add up what they have at the end of a pass. The order in which a result is
// summed depends neither on the number of rows nor on what is in the others.
//
// The ring takes so much shared memory that a multiprocessor has room for one block. With room for two, several blocks
// of one product meet on a multiprocessor where others have none, and it takes up to 1.3 times as long. The blocks of
// the next product wait, and each begins where one of this product ends.

constexpr int kFewRows = 16;
constexpr int kFewWarps = 8, kFewThreads = 32 * kFewWarps;
constexpr int kManyStages = 8, kFewStages = 4;  // of the ring; few where a block may have less shared memory
constexpr int kTileRows = 16, kShare = 64;      // rows and depth of W in a stage: lines of 128 bytes
constexpr int kTileBytes = kTileRows * kShare * 2;

__host__ __device__ constexpr int tiles_of_pass(int columns) { return columns == 8 ? 6 : 3; }

// Shared memory for the rings, the sums of the warps, and the norm's weight.
size_t few_bytes(int columns, int stages, int inputs, bool norm) {
    return size_t(kFewWarps) * stages * kTileBytes +
           sizeof(float) * kFewWarps * tiles_of_pass(columns) * kTileRows * columns + (norm ? size_t(inputs) * 2 : 0);
}

#if __CUDA_ARCH__ >= 900
// Copies 16 bytes that are read once to shared memory, or zeros unless `valid`.
__device__ void copy_once(unsigned to, const void* from, bool valid, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
}
#endif

// kColumns: rows of x that there is room for, 8 or 16. Half of the registers are left to attention's blocks.
template <typename T, bool kGated, int kColumns, int kStages>
__global__ void __launch_bounds__(kFewThreads, 2) few_rows_kernel(Operands o) {
#if __CUDA_ARCH__ >= 900
    constexpr int kTiles = tiles_of_pass(kColumns), kOctets = kColumns / 8;
    constexpr int kSteps = kShare / 32, kTileDepth = kFewWarps * kShare;
    constexpr int kPerTile = kGated ? 8 : 16;  // results of a row of x
    extern __shared__ __align__(128) char memory[];
    __shared__ __align__(16) float squares[kColumns][kFewWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    char* const ring = memory + warp * kStages * kTileBytes;
    auto* sums = reinterpret_cast<float*>(memory + kFewWarps * kStages * kTileBytes);
    auto* norm = reinterpret_cast<uint4*>(sums + kFewWarps * kTiles * kTileRows * kColumns);
    const int tiles = (o.outputs + kPerTile - 1) / kPerTile, mine = (tiles - 1 - int(blockIdx.x)) / int(gridDim.x) + 1;
    const int chunks = (o.inputs + kTileDepth - 1) / kTileDepth, total = mine * chunks;

    // A lane copies a packet of rows lane / 8, + 4, + 8 and + 12. The eight lanes that later read a packet at once, of
    // two rows, hit different banks, as the halves of odd rows are exchanged.
    const int line = lane / 8, row_bytes = o.inputs * 2;
    const unsigned to = shared_address(ring) + line * 128 + ((lane % 8) ^ (line % 2 * 4)) * 16;
    const char* const weight = static_cast<const char*>(o.weight) + warp * kShare * 2 + lane % 8 * 16;
    const uint64_t policy = streaming_policy();
    int fetched = 0, fetch_first = 0, fetch_tile = 0, fetch_chunk = 0, fetch_stage = 0;
    auto fetch = [&] {
        if (fetched < total) {
            const int output = (int(blockIdx.x) + (fetch_first + fetch_tile) * int(gridDim.x)) * kPerTile + line;
            const char* from = weight + size_t(output) * row_bytes + fetch_chunk * (kTileDepth * 2);
            const bool inside = fetch_chunk * kTileDepth + warp * kShare + lane % 8 * 8 < o.inputs;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int more = kGated ? i % 2 * 4 : i * 4;
                const bool valid = inside && output + more < o.outputs;
                const size_t beyond = size_t(more + (kGated ? i / 2 * o.outputs : 0)) * row_bytes;
                copy_once(to + fetch_stage * kTileBytes + i * 512, valid ? from + beyond : weight, valid, policy);
            }
            ++fetched;
            if (++fetch_stage == kStages) fetch_stage = 0;
            if (++fetch_tile == min(kTiles, mine - fetch_first)) {
                fetch_tile = 0;
                if (++fetch_chunk == chunks) {
                    fetch_chunk = 0;
                    fetch_first += kTiles;
                }
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) fetch();
    if (o.norm != nullptr)
#pragma unroll 1
        for (int i = threadIdx.x; i < o.inputs / 8; i += kFewThreads) norm[i] = static_cast<const uint4*>(o.norm)[i];
    release_successor();
    wait_for_predecessor();

    const auto* x = static_cast<const uint4*>(o.x);
    const int packets = o.inputs / 8;
    // A lane has rows lane / 4 of x, and of W rows lane / 4 and lane / 4 + 8; 8 elements of 32 in each. The tensor
    // cores take them in two steps of 4. Which elements meet in a step does not matter, as long as W and x agree.
    const int column = lane / 4, quarter = lane % 4;
    uint4 next[kOctets][kSteps];
    auto load = [&](int chunk) {
#pragma unroll
        for (int i = 0; i < kOctets; ++i)
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const int row = i * 8 + column, k = chunk * kTileDepth + warp * kShare + step * 32 + quarter * 8;
                next[i][step] = uint4{};
                if (row < o.rows && k < o.inputs) next[i][step] = x[size_t(row) * packets + k / 8];
            }
    };
    load(0);
    float scale[kOctets] = {};
    if (o.norm != nullptr) {
        // All warps share each row: the time until its norm is known is lost to the products.
#pragma unroll
        for (int first = 0; first < kColumns; first += 8) {
            float square[8] = {};
#pragma unroll 2
            for (int i = threadIdx.x; i < packets; i += kFewThreads)
#pragma unroll
                for (int row = 0; row < 8; ++row) {
                    if (first + row >= o.rows) continue;
                    const uint4 packet = x[size_t(first + row) * packets + i];
                    square[row] = dot<T>(packet, packet, square[row]);
                }
#pragma unroll
            for (int row = 0; row < 8; ++row) {
                if (first + row >= o.rows) continue;
                square[row] = warp_sum(square[row]);
                if (lane == 0) squares[first + row][warp] = square[row];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kOctets; ++i)
            if (i * 8 + column < o.rows) scale[i] = rsqrtf(total_of(squares[i * 8 + column]) / float(o.inputs) + o.eps);
    }
    int stage = 0;
    const char* const w = ring + column * 128;
#pragma unroll 1
    for (int first = 0; first < mine; first += kTiles) {
        const int count = min(kTiles, mine - first);
        auto output_of = [&](int tile) { return (int(blockIdx.x) + (first + tile) * int(gridDim.x)) * kPerTile; };
        // The results that a thread will write.
        constexpr int kResults = (kTiles * kPerTile * kColumns + kFewThreads - 1) / kFewThreads;
        auto tile_of = [&](int i) { return (int(threadIdx.x) + i * kFewThreads) / (kPerTile * kColumns); };
        auto row_of = [&](int i) { return (int(threadIdx.x) + i * kFewThreads) / kPerTile % kColumns; };
        const int within = threadIdx.x % kPerTile;
        float added[kResults] = {};
        if (!kGated && o.residual != nullptr) {
#pragma unroll
            for (int i = 0; i < kResults; ++i) {
                const int output = output_of(tile_of(i)) + within;
                if (tile_of(i) < count && output < o.outputs && row_of(i) < o.rows)
                    added[i] = float(static_cast<const T*>(o.residual)[size_t(row_of(i)) * o.outputs + output]);
            }
        }
        float c[kTiles][kOctets][4] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
            uint4 b[kOctets][kSteps];
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                uint4 factors = {};
                if (o.norm != nullptr)
                    factors =
                        norm[min((chunk * kTileDepth + warp * kShare) / 8 + step * 4 + quarter, o.inputs / 8 - 1)];
#pragma unroll
                for (int i = 0; i < kOctets; ++i) {
                    b[i][step] = next[i][step];
                    if (o.norm != nullptr) b[i][step] = normed<T>(b[i][step], factors, scale[i]);
                }
            }
            if (chunk + 1 < chunks)
                load(chunk + 1);
            else if (first + kTiles < mine)
                load(0);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                if (tile >= count) continue;
                asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
                __syncwarp();
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    const char* at = w + stage * kTileBytes + ((step * 4 + quarter) ^ (column % 2 * 4)) * 16;
                    const uint4 top = *reinterpret_cast<const uint4*>(at);
                    const uint4 bottom = *reinterpret_cast<const uint4*>(at + 8 * 128);
                    const unsigned low[4] = {top.x, bottom.x, top.y, bottom.y};
                    const unsigned high[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
                    for (int i = 0; i < kOctets; ++i) {
                        multiply_accumulate<T>(c[tile][i], low, &b[i][step].x);
                        multiply_accumulate<T>(c[tile][i], high, &b[i][step].z);
                    }
                }
                __syncwarp();
                fetch();
                if (++stage == kStages) stage = 0;
            }
        }
        __syncthreads();  // the sums of the pass before have been read
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < kOctets; ++i)
#pragma unroll
                for (int lower = 0; lower < 2; ++lower) {
                    const int row = column + 8 * lower, at = ((warp * kTiles + tile) * kTileRows + row) * kColumns;
                    *reinterpret_cast<float2*>(sums + at + i * 8 + quarter * 2) =
                        float2{c[tile][i][2 * lower], c[tile][i][2 * lower + 1]};
                }
        __syncthreads();
        const auto* bias = static_cast<const T*>(o.bias);
#pragma unroll
        for (int i = 0; i < kResults; ++i) {
            const int tile = tile_of(i), row = row_of(i), output = output_of(tile) + within;
            if (tile >= count || output >= o.outputs || row >= o.rows) continue;
            float y[2] = {};
#pragma unroll
            for (int part = 0; part < (kGated ? 2 : 1); ++part) {
#pragma unroll
                for (int of = 0; of < kFewWarps; ++of)
                    y[part] += sums[((of * kTiles + tile) * kTileRows + part * 8 + within) * kColumns + row];
                if (bias != nullptr) y[part] += float(bias[part * o.outputs + output]);
            }
            const size_t at = size_t(row) * o.outputs + output;
            if constexpr (kGated)
                static_cast<T*>(o.out)[at] = gated(T(y[0]), T(y[1]), o.gating);
            else
                write<T>(o, at, y[0], added[i]);
        }
    }
#endif
}

constexpr int kDepth = 64;  // of a tile along `inputs`: rows of 128 bytes, with swizzled packets

// A tile of kW rows of W times kX rows of x. kAcrossW * kAcrossX warps share the tile, and kAcrossK such groups share
// the depth of each step: with few rows of x a single group would wait for itself.
template <typename T, int kW, int kX, int kAcrossW, int kAcrossX, int kAcrossK, int kBuffers>
__global__ void __launch_bounds__(32 * kAcrossW * kAcrossX * kAcrossK) product_kernel(Operands o) {
    constexpr int kPart = 32 * kAcrossW * kAcrossX * kAcrossK, kMine = kW / kAcrossW / 16,
                  kPairs = (kX / kAcrossX + 15) / 16;
    constexpr int kTiles = kX / kAcrossX / 8, kBufferBytes = (kW + kX) * kDepth * 2;
    extern __shared__ __align__(128) char memory[];
    const unsigned base = shared_address(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % (kAcrossW * kAcrossX);
    const int slice = threadIdx.x / (32 * kAcrossW * kAcrossX);
    const int warp_w = warp / kAcrossX * (kW / kAcrossW), warp_x = warp % kAcrossX * (kX / kAcrossX);
    const int first_w = blockIdx.x * kW, first_x = blockIdx.y * kX, steps = (o.inputs + kDepth - 1) / kDepth;
    release_successor();
    wait_for_predecessor();

    auto fetch = [&](int step) {
        if (step < steps) {
            const unsigned to = base + step % kBuffers * kBufferBytes;
            for (int i = threadIdx.x; i < (kW + kX) * 8; i += kPart) {
                const int row = i / 8, packet = i % 8, k = step * kDepth + packet * 8;
                const bool weight = row < kW;
                const int at = weight ? first_w + row : first_x + row - kW;
                const bool valid = k < o.inputs && at < (weight ? o.outputs : o.rows);
                const T* from = static_cast<const T*>(weight ? o.weight : o.x);
                copy_async(to + row * 128 + ((packet ^ (row % 8)) * 16),
                           valid ? from + size_t(at) * o.inputs + k : from, valid);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    float c[kMine][kTiles][4] = {};
    for (int step = 0; step < kBuffers - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(kBuffers - 2) : "memory");
        __syncthreads();
        fetch(step + kBuffers - 1);
        const unsigned w = base + step % kBuffers * kBufferBytes, x = w + kW * 128;
#pragma unroll
        for (int part = 0; part < kDepth / 16 / kAcrossK; ++part) {
            const int k = part * kAcrossK + slice;
            unsigned a[kMine][4], b[kPairs][4];
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
                const int row = warp_w + i * 16 + lane % 16, packet = k * 2 + lane / 16;
                load_matrices(a[i], w + row * 128 + ((packet ^ (row % 8)) * 16));
            }
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                // With only 8 columns, the second pair of matrices repeats the first.
                const int row = warp_x + (kTiles > 1 ? j * 16 + lane / 16 * 8 : 0) + lane % 8,
                          packet = k * 2 + lane / 8 % 2;
                load_matrices(b[j], x + row * 128 + ((packet ^ (row % 8)) * 16));
            }
#pragma unroll
            for (int i = 0; i < kMine; ++i)
#pragma unroll
                for (int j = 0; j < kTiles; ++j) multiply_accumulate<T>(c[i][j], a[i], b[j / 2] + j % 2 * 2);
        }
    }

    if constexpr (kAcrossK > 1) {
        constexpr int kValues = kMine * kTiles * 4;
        static_assert((kAcrossK - 1) * kAcrossW * kAcrossX * 32 * kValues * 4 <= kBuffers * kBufferBytes,
                      "the sums fit");
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
        auto* sums = reinterpret_cast<float*>(memory);
        auto sum = [&](int from, int value) -> float& {
            return sums[((from - 1) * kValues + value) * (32 * kAcrossW * kAcrossX) + warp * 32 + lane];
        };
#pragma unroll
        for (int v = 0; v < kValues; ++v)
            if (slice > 0) sum(slice, v) = c[v / (kTiles * 4)][v / 4 % kTiles][v % 4];
        __syncthreads();
        if (slice > 0) return;
#pragma unroll
        for (int v = 0; v < kValues; ++v)
            for (int from = 1; from < kAcrossK; ++from) c[v / (kTiles * 4)][v / 4 % kTiles][v % 4] += sum(from, v);
    }
    const auto *bias = static_cast<const T*>(o.bias), *residual = static_cast<const T*>(o.residual);
#pragma unroll
    for (int i = 0; i < kMine; ++i)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int output = first_w + warp_w + i * 16 + lane / 4 + e / 2 * 8;
                const int row = first_x + warp_x + j * 8 + lane % 4 * 2 + e % 2;
                if (output >= o.outputs || row >= o.rows) continue;
                const size_t at = size_t(row) * o.outputs + output;
                float y = c[i][j][e];
                if (bias != nullptr) y += float(bias[output]);
                write<T>(o, at, y, residual != nullptr ? float(residual[at]) : 0);
            }
}

constexpr int kPlainWarps = 12, kPlainThreads = 32 * kPlainWarps;

// Everything else. A warp computes one output for up to kRows rows of x. Packets are 16 bytes, or one element where
// rows are not aligned to 16 bytes.
template <typename T, bool kGated, bool kAligned, int kRows>
__global__ void __launch_bounds__(kPlainThreads) plain_kernel(Operands o) {
    constexpr int kHalves = kGated ? 2 : 1, kWidth = kAligned ? 16 / int(sizeof(T)) : 1, kUnroll = kRows == 1 ? 4 : 1;
    const int lane = threadIdx.x % 32, row = blockIdx.x * kPlainWarps + threadIdx.x / 32, first = blockIdx.y * kRows;
    release_successor();
    wait_for_predecessor();
    if (row >= o.outputs) return;
    const int rows = min(kRows, o.rows - first), packets = o.inputs / kWidth;
    const auto *weight = static_cast<const T*>(o.weight), *x = static_cast<const T*>(o.x) + size_t(first) * o.inputs;
    float sum[kHalves][kRows] = {};
    auto at = [&](const T* p, int i) {
        if constexpr (kAligned)
            return __ldg(reinterpret_cast<const uint4*>(p) + i);
        else
            return float(p[i]);
    };
    auto multiply = [](auto w, auto v, float s) {
        if constexpr (kAligned)
            return dot<T>(w, v, s);
        else
            return fmaf(w, v, s);
    };
    using Packet = decltype(at(weight, 0));
    for (int i = lane; i < packets; i += 32 * kUnroll) {
        Packet w[kHalves][kUnroll];
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
                if (i + 32 * u < packets)
                    w[half][u] = at(weight + (size_t(half) * o.outputs + row) * o.inputs, i + 32 * u);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
            for (int n = 0; n < kRows; ++n) {
                if (n >= rows || i + 32 * u >= packets) continue;
                const Packet v = at(x + size_t(n) * o.inputs, i + 32 * u);
#pragma unroll
                for (int half = 0; half < kHalves; ++half) sum[half][n] = multiply(w[half][u], v, sum[half][n]);
            }
    }
    const auto *bias = static_cast<const T*>(o.bias), *residual = static_cast<const T*>(o.residual);
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
        float y[kHalves];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            y[half] = warp_sum(sum[half][n]);
            if (bias != nullptr) y[half] += float(bias[half * o.outputs + row]);
        }
        if (lane != 0 || n >= rows) continue;
        const size_t to = size_t(first + n) * o.outputs + row;
        if constexpr (kGated)
            static_cast<T*>(o.out)[to] = gated(T(y[0]), T(y[kHalves - 1]), o.gating);
        else
            write<T>(o, to, y[0], residual != nullptr ? float(residual[to]) : 0);
    }
}

// Launching

// The stages for which a block has shared memory whatever the rows, 0 for none.
int stages_of(int inputs, bool norm, const Device& device) {
    for (const int stages : {kManyStages, kFewStages})
        if (few_bytes(kFewRows, stages, inputs, norm) + 1024 <= size_t(device.shared_bytes)) return stages;
    return 0;
}

template <typename T, bool kGated, int kColumns, int kStages>
int few_rows(const Operands& o, const Device& device, cudaStream_t st) {
    constexpr int kPerTile = kGated ? 8 : 16;
    const int blocks = std::min(device.processors, (o.outputs + kPerTile - 1) / kPerTile);
    const size_t bytes = few_bytes(kColumns, kStages, o.inputs, o.norm != nullptr);
    return launch(few_rows_kernel<T, kGated, kColumns, kStages>, {dim3(blocks), kFewThreads, st, true, bytes}, o);
}

template <typename T, bool kGated, int kColumns>
int few_rows(const Operands& o, int stages, const Device& device, cudaStream_t st) {
    return stages == kManyStages ? few_rows<T, kGated, kColumns, kManyStages>(o, device, st)
                                 : few_rows<T, kGated, kColumns, kFewStages>(o, device, st);
}

template <typename T, bool kGated>
int few_rows(const Operands& o, int stages, const Device& device, cudaStream_t st) {
    return o.rows <= 8 ? few_rows<T, kGated, 8>(o, stages, device, st) : few_rows<T, kGated, 16>(o, stages, device, st);
}

template <typename T, int kW, int kX, int kAcrossW, int kAcrossX, int kAcrossK, int kBuffers>
int product(const Operands& o, cudaStream_t st) {
    const dim3 grid((o.outputs + kW - 1) / kW, (o.rows + kX - 1) / kX);
    return launch(product_kernel<T, kW, kX, kAcrossW, kAcrossX, kAcrossK, kBuffers>,
                  {grid, 32 * kAcrossW * kAcrossX * kAcrossK, st, true, size_t(kW + kX) * kDepth * 2 * kBuffers}, o);
}

template <typename T>
int product(const Operands& o, cudaStream_t st) {
    if (o.rows <= 8) return product<T, 32, 8, 2, 1, 4, 12>(o, st);
    if (o.rows <= 16) return product<T, 32, 16, 2, 1, 4, 10>(o, st);
    if (o.rows <= 64) return product<T, 32, 64, 2, 1, 4, 6>(o, st);
    return product<T, 128, 128, 2, 2, 1, 3>(o, st);
}

template <typename T, bool kGated, bool kAligned>
int plain(const Operands& o, cudaStream_t st) {
    const unsigned blocks = (o.outputs + kPlainWarps - 1) / kPlainWarps;
    if (o.rows == 1) return launch(plain_kernel<T, kGated, kAligned, 1>, {dim3(blocks), kPlainThreads, st}, o);
    return launch(plain_kernel<T, kGated, kAligned, 8>, {dim3(blocks, (o.rows + 7) / 8), kPlainThreads, st}, o);
}

size_t normed_bytes(const cqil_linear_shape& s) { return align(size_t(s.rows) * s.inputs * element_bytes(s.dtype)); }

// Of a product before it is gated.
size_t product_bytes(const cqil_linear_shape& s) {
    return s.gated ? align(size_t(s.rows) * 2 * s.outputs * element_bytes(s.dtype)) : 0;
}

template <typename T>
int linear(const cqil_linear_shape& s, Operands o, char* scratch, cudaStream_t st) {
    Device device;
    if (describe(&device)) return -1;
    const auto type = static_cast<cqil_dtype>(s.dtype);
    const bool aligned = s.inputs * sizeof(T) % 16 == 0;
    bool few = false;
    char* const for_library = scratch + 2 * normed_bytes(s) + product_bytes(s);
    // Neither depends on the rows. A sum is not fused: every block would compute it again, while the weights wait.
    const bool fuses = o.norm != nullptr && o.delta == nullptr && stages_of(s.inputs, true, device) > 0;
    const int stages = stages_of(s.inputs, fuses, device);
    if constexpr (!std::is_same_v<T, float>)
        if (s.rows <= kFewRows && aligned && stages > 0 && is_modern(few_rows_kernel<T, false, 8, kManyStages>, &few))
            return -1;
    if (o.norm != nullptr && !(few && fuses)) {
        void* sum = o.delta != nullptr ? scratch + normed_bytes(s) : nullptr;
        if (cqil_residual_norm(o.delta, nullptr, o.x, o.norm, sum, scratch, s.rows, s.inputs, o.eps, CQIL_NORM_ROUNDED,
                               type, st))
            return -1;
        o.x = scratch;
        o.delta = o.norm = nullptr;
        scratch += 2 * normed_bytes(s);
    }
    if (s.rows > kFewRows) {
        Operands product = o;
        if (s.gated) product.outputs *= 2;
        if (s.gated) product.out = scratch;
        if (o.sum != nullptr) product.residual = nullptr;
        const int done = library_product(product, s.dtype, for_library, st);
        if (done < 0) return -1;
        if (done && s.gated)
            return cqil_gate(scratch, o.out, s.rows, s.outputs, static_cast<cqil_gating>(o.gating), type, st);
        if (done && o.sum != nullptr) return cqil_add(o.out, o.residual, o.sum, size_t(s.rows) * s.outputs, type, st);
        if (done) return 0;
    }
    if constexpr (!std::is_same_v<T, float>) {
        if (few) return s.gated ? few_rows<T, true>(o, stages, device, st) : few_rows<T, false>(o, stages, device, st);
        if (s.rows > 1 && aligned) {
            if (!s.gated) return product<T>(o, st);
            void* out = o.out;
            o.out = scratch;
            o.outputs *= 2;
            const auto gating = static_cast<cqil_gating>(o.gating);
            return product<T>(o, st) ? -1 : cqil_gate(scratch, out, s.rows, s.outputs, gating, type, st);
        }
    }
    if (s.gated) return aligned ? plain<T, true, true>(o, st) : plain<T, true, false>(o, st);
    return aligned ? plain<T, false, true>(o, st) : plain<T, false, false>(o, st);
}

}  // namespace

extern "C" {

int cqil_linear_rows(cqil_dtype dtype) {
    bool modern = false;
    if (dtype != CQIL_FLOAT32 && is_modern(few_rows_kernel<__half, false, 8, kManyStages>, &modern)) return -1;
    return modern ? kFewRows : 1;
}

size_t cqil_linear_scratch_bytes(const cqil_linear_shape* s) {
    // Whether the library is here or not: an engine may be built elsewhere.
    const bool many = s->rows > kFewRows && s->weights == CQIL_DENSE;
    return 2 * normed_bytes(*s) + product_bytes(*s) + (many ? kLibraryScratchBytes : 0);
}

int cqil_linear(const cqil_linear_shape* s, const void* x, const void* delta, const void* weight, const void* bias,
                const void* norm, const void* residual, void* out, void* sum, void* scratch, void* stream) {
    if (s->rows < 0 || s->inputs < 1 || s->outputs < 1 || s->rows > 65535 * 8)
        return fail("%d rows of %d to %d", s->rows, s->inputs, s->outputs);
    if (delta != nullptr && norm == nullptr) return fail("delta is added for a norm, and there is none");
    if (s->gated < CQIL_UNGATED || s->gated > CQIL_GEGLU) return fail("gating %d is not known", s->gated);
    if (s->gated && (residual != nullptr || s->scale != 0)) return fail("a gated product takes no residual, no scale");
    if (sum != nullptr && residual == nullptr) return fail("a sum is with a residual, and there is none");
    if (s->rows == 0) return 0;
    const float scale = s->scale == 0 ? 1 : s->scale;
    const Operands o = {x,   delta,   weight,     bias,      norm,   residual, out,
                        sum, s->rows, s->outputs, s->inputs, s->eps, scale,    s->gated};
    auto st = static_cast<cudaStream_t>(stream);
    if (s->weights != CQIL_DENSE) return packed_linear(*s, o, scratch, st);
    auto* space = static_cast<char*>(scratch);
    return by_type(s->dtype,
                   [&](auto* type) { return linear<std::remove_pointer_t<decltype(type)>>(*s, o, space, st); });
}

}  // extern "C"
