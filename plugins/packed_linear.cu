// Matrix products with quantized weights, for few rows: bound by reading the weights, as those of linear.cu are.
//
// Weights are packed once, when an engine is loaded, in the order in which the tensor cores take them. A tile of 16
// rows (if gated, 8 of gate and 8 of up) consists of units of 128 columns. A unit is contiguous: its codes, then with 4
// bits the scales of its groups and their zero points, so that one bulk copy brings all of it. A lane's scales are next
// to each other, those of row lane / 4 and of row lane / 4 + 8 for each group, and so are its zero points. With 8 bits
// the scales of rows follow the last unit.
//
// The order in which a result is summed depends neither on the number of rows nor on what is in the others. It is the
// same for one row and for many: more rows than a kernel takes are several products.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
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

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColumns = 8;    // rows of x that a team of kWarps warps multiplies
constexpr int kMostTeams = 2;  // of a block; they share the weights
constexpr int kTileRows = 16, kUnit = 128;
constexpr int kMostRows = 32;  // with more, it takes less time to unpack the weights for a dense product

// Bytes of a unit's codes, and of the scales and zero points of one of its groups.
__host__ __device__ constexpr int code_bytes(int weights) { return kTileRows * kUnit / (weights == CQIL_INT4 ? 2 : 1); }
constexpr int kGroupBytes = kTileRows * 3;

// `groups`: of a unit, 0 where rows have one scale.
__host__ __device__ constexpr int unit_bytes(int weights, int groups) {
    return code_bytes(weights) + groups * kGroupBytes;
}

// Shared memory: a multiprocessor has room for one block (linear.cu says why) and an attention's. x is kept in it up to
// a size. The ring takes what is left, up to so many stages. Two teams may take all of it: to read their x again in
// every pass, through L2, takes longer than the weights.
constexpr size_t kLeastBytes = 116 << 10;
constexpr size_t kMostBytes[] = {0, 180 << 10, 227 << 10}, kSharedBytes[] = {0, 65 << 10, 133 << 10};  // by teams
constexpr int kMaxTiles = 12, kMinStages = 2;
constexpr int kRowGap = 4;  // packets between rows of x, so that two rows, which are read at once, hit different banks

// A stage of the ring has one unit for each warp of a team, with 4 bits of two tiles, which a warp takes at a time. Then
// its two barriers follow: that it is full, and that it is empty.
__host__ __device__ constexpr int stage_tiles(int weights) { return weights == CQIL_INT4 ? 2 : 1; }
__host__ __device__ constexpr int max_stages(int weights) { return kMaxTiles / stage_tiles(weights); }
__host__ __device__ constexpr int stage_bytes(int weights, int groups) {
    return stage_tiles(weights) * kWarps * unit_bytes(weights, groups) + 16;
}

// A block's threads: its teams, and one warp more, which requests the weights.
__host__ __device__ constexpr int threads_of(int teams) { return teams * kThreads + 32; }

__host__ __device__ constexpr int teams_of(int rows) { return rows > kColumns ? kMostTeams : 1; }

// Rows of x that there is room for in the sums.
__host__ __device__ constexpr int padded(int rows) { return rows > 8 ? 16 : rows > 4 ? 8 : rows > 2 ? 4 : rows; }

// Tiles of a pass, which reads x once. Two teams need the room of more tiles' sums for x.
__host__ __device__ constexpr int pass_tiles(int teams) { return teams > 1 ? 2 : 6; }

// The operands of up to `most` rows from `first` on.
template <typename T>
__host__ __device__ Operands rows_of(const Operands& o, int first, int most) {
    auto at = [&](const void* rows, int width) {
        return rows == nullptr ? nullptr : static_cast<const T*>(rows) + size_t(first) * width;
    };
    Operands part = o;
    part.rows = o.rows - first < most ? o.rows - first : most;
    part.x = at(o.x, o.inputs), part.delta = at(o.delta, o.inputs), part.residual = at(o.residual, o.outputs);
    part.out = const_cast<T*>(at(o.out, o.outputs)), part.sum = const_cast<T*>(at(o.sum, o.outputs));
    return part;
}

int units_of(int inputs) { return (inputs + kUnit - 1) / kUnit; }

int tiles_of(int outputs, bool gated) { return gated ? (outputs + 7) / 8 : (outputs + 15) / 16; }

// Where in a word of 8 codes of 4 bits the first code of pair i is; the second is 4 places higher. So the pairs that a
// mask takes out as multiples of 1 and of 16 belong to different products.
__host__ __device__ constexpr int place_of(int pair) { return pair == 1 ? 2 : pair == 2 ? 1 : pair; }

// A tensor core takes a code of 4 bits as a number of half precision where a mask leaves it. In halves that is a
// subnormal number: a multiple of 2^-24 at even places, of 2^-20 at odd ones. In bfloat16 it is the upper part of a
// mantissa, 16 + code, for which a word is rotated by kRotated; zero points are stored with 16 added, too.
template <typename T>
constexpr bool kSubnormal = std::is_same_v<T, __half>;
template <typename T>
constexpr int kRotated = kSubnormal<T> ? 0 : 3;
template <typename T>
constexpr int kCodeOffset = kSubnormal<T> ? 0 : 16;

__host__ __device__ constexpr unsigned rotated(unsigned word, int left) {
    return left == 0 ? word : word << left | word >> (32 - left);
}

// Where the scale of a row of a tile in a group of a unit is, and likewise its zero point.
__host__ __device__ constexpr int scale_at(int row, int group, int groups) {
    return (row % 8 * groups + group) * 2 + row / 8;
}

#if __CUDA_ARCH__ >= 900
// What is at an address of shared memory.
template <typename T>
__device__ T* shared_at(unsigned address) {
    return static_cast<T*>(__cvta_shared_to_generic(address));
}

template <typename T>
__device__ unsigned word_of(__half2 pair) {
    if constexpr (std::is_same_v<T, __half>) return *reinterpret_cast<unsigned*>(&pair);
    const float2 wide = __half22float2(pair);
    __nv_bfloat162 narrow = __floats2bfloat162_rn(wide.x, wide.y);
    return *reinterpret_cast<unsigned*>(&narrow);
}

