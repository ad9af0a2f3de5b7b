// The choice of the next token: adjusted logits, temperature, top-k, top-p and min_p, and log-probabilities. A choice
// needs only sums of integers, so every rank chooses the same token from the same logits.

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
constexpr int kWarps = kThreads / 32;
constexpr int kAhead = 8;  // loads in flight in each thread
constexpr int kBins = 256;
constexpr int kCopies = 8;     // of a histogram, so neighbouring lanes rarely contend
constexpr int kMassBits = 40;  // of the likeliest token's weight; 2^18 such tokens fit in 64 bits
constexpr int kPartBits = 14;  // of a mass, for atomic additions of 32 bits; a copy's sums of 2^18 parts fit
constexpr int kMaxRanked = 256;
constexpr int kAdjustThreads = 256;
constexpr int kAdjustEach = 4;  // elements of each thread
constexpr float kLog2e = 1.4426950408889634f;

using Mass = unsigned long long;

// Integers in the same order as the values; both zeros are one, and NaN is the smallest.
__device__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return isnan(x) ? 0 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A token's place among others, the likeliest being the largest.
__device__ uint64_t place_of(float logit, int id) { return uint64_t(key_of(logit)) << 32 | ~uint32_t(id); }
__device__ int id_at(uint64_t place) { return int(~uint32_t(place)); }

struct Count {
    uint32_t tokens;
    Mass mass;

    __device__ Count operator+(const Count& c) const { return {tokens + c.tokens, mass + c.mass}; }
    __device__ bool reaches(Mass goal, bool by_mass) const { return (by_mass ? mass : tokens) >= goal; }
};

// A count to which threads add at once. Shared memory has no atomic addition of 64 bits: a loop would stand in for it.
struct Tally {
    uint32_t tokens, parts[3];

    static_assert(3 * kPartBits > kMassBits, "a mass of 2^kMassBits has one more bit");

    __device__ void add(Mass mass) {
        atomicAdd(&parts[0], uint32_t(mass) & ((1u << kPartBits) - 1));
        atomicAdd(&parts[1], uint32_t(mass >> kPartBits) & ((1u << kPartBits) - 1));
        atomicAdd(&parts[2], uint32_t(mass >> 2 * kPartBits));
    }
    __device__ Count count() const {
        return {tokens, parts[0] + (Mass(parts[1]) << kPartBits) + (Mass(parts[2]) << 2 * kPartBits)};
    }
};

// A prefix of the tokens sorted by falling logit, smaller ids first among equals, that is just long enough for some sum
// to reach a goal.
struct Prefix {
    uint32_t key;  // of the last token, without its lower `shift` bits
    int shift;
    uint32_t ties;  // how many of its tokens have that key
    Mass mass;
};

template <typename T>
struct Row {
    const T* logits;
    int width;
    float top, scale;  // the largest logit; log2 e / temperature

    // Calls use(id, logit) for every token; the block's threads share them, each in the order of ids.
    template <typename Use>
    __device__ void each(Use&& use) const {
#pragma unroll 1
        for (int begin = threadIdx.x; begin < width; begin += kAhead * kThreads) {
            T loaded[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) loaded[i] = logits[min(begin + i * kThreads, width - 1)];
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                if (begin + i * kThreads < width) use(begin + i * kThreads, float(loaded[i]));
        }
    }

    // Of the weight, to base 2. Infinity less infinity would be NaN.
    __device__ float exponent(float logit) const { return logit == top ? 0 : (logit - top) * scale; }

    __device__ Mass mass(float logit) const {
        const float weight = exp2f(exponent(logit));
        return weight > 0 ? static_cast<Mass>(weight * float(1ull << kMassBits)) : 0;  // NaN: 0
    }
};

