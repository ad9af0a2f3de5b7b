// The choice of the next token by temperature, top-k and top-p, as cqil_trt/sampling.py defines it. All sums are of
// integers, so every rank chooses the same token from the same logits.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <type_traits>

#include "cqil_trt.h"
#include "errors.h"
#include "launch.cuh"
#include "types.cuh"

using namespace cqil_trt;

namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 256;
constexpr int kCopies = 8;     // of a histogram, so neighbouring lanes rarely contend
constexpr int kMassBits = 40;  // of the likeliest token's weight; 2^18 such tokens fit in 64 bits

// Unsigned integers in the same order as the values.
__device__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ uint16_t key_of_16(uint16_t bits) { return bits & 0x8000u ? uint16_t(~bits) : uint16_t(bits | 0x8000u); }
__device__ uint32_t key_of(__half x) { return key_of_16(__half_as_ushort(x)); }
__device__ uint32_t key_of(__nv_bfloat16 x) { return key_of_16(__bfloat16_as_ushort(x)); }

struct Count {
    uint32_t tokens;
    unsigned long long mass;

    __device__ Count operator+(const Count& c) const { return {tokens + c.tokens, mass + c.mass}; }
    __device__ bool reaches(unsigned long long goal, bool by_mass) const { return (by_mass ? mass : tokens) >= goal; }
};

// A prefix of the tokens sorted by falling logit, smaller ids first among equals, that is just long enough for some sum
// to reach a goal.
struct Prefix {
    uint32_t key;   // of the last token
    uint32_t ties;  // how many of its tokens have that key
    unsigned long long mass;
};

template <typename T>
struct Row {
    static constexpr int kLevels = int(sizeof(T));  // of kBins bins each
    const T* logits;
    int width;
    float top, scale;  // the largest logit; log2 e / temperature

    __device__ unsigned long long mass(T logit) const {
        const float weight = exp2f((float(logit) - top) * scale);
        return weight > 0 ? static_cast<unsigned long long>(weight * float(1ull << kMassBits)) : 0;  // NaN: 0
    }
};

struct Memory {
    Count histogram[kBins][kCopies];
    Count total[kBins];
    Count above;  // tokens with larger keys than those left
    Count level;  // the bin found
    uint32_t bin;
};

// The shortest prefix whose token count, or mass, reaches `goal` (from 1 to the total). All threads of the block call
// it.
template <typename T>
__device__ Prefix search(const Row<T>& row, unsigned long long goal, bool by_mass, Memory& m) {
    uint32_t known = 0;
    __syncthreads();
    if (threadIdx.x == 0) m.above = {};
#pragma unroll 1
    for (int level = Row<T>::kLevels - 1; level >= 0; --level) {
        for (int i = threadIdx.x; i < kBins * kCopies; i += kThreads) m.histogram[i / kCopies][i % kCopies] = {};
        __syncthreads();
        const int shift = 8 * level;
        for (int i = threadIdx.x; i < row.width; i += kThreads) {
            const uint32_t key = key_of(row.logits[i]);
            // Only keys whose upper bytes are those found at the levels before count.
            if ((uint64_t(key) >> (shift + 8)) != known) continue;
            Count& count = m.histogram[key >> shift & (kBins - 1)][threadIdx.x % kCopies];
            atomicAdd(&count.tokens, 1u);
            atomicAdd(&count.mass, row.mass(row.logits[i]));
        }
        __syncthreads();
        if (threadIdx.x < kBins) {
            Count sum = {};
            for (const Count& copy : m.histogram[threadIdx.x]) sum = sum + copy;
            m.total[threadIdx.x] = sum;
        }
        __syncthreads();
        // One warp searches for the bin from the largest down; each lane has a few neighbouring bins.
        if (threadIdx.x < 32) {
            constexpr int kMine = kBins / 32;
            const int lane = threadIdx.x, largest = kBins - 1 - lane * kMine;
            Count sum = {};
            for (int i = 0; i < kMine; ++i) sum = sum + m.total[largest - i];
            Count through = sum;  // this lane's
            for (int s = 1; s < 32; s *= 2) {
                const Count other = {__shfl_up_sync(~0u, through.tokens, s), __shfl_up_sync(~0u, through.mass, s)};
                if (lane >= s) through = through + other;
            }
            Count above = m.above + Count{through.tokens - sum.tokens, through.mass - sum.mass};
            const unsigned reached = __ballot_sync(~0u, (m.above + through).reaches(goal, by_mass)) | 1u << 31;
            __syncwarp();
            if (lane == __ffs(reached) - 1) {
                int bin = largest;
                for (; bin > largest - kMine + 1 && !(above + m.total[bin]).reaches(goal, by_mass); --bin)
                    above = above + m.total[bin];
                m.bin = bin;
                m.above = above;
                m.level = m.total[bin];
            }
        }
        __syncthreads();
        known = known << 8 | m.bin;
    }
    // All tokens of the last bin have the same weight.
    const unsigned long long each = m.level.tokens ? m.level.mass / m.level.tokens : 0;
    const unsigned long long left = goal - (by_mass ? m.above.mass : m.above.tokens);
    const unsigned long long needed = !by_mass ? left : each ? (left + each - 1) / each : 1;
    const uint32_t ties = uint32_t(min(needed, static_cast<unsigned long long>(m.level.tokens)));
    return {known, ties, m.above.mass + ties * each};
}