// Two codes of 8 bits, which half types hold exactly. `upper`: the upper two bytes of a word.
template <typename T, int kWeights>
__device__ unsigned pair_of(unsigned word, bool upper) {
    if constexpr (kWeights == CQIL_FP8) {
        const auto two = static_cast<__nv_fp8x2_storage_t>(upper ? word >> 16 : word & 0xffff);
        return word_of<T>(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
    } else {
        // 1024 + 128 + code, in the lower bits of a half.
        unsigned biased = __byte_perm(word ^ 0x80808080u, 0x64646464u, upper ? 0x4342 : 0x4140);
        return word_of<T>(__hsub2(*reinterpret_cast<__half2*>(&biased), __half2half2(__half(1152))));
    }
}

// Two codes of 4 bits at a place of a word, and at the place 4 higher.
template <typename T>
__device__ unsigned pair_at(unsigned word, int place) {
    if constexpr (kSubnormal<T>) return (place < 2 ? word : word >> 8) & (place % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
    // One instruction; the compiler makes it two.
    unsigned pair;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;"
        : "=r"(pair)
        : "r"(rotated(word, (32 - 4 * place) % 32)), "n"(0x00780078), "r"(0x41804180));
    return pair;
}

// The scales and zero points of a lane's two rows, in the groups of a unit.
template <typename T, int kGroups>
struct Scales {
    struct __align__(4 * kGroups) {
        unsigned of_group[kGroups];
    } scales;
    struct __align__(2 * kGroups) {
        unsigned short of_group[kGroups];
    } zeros;

    // `at`: where those of a unit are in shared memory.
    __device__ void read(unsigned at, int column) {
        scales = shared_at<decltype(scales)>(at)[column];
        zeros = shared_at<decltype(zeros)>(at + kGroups * kTileRows * 2)[column];
    }

    __device__ float2 scale(int group) const {
        return Pair<T>::wide(reinterpret_cast<const typename Pair<T>::Type&>(scales.of_group[group]));
    }

    // In the unit of codes: as halves, subnormal numbers.
    __device__ float2 zero(int group) const {
        const unsigned two = zeros.of_group[group];
        if constexpr (!kSubnormal<T>) return {float(two & 255), float(two >> 8)};
        const unsigned halves = __byte_perm(two, 0, 0x4140);
        return __half22float2(reinterpret_cast<const __half2&>(halves));
    }
};

// The left operands of two products: columns 0 to 3 and 4 to 7 of those 8 of a step that a lane has, of two rows. A
// packet has the codes of 4 bits of two steps.
template <typename T>
__device__ void decode4(const uint4& packet, bool second, unsigned (&low)[4], unsigned (&high)[4]) {
    const unsigned top = second ? packet.z : packet.x, bottom = second ? packet.w : packet.y;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        low[2 * i] = pair_at<T>(top, place_of(i)), low[2 * i + 1] = pair_at<T>(bottom, place_of(i));
        high[2 * i] = pair_at<T>(top, place_of(2 + i)), high[2 * i + 1] = pair_at<T>(bottom, place_of(2 + i));
    }
}

// The same, of a packet with the codes of 8 bits of a step.
template <typename T, int kWeights>
__device__ void decode8(const uint4& packet, unsigned (&low)[4], unsigned (&high)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        low[2 * i] = pair_of<T, kWeights>(packet.x, i == 1), low[2 * i + 1] = pair_of<T, kWeights>(packet.z, i == 1);
        high[2 * i] = pair_of<T, kWeights>(packet.y, i == 1), high[2 * i + 1] = pair_of<T, kWeights>(packet.w, i == 1);
    }
}

// What a team has for itself in shared memory: its sums, the norm's weight, and x, if that is kept there.
template <int kTeams>
struct TeamMemory {
    float* sums;
    uint4 *norm, *x;

    // `ring`: bytes at the beginning of `memory`. `columns`: of the sums. `of_norm`, `stride`: packets of the norm's
    // weight and of a row of x, 0 without.
    __device__ TeamMemory(char* memory, int ring, int team, int columns, int of_norm, int stride) {
        constexpr int kSums = kWarps * pass_tiles(kTeams) * kTileRows;
        sums = reinterpret_cast<float*>(memory +
                                        (ring + team * (kSums * kColumns * 4 + (of_norm + kColumns * stride) * 16)));
        norm = reinterpret_cast<uint4*>(sums + kSums * (kTeams == 1 ? columns : kColumns));
        x = norm + of_norm;
    }
};

// A barrier of a team.
__device__ void sync_team(int team) { asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(kThreads) : "memory"); }

// What a team does before it may read x. The norm's weight, a constant, is on its way to `norm` in shared memory.
__device__ void await_input(const Operands& o, uint4* norm) {
    if (o.norm != nullptr)
#pragma unroll 1
        for (int i = threadIdx.x % kThreads; i < o.inputs / 8; i += kThreads)
            copy_async(shared_address(norm + i), static_cast<const uint4*>(o.norm) + i, true);
    release_successor();
    wait_for_predecessor();
}

// Normalizes a team's rows of x in shared memory. `scale_of`: what a row is multiplied by besides the norm's weight.
template <typename T, typename F>
__device__ void normalize_kept(const Operands& o, uint4* x, int stride, const uint4* norm, int thread, F scale_of) {
#pragma unroll 1
    for (int row = 0; row < o.rows; ++row) {
        const float scale = scale_of(row);
#pragma unroll 1
        for (int i = thread; i < o.inputs / 8; i += kThreads)
            x[row * stride + i] = normed<T>(x[row * stride + i], norm[i], scale);
    }
}
#endif