// The sum over the block's threads, in a fixed order. All of them call it.
template <typename V>
__device__ V block_sum(V x) {
    __shared__ V parts[kWarps];
    for (int s = 16; s > 0; s /= 2) x += __shfl_xor_sync(~0u, x, s);
    __syncthreads();  // the parts of an earlier call have been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (const V& part : parts) x += part;
    return x;
}

// The place of the likeliest token. All threads of the block call it, once.
template <typename T>
__device__ uint64_t first_of(const Row<T>& row) {
    __shared__ uint64_t firsts[kWarps];
    uint64_t first = 0;
    row.each([&](int id, float logit) { first = max(first, place_of(logit, id)); });
    for (int s = 16; s > 0; s /= 2) first = max(first, __shfl_xor_sync(~0u, first, s));
    if (threadIdx.x % 32 == 0) firsts[threadIdx.x / 32] = first;
    __syncthreads();
    for (const uint64_t& other : firsts) first = max(first, other);
    return first;
}

struct Memory {
    Tally histogram[kBins][kCopies];
    Count total[kBins];
    Count above;  // tokens with larger keys than those left
    Count level;  // the bin found
    uint32_t bin;
};

// The shortest prefix whose token count, or mass, reaches `goal` (from 1 to the total). All threads of the block call
// it. Unless `weighed`, masses are not added up, and the prefix has none.
template <typename T>
__device__ Prefix search(const Row<T>& row, Mass goal, bool by_mass, Memory& m, bool weighed = true) {
    uint32_t known = 0;
    int shift = 32;
    __syncthreads();
    if (threadIdx.x == 0) m.above = {};
#pragma unroll 1
    do {
        shift -= 8;
        for (int i = threadIdx.x; i < kBins * kCopies; i += kThreads) m.histogram[i / kCopies][i % kCopies] = {};
        __syncthreads();
        row.each([&](int, float logit) {
            const uint32_t key = key_of(logit);
            // Only keys whose upper bytes are those found at the levels before count.
            if ((uint64_t(key) >> (shift + 8)) != known) return;
            Tally& tally = m.histogram[key >> shift & (kBins - 1)][threadIdx.x % kCopies];
            atomicAdd(&tally.tokens, 1u);
            if (weighed) tally.add(row.mass(logit));
        });
        __syncthreads();
        if (threadIdx.x < kBins) {
            Count sum = {};
            for (const Tally& copy : m.histogram[threadIdx.x]) sum = sum + copy.count();
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
    } while (shift > 0 && m.level.tokens > 1);  // a bin of one token needs no more of its key
    // All tokens of the last bin have the same weight.
    const Mass each = m.level.tokens ? m.level.mass / m.level.tokens : 0;
    const Mass left = goal - (by_mass ? m.above.mass : m.above.tokens);
    const Mass needed = !by_mass ? left : each ? (left + each - 1) / each : 1;
    const uint32_t ties = uint32_t(min(needed, static_cast<Mass>(m.level.tokens)));
    return {known, shift, ties, m.above.mass + ties * each};
}

// Writes the id of a prefix's last token to `out`. All threads of the block call it.
template <typename T>
__device__ void last_of(const Row<T>& row, const Prefix& prefix, int32_t* out) {
    __shared__ uint32_t counts[kWarps];
    // Each warp has a part of the row, so their order is that of ids.
    const int part = (row.width + kThreads - 1) / kThreads * 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * part,
              last = min(first + part, row.width);
    auto tied = [&](int i) { return key_of(float(row.logits[i])) >> prefix.shift == prefix.key; };
    uint32_t mine = 0;
#pragma unroll 8
    for (int i = first + lane; i < last; i += 32) mine += tied(i);
    for (int s = 16; s > 0; s /= 2) mine += __shfl_xor_sync(~0u, mine, s);
    if (lane == 0) counts[warp] = mine;
    __syncthreads();
    uint32_t before = 0;
    for (int i = 0; i < warp; ++i) before += counts[i];
    if (before >= prefix.ties || before + mine < prefix.ties) return;
#pragma unroll 1
    for (int begin = first; before < prefix.ties; begin += 32) {
        const int i = begin + lane;
        const bool hit = i < last && tied(i);
        const unsigned hits = __ballot_sync(~0u, hit);
        if (hit && before + __popc(hits & ((2u << lane) - 1)) == prefix.ties) *out = i;
        before += __popc(hits);
    }
}

// Grid: rows, parts of a row.
template <typename T>
__global__ void __launch_bounds__(kAdjustThreads)
    adjust_kernel(const T* logits, int width, const cqil_sampling* settings, const int32_t* slots,
                  const uint32_t* counts, const float* bias, const uint32_t* mask, float* out) {
    release_successor();
    wait_for_predecessor();
    const size_t slot = slots[blockIdx.x];
    const cqil_sampling how = settings[slot];
    const bool penalised = how.repetition_penalty != 1 || how.presence_penalty != 0 || how.frequency_penalty != 0;
    const size_t row = size_t(blockIdx.x) * width, state = slot * width, words = slot * ((width + 31) / 32);
    const int first = blockIdx.y * (kAdjustThreads * kAdjustEach) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kAdjustEach; ++i) {
        const int j = first + i * kAdjustThreads;
        if (j >= width) return;
        float x = float(logits[row + j]);
        if (how.biased) x += bias[state + j];
        if (penalised) {
            const uint32_t count = counts[state + j], generated = count & 0x7fffffffu;
            if (count != 0 && how.repetition_penalty != 1)
                x = x > 0 ? x / how.repetition_penalty : x * how.repetition_penalty;
            x -= how.frequency_penalty * float(generated);
            if (generated > 0) x -= how.presence_penalty;
        }
        if (how.masked && !(mask[words + j / 32] >> j % 32 & 1)) x = -INFINITY;
        out[row + j] = x;
    }
}