// Writes the id of a prefix's last token to `out`. All threads of the block call it.
template <typename T>
__device__ void last_of(const Row<T>& row, const Prefix& prefix, int32_t* out) {
    __shared__ uint32_t counts[kThreads / 32];
    const int each = (row.width + kThreads - 1) / kThreads, first = threadIdx.x * each,
              last = min(first + each, row.width);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t mine = 0;
    for (int i = first; i < last; ++i) mine += key_of(row.logits[i]) == prefix.key;
    uint32_t through = mine;
    for (int s = 1; s < 32; s *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, through, s);
        if (lane >= s) through += other;
    }
    if (lane == 31) counts[warp] = through;
    __syncthreads();
    uint32_t before = through - mine;
    for (int i = 0; i < warp; ++i) before += counts[i];
    if (before >= prefix.ties || before + mine < prefix.ties) return;
    for (int i = first; i < last; ++i)
        if (key_of(row.logits[i]) == prefix.key && ++before == prefix.ties) *out = i;
}

// One block per row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const T* logits, int width, const cqil_sampling* how, const double* uniforms, const int32_t* step,
                  int stride, int32_t* index) {
    release_successor();
    wait_for_predecessor();
    const cqil_sampling sampling = *how;
    __shared__ Memory memory;
    __shared__ float tops[kThreads / 32];
    __shared__ unsigned long long masses[kThreads / 32];
    Row<T> row = {logits + size_t(blockIdx.x) * width, width, -INFINITY,
                  fminf(1.4426950408889634f / sampling.temperature, FLT_MAX)};  // infinity times zero is NaN
    for (int i = threadIdx.x; i < width; i += kThreads) row.top = fmaxf(row.top, float(row.logits[i]));
    for (int s = 16; s > 0; s /= 2) row.top = fmaxf(row.top, __shfl_xor_sync(~0u, row.top, s));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = row.top;
    __syncthreads();
    for (float top : tops) row.top = fmaxf(row.top, top);

    unsigned long long mass = 0;
    if (sampling.top_k > 0 && sampling.top_k < width) {
        mass = search(row, sampling.top_k, false, memory).mass;
    } else {
        for (int i = threadIdx.x; i < width; i += kThreads) mass += row.mass(row.logits[i]);
        for (int s = 16; s > 0; s /= 2) mass += __shfl_xor_sync(~0u, mass, s);
        if (threadIdx.x % 32 == 0) masses[threadIdx.x / 32] = mass;
        __syncthreads();
        mass = 0;
        for (unsigned long long part : masses) mass += part;
    }
    if (sampling.top_p < 1) {
        const auto goal = static_cast<unsigned long long>(ceil(double(sampling.top_p) * double(mass)));
        mass = search(row, min(max(goal, 1ull), max(mass, 1ull)), true, memory).mass;
    }
    const double uniform = uniforms[size_t(*step) * stride + blockIdx.x];
    const auto goal = static_cast<unsigned long long>(uniform * double(mass)) + 1;
    if (threadIdx.x == 0) index[blockIdx.x] = 0;  // if logits are NaN
    const Prefix found = search(row, min(goal, max(mass, 1ull)), true, memory);
    last_of(row, found, index + blockIdx.x);
}

template <typename T>
__global__ void spread_kernel(const T* part, T* out, int width, int first, int all) {
    release_successor();
    wait_for_predecessor();
    const int j = blockIdx.y * blockDim.x + threadIdx.x;
    if (j >= all) return;
    const bool mine = j >= first && j - first < width;
    out[size_t(blockIdx.x) * all + j] = mine ? part[size_t(blockIdx.x) * width + (j - first)] : T(0.0f);
}

}  // namespace

extern "C" {

int cqil_sample(const void* logits, int rows, int width, cqil_dtype dtype, const cqil_sampling* sampling,
                const double* uniforms, const int32_t* step, int stride, int32_t* index, void* stream) {
    if (rows < 0 || width < 1 || stride < rows) return fail("%d rows of %d, of %d", rows, width, stride);
    if (rows == 0) return 0;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch(sample_kernel<T>, {dim3(rows), kThreads, static_cast<cudaStream_t>(stream)},
                      static_cast<const T*>(logits), width, sampling, uniforms, step, stride, index);
    });
}

int cqil_spread(const void* part, void* out, int rows, int width, int first, int all, cqil_dtype dtype, void* stream) {
    if (rows < 0 || width < 0 || first < 0 || first + width > all)
        return fail("%d rows: %d columns from %d are not among %d", rows, width, first, all);
    if (rows == 0) return 0;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch(spread_kernel<T>, {dim3(rows, (all + 255) / 256), 256, static_cast<cudaStream_t>(stream)},
                      static_cast<const T*>(part), static_cast<T*>(out), width, first, all);
    });
}

}  // extern "C"