// Codes of 8 bits. kShared: x fits in shared memory, else each warp reads its columns of it in every pass.
template <typename T, int kWeights, bool kGated, bool kShared, int kTeams>
__global__ void __launch_bounds__(threads_of(kTeams), 1) packed_bytes_kernel(Operands all, int stages) {
#if __CUDA_ARCH__ >= 900
    constexpr int kTiles = pass_tiles(kTeams), kSteps = kUnit / 32, kUnitBytes = code_bytes(kWeights);
    constexpr int kPerTile = kGated ? 8 : 16;  // results of a row of x
    constexpr int kStageBytes = kWarps * kUnitBytes;
    extern __shared__ __align__(128) char memory[];
    __shared__ uint64_t full[kMaxTiles], empty[kMaxTiles];
    __shared__ __align__(16) float all_squares[kTeams][kColumns][kWarps];
    const int tiles = (all.outputs + kPerTile - 1) / kPerTile;
    const int mine = (tiles - 1 - int(blockIdx.x)) / int(gridDim.x) + 1;
    const int units = (all.inputs + kUnit - 1) / kUnit, chunks = (units + kWarps - 1) / kWarps;
    const int packets = all.inputs / 8;
    const int filled = units * (kUnit / 8), stride = filled + kRowGap;  // packets of a row of x, if kShared
    const char* const packed = static_cast<const char*>(all.weight);

    if (threadIdx.x == kTeams * kThreads) {
        for (int stage = 0; stage < stages; ++stage) {
            barrier_init(&full[stage]);
            barrier_init(&empty[stage], kTeams * kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= kTeams * kThreads) {
        // The last warp requests the weights, a chunk of a tile at a time: a unit for each warp of a team.
        if (threadIdx.x % 32 != 0) return;
        const uint64_t policy = streaming_policy();
        int stage = 0, requested = 0;
        unsigned phase = 1;
        for (int first = 0; first < mine; first += kTiles)
            for (int chunk = 0; chunk < chunks; ++chunk)
                for (int tile = first; tile < min(first + kTiles, mine); ++tile, ++requested) {
                    if (requested >= stages) barrier_wait(&empty[stage], phase);
                    const int bytes = min(kWarps, units - chunk * kWarps) * kUnitBytes;
                    const size_t unit = (blockIdx.x + size_t(tile) * gridDim.x) * units + chunk * kWarps;
                    expect_bytes(&full[stage], bytes);
                    bulk_copy(memory + stage * kStageBytes, packed + unit * kUnitBytes, bytes, &full[stage], policy);
                    if (++stage == stages) {
                        stage = 0;
                        phase ^= 1;
                    }
                }
        return;
    }
    const int thread = threadIdx.x % kThreads, team = threadIdx.x / kThreads, warp = thread / 32, lane = thread % 32;
    const Operands o = kTeams == 1 ? all : rows_of<T>(all, team * kColumns, kColumns);
    const int columns = padded(o.rows), shift = __ffs(columns) - 1;
    const int of_norm = o.norm == nullptr ? 0 : packets;
    const TeamMemory<kTeams> own_memory(memory, stages * kStageBytes, team, columns, of_norm, kShared ? stride : 0);
    float* const sums = own_memory.sums;
    uint4 *const norm = own_memory.norm, *const own = own_memory.x;
    auto& squares = all_squares[team];
    await_input(o, norm);

    // A lane has row lane / 4 of x, and of W rows lane / 4 and lane / 4 + 8; 8 columns of 32 in each.
    const auto *x = static_cast<const uint4*>(o.x), *delta = static_cast<const uint4*>(o.delta);
    auto packet_at = [&](size_t i) { return delta == nullptr ? x[i] : sum_of<T>(x[i], delta[i]); };
    const int column = lane / 4, quarter = lane % 4;
    auto packet_of = [&](int chunk, int step) { return (chunk * kWarps + warp) * (kUnit / 8) + step * 4 + quarter; };
    uint4 next[kSteps];
    auto load = [&](int chunk) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int i = packet_of(chunk, step);
            next[step] = uint4{};
            if (column < o.rows && i < packets) next[step] = packet_at(size_t(column) * packets + i);
        }
    };
    if constexpr (kShared) {
#pragma unroll 1
        for (int row = 0; row < o.rows; ++row)
#pragma unroll 1
            for (int i = thread; i < filled; i += kThreads)
                copy_async(shared_address(own + row * stride + i), x + row * packets + min(i, packets - 1),
                           i < packets);
    } else {
        load(0);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    float scale = 0;
    if (o.norm != nullptr) {
        // A thread reads here what it has copied itself.
        auto add_square = [&](float& square, int row, int i) {
            uint4 packet;
            if constexpr (kShared) {
                packet = own[row * stride + i];
                if (delta != nullptr) own[row * stride + i] = packet = sum_of<T>(packet, delta[row * packets + i]);
            } else {
                packet = packet_at(size_t(row) * packets + i);
            }
            square = dot<T>(packet, packet, square);
        };
        auto note = [&](float square, int row) {
            square = warp_sum(square);
            if (lane == 0) squares[row][warp] = square;
        };
        if constexpr (kShared) {
#pragma unroll 1
            for (int row = 0; row < o.rows; ++row) {
                float square = 0;
#pragma unroll 1
                for (int i = thread; i < packets; i += kThreads) add_square(square, row, i);
                note(square, row);
            }
        } else {
            float square[kColumns] = {};
#pragma unroll 1
            for (int i = thread; i < packets; i += kThreads)
#pragma unroll
                for (int row = 0; row < kColumns; ++row)
                    if (row < o.rows) add_square(square[row], row, i);
#pragma unroll
            for (int row = 0; row < kColumns; ++row)
                if (row < o.rows) note(square[row], row);
        }
        sync_team(team);
        auto scale_of = [&](int row) { return rsqrtf(total_of(squares[row]) / float(o.inputs) + o.eps); };
        if constexpr (kShared) {
            normalize_kept<T>(o, own, stride, norm, thread, scale_of);
        } else if (column < o.rows) {
            scale = scale_of(column);
        }
    }
    if constexpr (kShared) sync_team(team);

    int stage = 0;
    unsigned phase = 0;
    auto advance = [&] {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1;
        }
    };
#pragma unroll 1
    for (int first = 0; first < mine; first += kTiles) {
        const int count = min(kTiles, mine - first);
        // Result i of the pass: with few rows a thread has one, and asks early for what it needs to write it.
        struct Result {
            int row, tile, within, output;
            bool valid;
            float added, factor[2];
        };
        auto result = [&](int i) {
            const int of_row = i >> shift;
            Result r = {i & (columns - 1), of_row / kPerTile, of_row % kPerTile, 0, false, 0, {1, 1}};
            r.output = (int(blockIdx.x) + (first + r.tile) * int(gridDim.x)) * kPerTile + r.within;
            r.valid = r.row < o.rows && r.tile < count && r.output < o.outputs;
            if (!r.valid) return r;
            if (!kGated && o.residual != nullptr)
                r.added = float(static_cast<const T*>(o.residual)[size_t(r.row) * o.outputs + r.output]);
            const auto* scales = reinterpret_cast<const float*>(packed + size_t(tiles) * units * kUnitBytes);
            const float* const at = scales + r.output / kPerTile * kTileRows + r.within;
            r.factor[0] = at[0];
            if (kGated) r.factor[1] = at[8];
            return r;
        };
        Result own_result = result(thread);
        float c[kTiles][4] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
            uint4 kept[kSteps];
            if constexpr (!kShared) {
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    kept[step] = next[step];
                    if (o.norm != nullptr)
                        kept[step] = normed<T>(kept[step], norm[min(packet_of(chunk, step), packets - 1)], scale);
                }
                if (chunk + 1 < chunks)
                    load(chunk + 1);
                else if (first + kTiles < mine)
                    load(0);
            }
            auto x_of = [&](int step) {
                if constexpr (!kShared) return kept[step];
                return column < o.rows ? own[column * stride + packet_of(chunk, step)] : uint4{};
            };
            const bool idle = chunk * kWarps + warp >= units;
            // Two tiles at a time: the products of one alone would wait for each other.
#pragma unroll
            for (int tile = 0; tile < kTiles; tile += 2) {
                if (tile >= count) continue;
                const bool both = tile + 1 < count;
                const char* unit[2];
                uint64_t* const read = &empty[stage];
                barrier_wait(&full[stage], phase);
                unit[0] = unit[1] = memory + stage * kStageBytes + warp * kUnitBytes;
                advance();
                uint64_t* const read_too = &empty[stage];
                if (both) {
                    barrier_wait(&full[stage], phase);
                    unit[1] = memory + stage * kStageBytes + warp * kUnitBytes;
                    advance();
                }
                if (idle) {
                    __syncwarp();
                    if (lane == 0) {
                        barrier_arrive(read);
                        if (both) barrier_arrive(read_too);
                    }
                    continue;
                }
                float low_sums[2][4] = {}, high_sums[2][4] = {};
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    const uint4 b = x_of(step);
                    unsigned low[2][4], high[2][4];
#pragma unroll
                    for (int of = 0; of < 2; ++of)
                        decode8<T, kWeights>(reinterpret_cast<const uint4*>(unit[of])[step * 32 + lane], low[of],
                                             high[of]);
#pragma unroll
                    for (int of = 0; of < 2; ++of) {
                        multiply_accumulate<T>(low_sums[of], low[of], &b.x);
                        multiply_accumulate<T>(high_sums[of], high[of], &b.z);
                    }
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) c[tile + i / 4][i % 4] += low_sums[i / 4][i % 4] + high_sums[i / 4][i % 4];
                finish_reads();
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(read);
                    if (both) barrier_arrive(read_too);
                }
            }
        }
        sync_team(team);  // the sums of the pass before have been read
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = column + i / 2 * 8, of = quarter * 2 + i % 2;
                if (of < columns) sums[((warp * kTiles + tile) * kTileRows + row) * columns + of] = c[tile][i];
            }
        sync_team(team);
        const auto* bias = static_cast<const T*>(o.bias);
        int i = thread;
        for (Result r = own_result;; r = result(i)) {
            if (r.valid) {
                float y[2] = {};
#pragma unroll
                for (int part = 0; part < (kGated ? 2 : 1); ++part) {
#pragma unroll
                    for (int of = 0; of < kWarps; ++of)
                        y[part] += sums[((of * kTiles + r.tile) * kTileRows + part * 8 + r.within) * columns + r.row];
                    const float added = bias == nullptr ? 0 : float(bias[part * o.outputs + r.output]);
                    y[part] = fmaf(y[part], r.factor[part], added);  // all kernels round alike
                }
                const size_t at = size_t(r.row) * o.outputs + r.output;
                if constexpr (kGated)
                    static_cast<T*>(o.out)[at] = gated(T(y[0]), T(y[1]), o.gating);
                else
                    write<T>(o, at, y[0], r.added);
            }
            i += kThreads;
            if (i >= kTiles * kPerTile << shift) break;
        }
    }