// One block per row.
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const float* logits, int width, const cqil_sampling* settings, const int32_t* slots,
                  const double* uniforms, int stride, const int32_t* past, int32_t* index) {
    release_successor();
    wait_for_predecessor();
    const int slot = slots[blockIdx.x];
    const cqil_sampling how = settings[slot];
    __shared__ Memory memory;
    Row<float> row = {logits + size_t(blockIdx.x) * width, width, 0, 0};
    const uint64_t first = first_of(row);
    const bool nothing = first >> 32 <= key_of(-INFINITY);
    if (how.temperature == 0 || nothing) {
        if (threadIdx.x == 0) index[blockIdx.x] = nothing ? 0 : id_at(first);
        return;
    }
    row.top = row.logits[id_at(first)];
    row.scale = fminf(kLog2e / how.temperature, FLT_MAX);  // infinity times zero is NaN

    // Every set of tokens that is kept is a prefix of the same order: the smallest mass is that of what all keep. Each
    // holds the likeliest token, so none is 0.
    const float least = how.min_p > 0 ? fminf(log2f(how.min_p), 0) : -INFINITY;
    Mass mass = 0, likely = 0;
    row.each([&](int, float logit) {
        const Mass weight = row.mass(logit);
        mass += weight;
        if (row.exponent(logit) >= least) likely += weight;
    });
    mass = block_sum(mass);
    likely = block_sum(likely);
    if (how.top_k > 0 && how.top_k < width) mass = search(row, how.top_k, false, memory).mass;
    if (how.top_p < 1) {
        const auto goal = static_cast<Mass>(ceil(double(how.top_p) * double(mass)));
        mass = search(row, min(max(goal, Mass(1)), mass), true, memory).mass;
    }
    mass = min(mass, likely);
    const double uniform = uniforms[size_t(slot) * stride + past[blockIdx.x]];
    const Mass goal = static_cast<Mass>(uniform * double(mass)) + 1;
    last_of(row, search(row, min(goal, mass), true, memory), index + blockIdx.x);
}