#endif
}

// Codes of 4 bits. kGroups: of a unit. kShared: as above.
template <typename T, int kGroups, bool kGated, bool kShared, int kTeams>
__global__ void __launch_bounds__(threads_of(kTeams), 1) packed_nibbles_kernel(Operands all, int stages) {
#if __CUDA_ARCH__ >= 900
    constexpr int kTiles = pass_tiles(kTeams), kSteps = kUnit / 32, kPackets = code_bytes(CQIL_INT4) / 512;
    constexpr int kUnitBytes = unit_bytes(CQIL_INT4, kGroups);
    constexpr int kPerTile = kGated ? 8 : 16;  // results of a row of x
    constexpr int kStageBytes = stage_bytes(CQIL_INT4, kGroups), kStageTiles = stage_tiles(CQIL_INT4);
    extern __shared__ __align__(128) char memory[];
    __shared__ __align__(16) float all_squares[kTeams][kColumns][kWarps];
    const int tiles = (all.outputs + kPerTile - 1) / kPerTile;
    const int mine = (tiles - 1 - int(blockIdx.x)) / int(gridDim.x) + 1;
    const int units = (all.inputs + kUnit - 1) / kUnit, chunks = (units + kWarps - 1) / kWarps;
    const int packets = all.inputs / 8;
    const int filled = units * (kUnit / 8), stride = filled + kRowGap;  // packets of a row of x, if kShared
    const char* const packed = static_cast<const char*>(all.weight);

    // A stage is its address in shared memory, so nothing has to be computed from its number.
    const unsigned begin = shared_address(memory), end = begin + stages * kStageBytes;
    auto following = [&](unsigned stage) { return stage + kStageBytes == end ? begin : stage + kStageBytes; };
    auto full = [](unsigned stage) { return shared_at<uint64_t>(stage + kStageBytes - 16); };
    auto empty = [](unsigned stage) { return shared_at<uint64_t>(stage + kStageBytes - 8); };
    if (threadIdx.x == kTeams * kThreads) {
        for (unsigned stage = begin; stage != end; stage += kStageBytes) {
            barrier_init(full(stage));
            barrier_init(empty(stage), kTeams * kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= kTeams * kThreads) {
        // The last warp requests the weights, a stage at a time: of two tiles a unit for each warp of a team.
        if (threadIdx.x % 32 != 0) return;
        const uint64_t policy = streaming_policy();
        unsigned stage = begin, phase = 1;
        int requested = 0;
        auto advance = [&] {
            stage = following(stage);
            if (stage == begin) phase ^= 1;
            if (++requested >= stages) barrier_wait(empty(stage), phase);
        };
        for (int first = 0; first < mine; first += kTiles)
            for (int chunk = 0; chunk < chunks; ++chunk)
                for (int tile = first; tile < min(first + kTiles, mine); tile += kStageTiles) {
                    const int bytes = min(kWarps, units - chunk * kWarps) * kUnitBytes;
                    const int count = min(kStageTiles, mine - tile);
                    expect_bytes(full(stage), count * bytes);
                    for (int i = 0; i < count; ++i) {
                        const size_t unit = (blockIdx.x + size_t(tile + i) * gridDim.x) * units + chunk * kWarps;
                        bulk_copy(shared_at<char>(stage + i * kWarps * kUnitBytes), packed + unit * kUnitBytes, bytes,
                                  full(stage), policy);
                    }
                    advance();
                }
        // The others read one stage too many, so that they need not know which is the last.
        barrier_arrive(full(stage));
        return;
    }
    const int thread = threadIdx.x % kThreads, team = threadIdx.x / kThreads, warp = thread / 32, lane = thread % 32;
    const Operands o = kTeams == 1 ? all : rows_of<T>(all, team * kColumns, kColumns);
    const int columns = padded(o.rows), shift = __ffs(columns) - 1;
    const int of_norm = o.norm == nullptr ? 0 : packets;
    const TeamMemory<kTeams> own_memory(memory, stages * kStageBytes, team, columns, of_norm, kShared ? stride : 0);
    float* const sums = own_memory.sums;
    uint4 *const norm = own_memory.norm, *const own = own_memory.x;
    auto& squares = all_squares[team];
    await_input(o, norm);

    // A lane has row lane / 4 of x (the last instead of one that is missing, as nobody reads its results), and of W rows
    // lane / 4 and lane / 4 + 8; 8 columns of 32 in each.
    const auto *x = static_cast<const uint4*>(o.x), *delta = static_cast<const uint4*>(o.delta);
    const int column = lane / 4, quarter = lane % 4;
    const int x_row = min(column, o.rows - 1);
    auto packet_of = [&](int chunk, int step) { return (chunk * kWarps + warp) * (kUnit / 8) + step * 4 + quarter; };
    uint4 next[kSteps];
    auto load = [&](int chunk) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int i = packet_of(chunk, step);
            next[step] = uint4{};
            if (i >= packets) continue;
            const size_t at = size_t(x_row) * packets + i;
            next[step] = delta == nullptr ? x[at] : sum_of<T>(x[at], delta[at]);
        }
    };
    auto copy = [&](int row, int i) {
        copy_async(shared_address(own + row * stride + i), x + row * packets + min(i, packets - 1), i < packets);
    };
    // x in shared memory without a norm: a warp copies what it takes, and waits for a chunk of it when it takes it.
    const bool chunkwise = kShared && o.norm == nullptr;
    if (chunkwise) {
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
            constexpr int kUnitPackets = kUnit / 8;
            const int i = (chunk * kWarps + warp) * kUnitPackets + lane % kUnitPackets;
#pragma unroll 1
            for (int row = lane / kUnitPackets; row < o.rows; row += 32 / kUnitPackets)
                if (i < filled) copy(row, i);
            commit_copies();
        }
    } else {
        if constexpr (kShared) {
#pragma unroll 1
            for (int row = 0; row < o.rows; ++row)
#pragma unroll 1
                for (int i = thread; i < filled; i += kThreads) copy(row, i);
        } else {
            load(0);
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
    }
    // One row in shared memory is normalized there, before its products, and those of two teams, which take them for two
    // tiles at a time. Otherwise warps do it with what they take.
    const bool late = o.norm != nullptr && (!kShared || (kTeams == 1 && o.rows > 1));
    float scale = 0;
    // The squares of kRows rows at once: those of one alone would wait for each other.
    auto normalize = [&](auto most) {
        constexpr int kRows = decltype(most)::value;
#pragma unroll 1
        for (int base = 0; base < o.rows; base += kRows) {
            float square[kRows] = {};
            // A thread reads here what it has copied itself.
#pragma unroll 1
            for (int i = thread; i < packets; i += kThreads) {
                uint4 packet[kRows], more[kRows];
#pragma unroll
                for (int n = 0; n < kRows; ++n) {
                    const int row = base + n;
                    packet[n] = more[n] = uint4{};
                    if (row >= o.rows) continue;
                    packet[n] = kShared ? own[row * stride + i] : x[size_t(row) * packets + i];
                    if (delta != nullptr) more[n] = delta[size_t(row) * packets + i];
                }
                if (delta != nullptr)
#pragma unroll
                    for (int n = 0; n < kRows; ++n) {
                        packet[n] = sum_of<T>(packet[n], more[n]);
                        if (kShared && base + n < o.rows) own[(base + n) * stride + i] = packet[n];
                    }
#pragma unroll
                for (int n = 0; n < kRows; ++n) square[n] = dot<T>(packet[n], packet[n], square[n]);
            }
#pragma unroll
            for (int step = 16; step > 0; step /= 2)
#pragma unroll
                for (int n = 0; n < kRows; ++n) square[n] += __shfl_xor_sync(~0u, square[n], step);
            if (lane == 0)
#pragma unroll
                for (int n = 0; n < kRows; ++n) squares[base + n][warp] = square[n];
        }
        sync_team(team);
        auto scale_of = [&](int row) { return rsqrtf(total_of(squares[row]) / float(o.inputs) + o.eps); };
        scale = scale_of(x_row);
        if constexpr (kShared) {
            if (!late) normalize_kept<T>(o, own, stride, norm, thread, scale_of);
        }
    };
    if (o.norm != nullptr) {
        if (o.rows == 1)
            normalize(std::integral_constant<int, 1>());
        else
            normalize(std::integral_constant<int, kColumns>());
    }
    if (kShared && o.norm != nullptr && !late) sync_team(team);

    // The codes of two tiles at a time, as the products of one alone would wait for each other. A lane has those of the
    // next two in registers while it applies the scales of two.
    uint4 codes[2][kPackets];
    unsigned held = begin, ahead = begin;  // the stage that the codes are from, the stage after them
    unsigned phase = 0;
    const unsigned codes_at = warp * kUnitBytes + lane * 16;
    const unsigned scales_at = warp * kUnitBytes + code_bytes(CQIL_INT4);
    // A stage always has room for two tiles, and nobody reads the results of one that is missing.
    auto read = [&] {
        held = ahead;
        barrier_wait(full(held), phase);
#pragma unroll
        for (int of = 0; of < kStageTiles; ++of)
#pragma unroll
            for (int i = 0; i < kPackets; ++i)
                codes[of][i] = *shared_at<uint4>(held + codes_at + of * kWarps * kUnitBytes + i * 512);
        ahead = following(held);
        if (ahead == begin) phase ^= 1;
    };
    auto release = [&] {
        finish_reads();
        __syncwarp();
        if (lane == 0) barrier_arrive(empty(held));
    };
    read();
#pragma unroll 1
    for (int first = 0; first < mine; first += kTiles) {
        const int count = min(kTiles, mine - first);
        // What a thread needs for its results of the pass besides the sums; it asks for that early.
        struct Place {
            int row, tile, within, output;
            bool valid;
        };
        struct Early {
            T added, bias[2];
        };
        auto place = [&](int i) {
            const int of_row = i >> shift;
            Place p = {i & (columns - 1), of_row / kPerTile, of_row % kPerTile, 0, false};
            p.output = (int(blockIdx.x) + (first + p.tile) * int(gridDim.x)) * kPerTile + p.within;
            p.valid = p.row < o.rows && p.tile < count && p.output < o.outputs;
            return p;
        };
        constexpr int kParts = kGated ? 2 : 1;
        auto ask = [&](const Place& p) {
            Early early = {};
            if (!p.valid) return early;
            if (!kGated && o.residual != nullptr)
                early.added = static_cast<const T*>(o.residual)[size_t(p.row) * o.outputs + p.output];
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                if (o.bias != nullptr) early.bias[part] = static_cast<const T*>(o.bias)[part * o.outputs + p.output];
            return early;
        };
        constexpr int kResults = (kTiles * kPerTile * kColumns + kThreads - 1) / kThreads;
        Early early[kResults];
#pragma unroll
        for (int n = 0; n < kResults; ++n) early[n] = ask(place(thread + n * kThreads));
        float c[kTiles][4] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
            uint4 kept[kSteps];
            if (chunkwise && first == 0) {
                // Copies of as many chunks may be missing as are still to come.
                const int later = chunks - 1 - chunk;
                if (later == 0)
                    wait_for_copies<0>();
                else if (later == 1)
                    wait_for_copies<1>();
                else if (later == 2)
                    wait_for_copies<2>();
                else
                    wait_for_copies<3>();
                __syncwarp();
            }
            const bool idle = chunk * kWarps + warp >= units;
            if (!idle)  // x in shared memory ends before what it would read
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    kept[step] = kShared ? own[x_row * stride + packet_of(chunk, step)] : next[step];
                    if (late) kept[step] = normed<T>(kept[step], norm[min(packet_of(chunk, step), packets - 1)], scale);
                }
            if constexpr (!kShared) {
                if (chunk + 1 < chunks)
                    load(chunk + 1);
                else if (first + kTiles < mine)
                    load(0);
            }
            if (idle) {
#pragma unroll 1
                for (int tile = 0; tile < count; tile += kStageTiles) {
                    release();
                    read();
                }
                continue;
            }
            // The sums of x in each group, for the zero points: products with ones, in all rows.
            constexpr int kGroupSteps = kSteps / kGroups;
            float group_sums[kGroups][2];
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                constexpr unsigned kOne = kSubnormal<T> ? 0x3c003c00u : 0x3f803f80u;
                const unsigned ones[4] = {kOne, kOne, kOne, kOne};
                float low[4] = {}, high[4] = {};
#pragma unroll
                for (int step = 0; step < kGroupSteps; ++step) {
                    const uint4& b = kept[group * kGroupSteps + step];
                    multiply_accumulate<T>(low, ones, &b.x);
                    multiply_accumulate<T>(high, ones, &b.z);
                }
#pragma unroll
                for (int j = 0; j < 2; ++j) group_sums[group][j] = low[j] + high[j];
            }
#pragma unroll
            for (int tile = 0; tile < kTiles; tile += kStageTiles) {
                if (tile > 0 && tile >= count) break;
                Scales<T, kGroups> scales[2];
#pragma unroll
                for (int of = 0; of < 2; ++of) scales[of].read(held + scales_at + of * kWarps * kUnitBytes, column);
                float low_sums[2][4] = {}, high_sums[2][4] = {};
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    unsigned low[2][4], high[2][4];
#pragma unroll
                    for (int of = 0; of < 2; ++of) decode4<T>(codes[of][step / 2], step % 2 != 0, low[of], high[of]);
#pragma unroll
                    for (int of = 0; of < 2; ++of) {
                        multiply_accumulate<T>(low_sums[of], low[of], &kept[step].x);
                        multiply_accumulate<T>(high_sums[of], high[of], &kept[step].z);
                    }
                    if (step % kGroupSteps != kGroupSteps - 1) continue;
                    if (step == kSteps - 1) {
                        release();
                        read();
                    }
                    const int group = step / kGroupSteps;
#pragma unroll
                    for (int of = 0; of < 2; ++of) {
                        const float2 factor = scales[of].scale(group), zero = scales[of].zero(group);
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            float &l = low_sums[of][i], &h = high_sums[of][i], &to = c[tile + of][i];
                            const float alone = fmaf(-(i < 2 ? zero.x : zero.y), group_sums[group][i % 2], l);
                            const float both = kSubnormal<T> ? fmaf(h, 0x1p-4f, alone) : alone + h;
                            to = fmaf(i < 2 ? factor.x : factor.y, both, to);
                            l = h = 0;
                        }
                    }
                }
            }
        }
        sync_team(team);  // the sums of the pass before have been read
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int row = column + n * 8, of = quarter * 2;
                const float* const two = &c[tile][n * 2];
                float* const to = &sums[((warp * kTiles + tile) * kTileRows + row) * columns + of];
                if (columns == 1 && quarter == 0) *to = two[0];
                if (of + 1 < columns) *reinterpret_cast<float2*>(to) = {two[0], two[1]};
            }
        sync_team(team);