// One block per row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    logprobs_kernel(const T* logits, int width, const cqil_sampling* settings, const int32_t* slots,
                    const int32_t* chosen, int limit, int32_t* ids, float* values) {
    release_successor();
    wait_for_predecessor();
    const int wanted = settings[slots[blockIdx.x]].logprobs;
    if (wanted < 0) return;
    Row<T> row = {logits + size_t(blockIdx.x) * width, width, 0, kLog2e};
    row.top = float(row.logits[id_at(first_of(row))]);
    float sum = 0;
    row.each([&](int, float logit) { sum += expf(logit - row.top); });
    const float whole = logf(block_sum(sum));
    ids += size_t(blockIdx.x) * (limit + 1);
    values += size_t(blockIdx.x) * (limit + 1);
    auto report = [&](int at, int id) {
        ids[at] = id;
        values[at] = float(row.logits[id]) - row.top - whole;
    };
    if (threadIdx.x == 0) report(0, chosen[blockIdx.x]);
    const int count = min(min(wanted, limit), width);
    if (count == 0) return;

    // Collects the prefix of `count` tokens in any order, then sorts it.
    __shared__ Memory memory;
    __shared__ uint64_t places[kMaxRanked];
    __shared__ int32_t last;
    __shared__ int found;
    if (threadIdx.x == 0) found = 0;
    const Prefix prefix = search(row, count, false, memory, false);
    last_of(row, prefix, &last);
    __syncthreads();
    row.each([&](int id, float logit) {
        const uint32_t key = key_of(logit) >> prefix.shift;
        if (key > prefix.key || (key == prefix.key && id <= last)) places[atomicAdd(&found, 1)] = place_of(logit, id);
    });
    __syncthreads();
    if (int(threadIdx.x) >= count) return;
    const uint64_t mine = places[threadIdx.x];
    int before = 0;
    for (int i = 0; i < count; ++i) before += places[i] > mine;
    report(1 + before, id_at(mine));
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

int cqil_adjust(const void* logits, int rows, int width, cqil_dtype dtype, const cqil_sampling* settings,
                const int32_t* slots, const uint32_t* counts, const float* bias, const uint32_t* mask, float* out,
                void* stream) {
    if (rows < 0 || width < 1) return fail("%d rows of %d", rows, width);
    if (rows == 0) return 0;
    constexpr int kPart = kAdjustThreads * kAdjustEach;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const dim3 grid(rows, (width + kPart - 1) / kPart);
        return launch(adjust_kernel<T>, {grid, kAdjustThreads, static_cast<cudaStream_t>(stream)},
                      static_cast<const T*>(logits), width, settings, slots, counts, bias, mask, out);
    });
}

int cqil_sample(const float* logits, int rows, int width, const cqil_sampling* settings, const int32_t* slots,
                const double* uniforms, int stride, const int32_t* past, int32_t* index, void* stream) {
    if (rows < 0 || width < 1 || stride < 1) return fail("%d rows of %d, of %d", rows, width, stride);
    if (rows == 0) return 0;
    return launch(sample_kernel, {dim3(rows), kThreads, static_cast<cudaStream_t>(stream)}, logits, width, settings,
                  slots, uniforms, stride, past, index);
}

int cqil_logprobs(const void* logits, int rows, int width, cqil_dtype dtype, const cqil_sampling* settings,
                  const int32_t* slots, const int32_t* chosen, int limit, int32_t* ids, float* values, void* stream) {
    if (rows < 0 || width < 1) return fail("%d rows of %d", rows, width);
    if (limit < 0 || limit > kMaxRanked) return fail("%d log-probabilities are not from 0 to %d", limit, kMaxRanked);
    if (rows == 0) return 0;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch(logprobs_kernel<T>, {dim3(rows), kThreads, static_cast<cudaStream_t>(stream)},
                      static_cast<const T*>(logits), width, settings, slots, chosen, limit, ids, values);
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