#pragma unroll
        for (int n = 0; n < kResults; ++n) {
            const Place p = place(thread + n * kThreads);
            if (!p.valid) continue;
            float y[2] = {};
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
#pragma unroll
                for (int of = 0; of < kWarps; ++of)
                    y[part] += sums[((of * kTiles + p.tile) * kTileRows + part * 8 + p.within) * columns + p.row];
                // Said explicitly, because all kernels must round alike. Without a bias it is 0.
                y[part] = fmaf(y[part], kSubnormal<T> ? 0x1p24f : 1.0f, float(early[n].bias[part]));
            }
            const size_t at = size_t(p.row) * o.outputs + p.output;
            if constexpr (kGated)
                static_cast<T*>(o.out)[at] = gated(T(y[0]), T(y[1]), o.gating);
            else
                write<T>(o, at, y[0], o.residual != nullptr ? float(early[n].added) : 0);
        }
    }
#endif
}

// Packing

// W = (codes - zeros) * scales, as engines store it.
struct Stored {
    const unsigned char* codes;
    const void* scales;
    const unsigned char* zeros;
    int outputs, inputs;  // `outputs`: rows of W; if gated, those of gate
    bool gated;
    int weights;
    int size, first;  // columns of a group (0: all), and the place of column 0 in its group

    __host__ __device__ int rows() const { return gated ? 2 * outputs : outputs; }
    __host__ __device__ int groups() const { return size == 0 ? 1 : (first + inputs - 1) / size + 1; }
    __device__ int group_of(int k) const { return size == 0 ? 0 : (first + k) / size; }

    // The row of W that is row `row` of a tile; -1: none.
    __device__ int row_of(int tile, int row) const {
        const int output = gated ? tile * 8 + row % 8 : tile * kTileRows + row;
        return output >= outputs ? -1 : gated && row >= 8 ? outputs + output : output;
    }

    __device__ unsigned code(int row, int k) const {
        if (row < 0 || k >= inputs) return 0;
        if (weights != CQIL_INT4) return codes[size_t(row) * inputs + k];
        return codes[size_t(row) * ((inputs + 1) / 2) + k / 2] >> (k % 2 * 4) & 15;
    }

    template <typename T>
    __device__ float scale(int row, int k) const {
        if (row < 0) return 0;
        const size_t at = size_t(row) * groups() + group_of(k);
        return weights == CQIL_INT4 ? float(static_cast<const T*>(scales)[at]) : static_cast<const float*>(scales)[at];
    }

    __device__ unsigned zero(int row, int k) const {
        return row < 0 || zeros == nullptr ? 0 : zeros[size_t(row) * groups() + group_of(k)];
    }
};

__device__ float value_of(unsigned code, int weights) {
    if (weights == CQIL_INT4) return float(code);
    if (weights == CQIL_INT8) return float(static_cast<signed char>(code));
    return float(__half(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(code), __NV_E4M3)));
}

// A block packs the unit blockIdx.x of the tile blockIdx.y.
template <typename T>
__global__ void pack_kernel(Stored w, int groups, char* packed) {
    const int unit = blockIdx.x, tile = blockIdx.y, units = gridDim.x, bytes = unit_bytes(w.weights, groups);
    char* const to = packed + (size_t(tile) * units + unit) * bytes;
    const bool small = w.weights == CQIL_INT4;
    for (int i = threadIdx.x; i < code_bytes(w.weights) / 4; i += blockDim.x) {
        const int packet = i / 4, part = i % 4, lane = packet % 32;
        // The parts of a packet: with 4 bits two steps of two rows, with 8 bits two rows of two words.
        const int row = w.row_of(tile, lane / 4 + (small ? part % 2 : part / 2) * 8);
        const int step = small ? packet / 32 * 2 + part / 2 : packet / 32;
        const int k = unit * kUnit + step * 32 + lane % 4 * 8 + (small ? 0 : part % 2 * 4);
        unsigned word = 0;
        for (int j = 0; j < (small ? 8 : 4); ++j) {
            const int shift = small ? (place_of(j / 2) + j % 2 * 4) * 4 : j * 8;
            word |= w.code(row, k + j) << shift;
        }
        reinterpret_cast<unsigned*>(to)[i] = small ? rotated(word, kRotated<T>) : word;
    }
    for (int i = threadIdx.x; i < groups * kTileRows; i += blockDim.x) {
        const int group = i / kTileRows, row = i % kTileRows;
        const int k = min(unit * kUnit + group * (kUnit / groups), w.inputs - 1), from = w.row_of(tile, row);
        char* const scales = to + code_bytes(w.weights);
        const int at = scale_at(row, group, groups);
        reinterpret_cast<T*>(scales)[at] = T(w.scale<T>(from, k));
        scales[groups * kTileRows * 2 + at] = static_cast<char>(w.zero(from, k) + kCodeOffset<T>);
    }
    if (groups == 0 && unit == 0 && threadIdx.x < kTileRows)
        reinterpret_cast<float*>(packed + size_t(gridDim.y) * units * bytes)[tile * kTileRows + threadIdx.x] =
            w.scale<T>(w.row_of(tile, threadIdx.x), 0);
}

template <typename T>
__global__ void dequantize_kernel(Stored w, T* out) {
    const size_t count = size_t(w.rows()) * w.inputs;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        const int row = int(i / w.inputs), k = int(i % w.inputs);
        out[i] = T((value_of(w.code(row, k), w.weights) - float(w.zero(row, k))) * w.scale<T>(row, k));
    }
}

// The inverse of pack_kernel: W [rows, inputs], dense. `w` has the sizes only.
template <typename T>
__global__ void unpack_kernel(Stored w, int groups, const char* packed, T* out) {
    const int unit = blockIdx.x, tile = blockIdx.y, units = gridDim.x, bytes = unit_bytes(w.weights, groups);
    const char* const from = packed + (size_t(tile) * units + unit) * bytes;
    const bool small = w.weights == CQIL_INT4;
    release_successor();
    wait_for_predecessor();
    // A thread has 8 columns of a row.
    for (int i = threadIdx.x; i < kTileRows * kUnit / 8; i += blockDim.x) {
        const int lane = i / 8 % 8 * 4 + i % 4, half = i / 4 % 2, step = i / 64;
        const int row = w.row_of(tile, lane / 4 + half * 8), k = step * 32 + lane % 4 * 8;
        if (row < 0 || unit * kUnit + k >= w.inputs) continue;
        float scale, zero = 0;
        unsigned words[2];
        if (small) {
            const unsigned word =
                reinterpret_cast<const unsigned*>(from)[(step / 2 * 32 + lane) * 4 + step % 2 * 2 + half];
            words[0] = rotated(word, (32 - kRotated<T>) % 32);
            const char* const scales = from + code_bytes(w.weights);
            const int at = scale_at(lane / 4 + half * 8, k * groups / kUnit, groups);
            scale = float(reinterpret_cast<const T*>(scales)[at]);
            zero = float(reinterpret_cast<const unsigned char*>(scales)[groups * kTileRows * 2 + at] - kCodeOffset<T>);
        } else {
            for (int j = 0; j < 2; ++j)
                words[j] = reinterpret_cast<const unsigned*>(from)[(step * 32 + lane) * 4 + half * 2 + j];
            scale = reinterpret_cast<const float*>(packed + size_t(gridDim.y) * units *
                                                                bytes)[tile * kTileRows + lane / 4 + half * 8];
        }
        __align__(16) T values[8];
        for (int j = 0; j < 8; ++j) {
            const unsigned code =
                small ? words[0] >> ((place_of(j / 2) + j % 2 * 4) * 4) & 15 : words[j / 4] >> (j % 4 * 8) & 255;
            values[j] = T((value_of(code, w.weights) - zero) * scale);
        }
        *reinterpret_cast<uint4*>(out + size_t(row) * w.inputs + unit * kUnit + k) =
            *reinterpret_cast<const uint4*>(values);
    }
}

// Launching

int groups_of(const cqil_linear_shape& s) { return s.weights == CQIL_INT4 ? kUnit / std::max(s.group, 1) : 0; }

// Calls `run` with a null pointer of the half type; fails for others and for shapes that are not packed.
template <typename F>
int by_half(const cqil_linear_shape& s, F run) {
    const bool group = s.weights != CQIL_INT4 || s.group == 32 || s.group == 64 || s.group == 128;
    if (s.outputs < 1 || s.inputs < 1 || s.inputs % 8 != 0 || !group || s.weights < CQIL_FP8 || s.weights > CQIL_INT4)
        return fail("%d x %d weights of kind %d in groups of %d are not packed", s.outputs, s.inputs, s.weights,
                    s.group);
    if (tiles_of(s.outputs, s.gated) > 65535)
        return fail("%d outputs are more than packed weights can have", s.outputs);
    if (s.dtype == CQIL_FLOAT16) return run(static_cast<__half*>(nullptr));
    if (s.dtype == CQIL_BFLOAT16) return run(static_cast<__nv_bfloat16*>(nullptr));
    return fail("packed weights need a half type, not type %d", s.dtype);
}

// How a block uses its dynamic shared memory: whether it keeps x there, the stages of the ring, and all of its bytes.
struct Room {
    bool shared;
    int stages;
    size_t bytes;
};

// 0 stages: there is no room for `rows` rows.
Room room_of(const cqil_linear_shape& s, int rows, bool norm, const Device& device) {
    constexpr size_t kStaticBytes = 1024;
    const int teams = teams_of(rows);
    const size_t stage = stage_bytes(s.weights, groups_of(s));  // of packed_bytes_kernel 16 bytes too many
    const size_t sums = sizeof(float) * kWarps * pass_tiles(teams) * kTileRows * padded(rows) +
                        (norm ? size_t(s.inputs) * 2 * teams : 0);
    const size_t x = (size_t(units_of(s.inputs)) * kUnit * 2 + kRowGap * 16) * (teams > 1 ? teams * kColumns : rows);
    const size_t most = std::min(kMostBytes[teams], size_t(device.shared_bytes) - kStaticBytes);
    for (const bool shared : {true, false}) {
        const size_t fixed = sums + (shared ? x : 0);
        if ((shared && x > kSharedBytes[teams]) || fixed + kMinStages * stage > most) continue;
        const int stages = int(std::min(size_t(max_stages(s.weights)), (most - fixed) / stage));
        return {shared, stages, std::max(fixed + stages * stage, std::min(kLeastBytes, most))};
    }
    return {};
}

template <typename T, int kWeights, int kGroups, bool kGated, bool kShared>
int multiply(const Operands& o, const Room& room, Launch l) {
    const int teams = teams_of(o.rows);
    l.block = threads_of(teams);
    if constexpr (kGroups == 0)
        return teams > 1 ? launch(packed_bytes_kernel<T, kWeights, kGated, kShared, kMostTeams>, l, o, room.stages)
                         : launch(packed_bytes_kernel<T, kWeights, kGated, kShared, 1>, l, o, room.stages);
    else if (kGroups == 1 && teams > 1)
        return launch(packed_nibbles_kernel<T, 1, kGated, kShared, kMostTeams>, l, o, room.stages);
    else
        return launch(packed_nibbles_kernel<T, kGroups, kGated, kShared, 1>, l, o, room.stages);
}

template <typename T, int kWeights, int kGroups>
int multiply(const cqil_linear_shape& s, const Operands& o, const Device& device, cudaStream_t st) {
    const int blocks = std::min(device.processors, tiles_of(s.outputs, s.gated));
    const Room room = room_of(s, o.rows, o.norm != nullptr, device);
    if (room.stages == 0) return fail("%d inputs leave no room for packed weights in shared memory", s.inputs);
    const Launch l = {dim3(blocks), {}, st, true, room.bytes};
    if (s.gated)
        return room.shared ? multiply<T, kWeights, kGroups, true, true>(o, room, l)
                           : multiply<T, kWeights, kGroups, true, false>(o, room, l);
    return room.shared ? multiply<T, kWeights, kGroups, false, true>(o, room, l)
                       : multiply<T, kWeights, kGroups, false, false>(o, room, l);
}

template <typename T>
int multiply(const cqil_linear_shape& s, const Operands& o, const Device& device, cudaStream_t st) {
    if (s.weights == CQIL_FP8) return multiply<T, CQIL_FP8, 0>(s, o, device, st);
    if (s.weights == CQIL_INT8) return multiply<T, CQIL_INT8, 0>(s, o, device, st);
    if (s.group == 128) return multiply<T, CQIL_INT4, 1>(s, o, device, st);
    if (s.group == 64) return multiply<T, CQIL_INT4, 2>(s, o, device, st);
    return multiply<T, CQIL_INT4, 4>(s, o, device, st);
}

Stored stored(const cqil_linear_shape& s, const void* codes = nullptr, const void* scales = nullptr,
              const void* zeros = nullptr, int size = 0, int first = 0) {
    return {static_cast<const unsigned char*>(codes),
            scales,
            static_cast<const unsigned char*>(zeros),
            s.outputs,
            s.inputs,
            s.gated != 0,
            s.weights,
            size,
            first};
}

}  // namespace

int cqil_trt::packed_linear(const cqil_linear_shape& s, Operands o, void* scratch, cudaStream_t st) {
    return by_half(s, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int rows = cqil_packed_rows();
        if (rows < 1) return rows < 0 ? -1 : fail("this GPU has no kernel for packed weights");
        Device device;
        if (describe(&device)) return -1;
        // Whether the norm's weight fits does not depend on the rows: the other kernel rounds otherwise.
        const bool fits = room_of(s, kColumns, true, device).stages > 0;
        if (o.norm != nullptr && !fits) {
            const size_t bytes = align(size_t(s.rows) * s.inputs * 2);
            void* sum = o.delta != nullptr ? static_cast<char*>(scratch) + bytes : nullptr;
            const auto dtype = static_cast<cqil_dtype>(s.dtype);
            if (cqil_residual_norm(o.delta, nullptr, o.x, o.norm, sum, scratch, s.rows, s.inputs, s.eps,
                                   CQIL_NORM_ROUNDED, dtype, st))
                return -1;
            o.x = scratch;
            o.delta = o.norm = nullptr;
        }
        // Smaller groups have too few registers for more rows.
        constexpr int kMost = kMostTeams * kColumns;
        const bool wide = groups_of(s) <= 1 && room_of(s, kMost, o.norm != nullptr, device).stages > 0;
        const int most = wide ? kMost : kColumns;
        for (int first = 0; first < s.rows; first += most)
            if (multiply<T>(s, rows_of<T>(o, first, most), device, st)) return -1;
        return 0;
    });
}

extern "C" {

int cqil_packed_rows(void) {
    bool modern = false;
    if (is_modern(packed_nibbles_kernel<__half, 1, false, true, 1>, &modern)) return -1;
    return modern ? kMostRows : 0;
}

size_t cqil_packed_bytes(const cqil_linear_shape* s) {
    const size_t tiles = tiles_of(s->outputs, s->gated),
                 scales = s->weights == CQIL_INT4 ? 0 : kTileRows * sizeof(float);
    return tiles * (units_of(s->inputs) * size_t(unit_bytes(s->weights, groups_of(*s))) + scales);
}

int cqil_pack(const cqil_linear_shape* s, const void* codes, const void* scales, const void* zeros, int size, int first,
              void* packed, void* stream) {
    return by_half(*s, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int groups = groups_of(*s);
        if (groups > 0 && (size % s->group != 0 || first % s->group != 0))
            return fail("groups of %d from %d on are not packed in groups of %d", size, first, s->group);
        const Stored w = stored(*s, codes, scales, zeros, size, first);
        const dim3 grid(units_of(s->inputs), tiles_of(s->outputs, s->gated));
        pack_kernel<T><<<grid, 128, 0, static_cast<cudaStream_t>(stream)>>>(w, groups, static_cast<char*>(packed));
        CQIL_CUDA(cudaGetLastError());
        return 0;
    });
}

int cqil_unpack(const cqil_linear_shape* s, const void* packed, void* out, void* stream) {
    return by_half(*s, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const dim3 grid(units_of(s->inputs), tiles_of(s->outputs, s->gated));
        return launch(unpack_kernel<T>, {grid, 256, static_cast<cudaStream_t>(stream)}, stored(*s), groups_of(*s),
                      static_cast<const char*>(packed), static_cast<T*>(out));
    });
}

int cqil_dequantize(const cqil_linear_shape* s, const void* codes, const void* scales, const void* zeros, int size,
                    int first, void* out, void* stream) {
    if (s->weights < CQIL_FP8 || s->weights > CQIL_INT4 || s->outputs < 1 || s->inputs < 1 || size < 0 || first < 0)
        return fail("weights of kind %d in groups of %d from %d on", s->weights, size, first);
    return by_type(s->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Stored w = stored(*s, codes, scales, zeros, size, first);
        dequantize_kernel<T><<<1024, 256, 0, static_cast<cudaStream_t>(stream)>>>(w, static_cast<T*>(out));
        CQIL_CUDA(cudaGetLastError());
        return 0;
    });
}

}  // extern "C"
