// Causal attention over a KV cache with its own layout. Head norms, rotary embedding and the cache update are fused in.
//
// A decode step is one kernel, also with drafts. Every block rotates the query and the new keys itself and covers one
// or several spans of the cache. The block of a head's last span combines the spans. A prefill rotates and appends
// first, then attends, on tensor cores (flash.cuh) where the type and head dimension allow it.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <map>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "cqil_trt.h"
#include "errors.h"
#include "flash.cuh"
#include "kv_cache.cuh"
#include "launch.cuh"
#include "patience.cuh"
#include "types.cuh"

using namespace cqil_trt;

namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 16;  // per key
constexpr int kGroups = kThreads / kLanes;
constexpr int kAttendThreads = 256;
constexpr int kAttendGroups = kAttendThreads / kLanes;
constexpr int kAttendWarps = kAttendThreads / 32;
constexpr int kMaxSpans = kAttendWarps;  // per head; combined by the code that combines a block's warps
constexpr int kJointHeads = 256;         // heads of rows whose spans may be in several blocks
// Keys of a span at least: eight for each group of lanes, of the largest heads four. A span of few keys takes a block
// as long to combine as to read; of several sequences a block has several spans.
template <int kElements>
constexpr int kMinSpan = (kElements > 8 ? 4 : 8) * kAttendGroups;
constexpr int kMaxHeadDim = CQIL_MAX_HEAD_DIM;

__host__ __device__ size_t cache_elements(const cqil_attention_shape& s) {
    return size_t(s.max_batch) * s.kv_heads * s.capacity * s.head_dim;
}

// How the keys of one head of one row are dealt: in so many spans, of which a block takes `each`.
struct Spans {
    int count, each;

    int blocks() const { return (count + each - 1) / each; }
};

// As many spans as if the row were alone, so that its result does not depend on the other rows: then about one block
// per multiprocessor in total, so the next kernel finds room for its prefetches. Of more rows up to two, which take
// several spans one after the other: more blocks than fit at once would each wait for their keys in turn.
Spans spans_of(const cqil_attention_shape& s, int rows, int processors) {
    const int count = std::clamp(processors / s.heads, 1, kMaxSpans), heads = s.heads * rows;
    const int blocks = rows == 1 ? count : heads > kJointHeads ? 1 : std::clamp(2 * processors / heads, 1, count);
    return {count, (count + blocks - 1) / blocks};
}

template <typename T>
__device__ float wide(T x) {
    return float(x);
}

template <typename T>
__device__ T narrow(float x) {
    return T(x);
}

// What a block records, in host memory, before it gives up waiting for another block.
struct GaveUp {
    uint32_t code;  // 0: no failure
    uint32_t row, head, span, join;
};

struct Limit {
    uint64_t timeout_ns;  // 0: no limit
    GaveUp* record;
};

__device__ uint32_t gave_up;  // 1 once a thread has

struct Inputs {
    const void* qkv;
    const int32_t* past;
    const int32_t* slots;  // null: sequence b is in slot b
    const float* cos;
    const float* sin;
    const void* q_norm;
    const void* k_norm;
    const float* squares;  // null: each head has a norm of its own
    void* cache;

    // Where the cache holds a sequence. Bypasses L1, as `past` does: a decode step reads both before it has waited.
    __device__ int slot(int sequence) const { return slots == nullptr ? sequence : __ldcg(slots + sequence); }
};

// The part of a head that one of kLanes lanes holds: kElements of the first half or of the second. Each element's
// rotation partner is held by exactly one other lane.
template <int kElements>
struct Lane {
    int number, dim, begin, count;

    __device__ Lane(int number, int dim) : number(number), dim(dim) {
        const int half = dim / 2, offset = number % (kLanes / 2) * kElements;
        begin = number / (kLanes / 2) * half + offset;
        count = max(min(half - offset, kElements), 0);
    }
};

// Whether every lane holds either no elements of a head or kElements aligned ones, rotated all or none.
template <int kElements>
bool is_packed(int dim, int rotary) {
    return dim / 2 % kElements == 0 && rotary / 2 % kElements == 0;
}

// The place in a projected query or key of what the cache keeps at `place`: the first half of the rotated elements and
// half of the others, then the rest of both.
__device__ int source_of(int place, int dim, int rotary) {
    const int half = dim / 2, turning = rotary / 2;
    if (place < half) return place < turning ? place : place + turning;
    return place - half < turning ? place - half + turning : place;
}

// One head of one token. Queries and keys are rounded to T, as if the rotation were a separate kernel.
template <typename T, int kElements, bool kPacked>
struct Head {
    static constexpr int kBytes = kElements * int(sizeof(T));
    using Packet = std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes % 8 == 0, uint2, unsigned>>;
    static constexpr int kPackets = kBytes / int(sizeof(Packet));
    static_assert(kBytes % sizeof(Packet) == 0, "a lane holds whole packets");
    alignas(Packet) T value[kElements];

    __device__ void read(const T* row, const Lane<kElements>& lane) {
        if constexpr (kPacked) {
#pragma unroll
            for (int i = 0; i < kPackets; ++i)
                reinterpret_cast<Packet*>(value)[i] =
                    lane.count == 0 ? Packet{} : __ldcg(reinterpret_cast<const Packet*>(row + lane.begin) + i);
        } else {
#pragma unroll
            for (int i = 0; i < kElements; ++i) value[i] = i < lane.count ? row[lane.begin + i] : narrow<T>(0);
        }
    }

    __device__ void write(T* row, const Lane<kElements>& lane) const {
        if constexpr (kPacked) {
            if (lane.count == 0) return;
#pragma unroll
            for (int i = 0; i < kPackets; ++i)
                reinterpret_cast<Packet*>(row + lane.begin)[i] = reinterpret_cast<const Packet*>(value)[i];
        } else {
#pragma unroll
            for (int i = 0; i < kElements; ++i)
                if (i < lane.count) row[lane.begin + i] = value[i];
        }
    }

    // As `read`, of a projected query or key of which `rotary` elements are rotated.
    __device__ void gather(const T* row, const Lane<kElements>& lane, int rotary) {
        if constexpr (kPacked) {
            Lane<kElements> from = lane;
            from.begin = source_of(lane.begin, lane.dim, rotary);
            read(row, from);
        } else {
#pragma unroll
            for (int i = 0; i < kElements; ++i)
                value[i] = i < lane.count ? row[source_of(lane.begin + i, lane.dim, rotary)] : narrow<T>(0);
        }
    }

    // RMSNorm of any cqil_norm, with the head's mean of squares if it is given. All lanes of a warp call this together;
    // only `wanted` heads change.
    __device__ void normalise(const Head& weight, const float* squares, float eps, int kind, bool wanted, int dim) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kElements; ++i) sum = fmaf(wide(value[i]), wide(value[i]), sum);
        for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (!wanted) return;
        const float scale = rsqrtf((squares == nullptr ? sum / float(dim) : __ldcg(squares)) + eps);
        const bool rounded = kind == CQIL_NORM_ROUNDED;
        const float offset = kind == CQIL_NORM_OFFSET ? 1 : 0;
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const float x = wide(value[i]) * scale;
            value[i] = narrow<T>((rounded ? wide(narrow<T>(x)) : x) * (wide(weight.value[i]) + offset));
        }
    }
};

// The cosines and sines for a lane's elements.
template <typename T, int kElements, bool kPacked>
struct Rotation {
    float cos[kElements], sin[kElements];

    // Of the first `rotary` elements of a head, all or none of a packed lane's; the tables have as many columns as
    // half of them.
    __device__ Rotation(const Inputs& in, int position, const Lane<kElements>& lane, int rotary) {
        const int first = lane.number % (kLanes / 2) * kElements, turning = min(rotary / 2 - first, lane.count);
        const size_t from = size_t(position) * (rotary / 2) + first;
        if constexpr (kPacked && kElements % 4 == 0) {
#pragma unroll
            for (int i = 0; i < kElements; i += 4) {
                float4 c = {1, 1, 1, 1}, s = {};
                if (turning > 0) {
                    c = reinterpret_cast<const float4*>(in.cos + from)[i / 4];
                    s = reinterpret_cast<const float4*>(in.sin + from)[i / 4];
                }
                cos[i] = c.x, cos[i + 1] = c.y, cos[i + 2] = c.z, cos[i + 3] = c.w;
                sin[i] = s.x, sin[i + 1] = s.y, sin[i + 2] = s.z, sin[i + 3] = s.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kElements; ++i) {
                cos[i] = i < turning ? in.cos[from + i] : 1;
                sin[i] = i < turning ? in.sin[from + i] : 0;
            }
        }
    }

    // All lanes of a warp call this together; only `wanted` heads are rotated.
    __device__ void apply(Head<T, kElements, kPacked>& x, bool wanted, const Lane<kElements>& lane) const {
        const float sign = lane.number < kLanes / 2 ? -1 : 1;
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const float mine = wide(x.value[i]), other = __shfl_xor_sync(~0u, mine, kLanes / 2);
            if (wanted) x.value[i] = narrow<T>(fmaf(mine, cos[i], __fmul_rn(sign * other, sin[i])));
        }
    }
};

// The kernels that are compiled with kMore compute what LLaMA does not have: the shape's fields from `window` to `cap`,
// norms over all heads, and layers without rotation. For LLaMA's own they would be larger and slower. flash.cuh has one
// kernel for all.

// The first key that is seen by a query which sees keys before `end`.
__device__ int first_seen(const cqil_attention_shape& s, int end) { return s.window > 0 ? max(end - s.window, 0) : 0; }

// Where a cache keeps positions from `first` on, fewer than two circles of them.
struct Circle {
    int turn, capacity;

    __device__ Circle(const cqil_attention_shape& s, int first)
        : turn(first / s.capacity * s.capacity), capacity(s.capacity) {}

    __device__ int place(int position) const {
        return position - turn < capacity ? position - turn : position - turn - capacity;
    }
};

struct NoCircle {
    __device__ NoCircle(const cqil_attention_shape&, int) {}
    __device__ static int place(int position) { return position; }
};

template <bool kMore>
using Cells = std::conditional_t<kMore, Circle, NoCircle>;

constexpr int kAppended = 4;  // heads of a group of lanes, whose rotation is the same

// Rotates queries into `queries` [rows, heads, head_dim] and appends keys and values to the cache. Grid: rows, heads of
// all kinds / (kAppended * kGroups).
template <typename T, typename C, int kElements, bool kPacked, bool kMore>
__global__ void __launch_bounds__(kThreads) append_kernel(cqil_attention_shape s, Inputs in, T* queries) {
    using H = Head<T, kElements, kPacked>;
    release_successor();
    wait_for_predecessor();
    const int row = blockIdx.x, sequence = row / s.length, heads = s.heads + 2 * s.kv_heads;
    const Lane<kElements> lane(threadIdx.x % kLanes, s.head_dim);
    const int position = in.past[sequence] + row % s.length, most = kMore ? s.positions : s.capacity;
    const int rotary = !kMore ? s.head_dim : in.cos == nullptr ? 0 : s.rotary;
    // A warp covers two heads and shuffles between its lanes, so lanes past the last head repeat its work.
    const int block_head = blockIdx.y * kAppended * kGroups;
    const int count = min((heads - block_head + kGroups - 1) / kGroups, kAppended);
    auto head_of = [&](int n) { return min(block_head + n * kGroups + int(threadIdx.x / kLanes), heads - 1); };
    H x[kAppended];
#pragma unroll
    for (int n = 0; n < kAppended; ++n) {
        if (n >= count) break;
        const int h = head_of(n);
        x[n].gather(static_cast<const T*>(in.qkv) + (size_t(row) * heads + h) * s.head_dim, lane,
                    kMore && h < s.heads + s.kv_heads ? s.rotary : s.head_dim);
    }
    const Rotation<T, kElements, kPacked> rotation(in, min(position, most - 1), lane, rotary);
#pragma unroll
    for (int n = 0; n < kAppended; ++n) {
        if (n >= count) break;
        const int h = head_of(n);
        const bool query = h < s.heads, key = !query && h < s.heads + s.kv_heads;
        if (in.q_norm != nullptr) {
            const auto* norm = static_cast<const T*>(query ? in.q_norm : in.k_norm);
            const float* squares = kMore && in.squares != nullptr ? in.squares + 2 * row + key : nullptr;
            H weight = {};
            if (query || key)
                weight.gather(norm + (squares == nullptr ? 0 : (query ? h : h - s.heads) * s.head_dim), lane,
                              kMore ? s.rotary : s.head_dim);
            x[n].normalise(weight, squares, s.eps, kMore ? s.norm : CQIL_NORM_ROUNDED, query || key, s.head_dim);
        }
        rotation.apply(x[n], query || key, lane);
        if (query) x[n].write(queries + (size_t(row) * s.heads + h) * s.head_dim, lane);
        if (query || position >= most) continue;
        const int kv = (h - s.heads) % s.kv_heads;
        Head<C, kElements, kPacked> kept;
        keep(x[n].value, key ? s.key_scale : s.value_scale, kept.value);
        C* cache = static_cast<C*>(in.cache) + (key ? 0 : cache_elements(s));
        kept.write(cache + ((size_t(in.slot(sequence)) * s.kv_heads + kv) * s.capacity +
                            (kMore ? position % s.capacity : position)) *
                               s.head_dim,
                   lane);
    }
}

// Keys and values in flight, in shared memory. Each lane reads only what it requested itself.
template <typename T, int kElements, bool kPacked>
struct Ring {
    using H = Head<T, kElements, kPacked>;
    static constexpr int kSlots = std::max(1, 64 / H::kBytes);
    static constexpr int kBatch = kSlots >= 4 ? 2 : 1;  // keys that a group requests and takes together
    struct Slots {
        typename H::Packet data[kSlots][2][H::kPackets][kAttendThreads];
    };

    // Zeros unless `valid`.
    static __device__ void ask(Slots& ring, int slot, int which, const T* row, bool valid,
                               const Lane<kElements>& lane) {
        if constexpr (kPacked) {
            constexpr int kSize = int(sizeof(typename H::Packet));
#pragma unroll
            for (int i = 0; i < H::kPackets; ++i)
                asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(static_cast<unsigned>(
                                 __cvta_generic_to_shared(&ring.data[slot][which][i][threadIdx.x]))),
                             "l"(row + lane.begin + i * (kSize / int(sizeof(T)))), "n"(kSize),
                             "r"(valid && lane.count > 0 ? kSize : 0)
                             : "memory");
        } else {
            H head = {};
            if (valid) head.read(row, lane);
            put(ring, slot, which, head);
        }
    }

    static __device__ void put(Slots& ring, int slot, int which, const H& head) {
#pragma unroll
        for (int i = 0; i < H::kPackets; ++i)
            ring.data[slot][which][i][threadIdx.x] = reinterpret_cast<const typename H::Packet*>(head.value)[i];
    }

    static __device__ void get(const Slots& ring, int slot, int which, H& head) {
#pragma unroll
        for (int i = 0; i < H::kPackets; ++i)
            reinterpret_cast<typename H::Packet*>(head.value)[i] = ring.data[slot][which][i][threadIdx.x];
    }
};

// How the blocks of one head of a row send their spans' results to the block of its last span, in memory after the
// layer's cache. Each value carries the number of the join, one more than the head's counter, so a stale value is
// recognised. The receiving block was the last of them to start, so it never waits for a block that waits for room. It
// advances the counter only after it has received everything: every sender has read the counter by then.
struct Joint {
    static constexpr int kAhead = 2;
    unsigned* counter;
    uint64_t* words;  // [kMaxSpans, dim + 2]
    int width;
    unsigned number;

    // One for each head of the rows that can have several blocks.
    static __host__ __device__ size_t count(const cqil_attention_shape& s) {
        return s.heads > kJointHeads ? s.heads : kJointHeads;
    }
    static __host__ __device__ size_t counter_bytes(const cqil_attention_shape& s) {
        return align(sizeof(unsigned) * count(s));
    }
    static __host__ __device__ size_t bytes(const cqil_attention_shape& s) {
        return counter_bytes(s) + sizeof(uint64_t) * count(s) * kMaxSpans * (s.head_dim + 2);
    }

    __device__ Joint(char* memory, const cqil_attention_shape& s, int row, int head) : width(s.head_dim + 2) {
        const size_t index = min(size_t(row) * s.heads + head, count(s) - 1);  // a row with one block uses none
        counter = reinterpret_cast<unsigned*>(memory) + index;
        words = reinterpret_cast<uint64_t*>(memory + counter_bytes(s)) + index * kMaxSpans * width;
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(number) : "l"(counter) : "memory");
        ++number;
    }

    __device__ void send(int span, int i, float value) const {
        asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(words + span * width + i),
                     "l"(uint64_t(number) << 32 | __float_as_uint(value))
                     : "memory");
    }

    // Calls put(span, i, values i and i + 1) for everything that the spans before `own` send. The block's threads share
    // the work.
    template <typename Put>
    __device__ void receive(int own, const Limit& limit, Put&& put) const {
        Deadline deadline;
        const int pairs = own * width / 2;
#pragma unroll 1
        for (int begin = threadIdx.x; begin < pairs; begin += kAhead * kAttendThreads) {
            uint64_t word[kAhead][2];
            bool here[kAhead], all;
            do {
                all = true;
#pragma unroll
                for (int i = 0; i < kAhead; ++i)
                    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
                                 : "=l"(word[i][0]), "=l"(word[i][1])
                                 : "l"(words + 2 * min(begin + i * kAttendThreads, pairs - 1))
                                 : "memory");
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    here[i] = unsigned(word[i][0] >> 32) == number && unsigned(word[i][1] >> 32) == number;
                    all &= here[i];
                }
            } while (!all && !deadline.passed(limit.timeout_ns));
            if (!all) give_up(limit.record, 2 * min(begin + (here[0] ? kAttendThreads : 0), pairs - 1) / width);
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int at = 2 * (begin + i * kAttendThreads);
                if (at < 2 * pairs)
                    put(at / width, at % width, __uint_as_float(unsigned(word[i][0])),
                        __uint_as_float(unsigned(word[i][1])));
            }
        }
    }

    __device__ void end() const { *counter = number; }

private:
    __device__ void give_up(volatile GaveUp* record, int span) const {
        be_first_to_give_up(&gave_up);
        record->row = blockIdx.z;
        record->head = blockIdx.x;
        record->span = span;
        record->join = number;
        __threadfence_system();
        record->code = 1;
        __threadfence_system();
        __trap();
    }
};

// What attend_kernel computes: tokens whose keys are in the cache already, and in a decode step each sequence's next
// token, or that and the drafts after it.
enum class Pass { kPrompt, kStep, kDrafts };

// Blocks per multiprocessor that registers must leave room for when decoding. Without it nvcc aims higher and spills.
template <typename T, int kElements, Pass kPass>
constexpr int attend_blocks() {
    if (kPass == Pass::kPrompt) return 0;  // no constraint
    const int fewer = kPass == Pass::kDrafts;
    return (kElements <= 4 ? 4 : kElements <= 8 ? 3 : std::is_same_v<T, float> ? 1 + fewer : 2) - fewer;
}

// Dynamic shared memory: the ring, then the weighted values of the warps, for two spans in turn, and those of the
// spans. A block that has one span writes them over the ring, so that more room is left to products.
template <typename T, int kElements, bool kPacked>
struct AttendMemory {
    using Slots = typename Ring<T, kElements, kPacked>::Slots;
    using Values = float[kLanes * kElements];
    static constexpr size_t kSlotBytes = sizeof(Slots);
    static_assert(sizeof(Values) * (kAttendWarps + kMaxSpans) <= kSlotBytes, "both fit in the ring");

    static size_t bytes(int spans) {
        return spans == 1 ? kSlotBytes : kSlotBytes + sizeof(Values) * (2 * kAttendWarps + kMaxSpans);
    }
};

// One query against some spans of the keys. In a decode step it rotates the query and the new keys itself, and reads
// the older part of the cache while the previous kernel still computes them; grid: heads, blocks of a head, rows.
// Otherwise `queries` are rotated; grid: heads, tokens, sequences, and the whole cache is one span. All passes round
// alike, so where nvcc may contract in two ways the code says how. It is kept small: between two runs its instructions
// fall out of the caches that the weights stream through.
template <typename T, typename C, int kElements, bool kPacked, Pass kPass, bool kMore>
__global__ void __launch_bounds__(kAttendThreads, attend_blocks<T, kElements, kPass>())
    attend_kernel(cqil_attention_shape s, Inputs in, const T* queries, T* out, Spans spans, Limit limit) {
    using R = Ring<C, kElements, kPacked>;
    using H = Head<T, kElements, kPacked>;
    using Kept = Head<C, kElements, kPacked>;
    constexpr bool kDecode = kPass != Pass::kPrompt;
    using M = AttendMemory<C, kElements, kPacked>;
    extern __shared__ __align__(16) char memory[];
    auto& ring = *reinterpret_cast<typename M::Slots*>(memory);
    const bool one_span = !kDecode || spans.each == 1;
    auto* const of_warps = reinterpret_cast<typename M::Values*>(memory + (one_span ? 0 : M::kSlotBytes));
    auto* const of_spans = of_warps + (one_span ? 1 : 2) * kAttendWarps;
    release_successor();
    if constexpr (!kDecode) wait_for_predecessor();
    const int head = blockIdx.x, dim = s.head_dim, group = threadIdx.x / kLanes;
    const Lane<kElements> lane(threadIdx.x % kLanes, dim);
    const int row = kDecode ? blockIdx.z : blockIdx.z * s.length + blockIdx.y;
    const int token = kPass == Pass::kStep ? 0 : kDecode ? row % s.length : blockIdx.y;
    const int first_row = kDecode ? row - token : blockIdx.z;  // of the sequence, in `past` and `slots`
    const int kv = (head + s.first) / s.group, heads = s.heads + 2 * s.kv_heads;
    // Bypasses L1: a decode step reads these before it has waited (launch.cuh).
    const int past = __ldcg(in.past + first_row), position = past + token;
    const int count = min(position + 1, (kMore ? s.positions : s.capacity));
    const int cached = in.slot(first_row);
    const int begin = kMore ? first_seen(s, count) : 0, seen = count - begin;
    const int span = max((seen + spans.count - 1) / spans.count, kMinSpan<kElements>),
              span_count = (seen + span - 1) / span;
    const int own = kDecode ? blockIdx.y * spans.each : 0, own_end = min(own + spans.each, span_count);  // the block's
    if (own >= span_count) return;
    const int first = begin + own * span, last = min(begin + own_end * span, count);

    const Cells<kMore> cells(s, begin);
    const size_t line = (size_t(cached) * s.kv_heads + kv) * s.capacity;
    C* keys = static_cast<C*>(in.cache) + line * dim;
    const size_t to_values = cache_elements(s);
    const Joint joint(static_cast<char*>(in.cache) + align(2 * to_values * sizeof(C)), s, row, head);
    const int fresh = kDecode ? past : INT32_MAX;  // keys from here on are not in the cache yet
    int asked = first + group, asked_end = min(first + span, last);
    auto ask = [&](int slot) {  // requests the group's next keys; commits a group even if it is empty
#pragma unroll
        for (int b = 0; b < R::kBatch; ++b) {
            const bool valid = asked < min(asked_end, fresh);
            const C* key = keys + (valid ? size_t(cells.place(asked)) * dim : 0);
            R::ask(ring, slot + b, 0, key, valid, lane);
            R::ask(ring, slot + b, 1, key + to_values, valid, lane);
            asked += kAttendGroups;
        }
        if (asked - group >= asked_end) {  // the next span
            asked = asked_end + group;
            asked_end = min(asked_end + span, last);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll 1
    for (int slot = 0; slot < R::kSlots; slot += R::kBatch) ask(slot);

    H q;
    Kept own_key, own_value;
    auto rotation_at = [&](int at) {
        const int most = kMore ? s.positions : s.capacity;
        const int rotary = !kMore ? dim : in.cos == nullptr ? 0 : s.rotary;
        return Rotation<T, kElements, kPacked>(in, min(at, most - 1), lane, rotary);
    };
    auto read = [&](H& x, const T* from) { x.gather(from, lane, kMore ? s.rotary : dim); };
    // The weights of a norm for the `which`-th head of a kind, zeros without a norm.
    const bool whole_norm = kMore && in.squares != nullptr;  // of all heads together
    auto weights_of = [&](const void* norm, int which) {
        H weight = {};
        if (norm != nullptr) read(weight, static_cast<const T*>(norm) + (whole_norm ? which * dim : 0));
        return weight;
    };
    // Queries (`kind` 0) or keys (1) of token `of`.
    auto normalise = [&](H& x, const H& weight, int of, int kind) {
        x.normalise(weight, whole_norm ? in.squares + 2 * of + kind : nullptr, s.eps,
                    kMore ? s.norm : CQIL_NORM_ROUNDED, true, dim);
    };
    auto read_key = [&](int of, const H& weight, Kept& kept_key, Kept& kept_value,
                        const Rotation<T, kElements, kPacked>& rotation) {
        const T* source = static_cast<const T*>(in.qkv) + size_t(of) * heads * dim;
        H key, value;
        read(key, source + (s.heads + kv) * dim);
        value.read(source + (s.heads + s.kv_heads + kv) * dim, lane);
        if (in.k_norm != nullptr) normalise(key, weight, of, 1);
        rotation.apply(key, true, lane);
        keep(key.value, s.key_scale, kept_key.value);
        keep(value.value, s.value_scale, kept_value.value);
    };
    if constexpr (kDecode) {
        const Rotation<T, kElements, kPacked> rotation = rotation_at(position);
        const H q_weight = weights_of(in.q_norm, head), k_weight = weights_of(in.k_norm, kv);
        wait_for_predecessor();
        read(q, static_cast<const T*>(in.qkv) + (size_t(row) * heads + head) * dim);
        if (in.q_norm != nullptr) normalise(q, q_weight, row, 0);
        rotation.apply(q, true, lane);
        read_key(row, k_weight, own_key, own_value, rotation);
        // The first of the query heads that share this key appends it.
        if (group == 0 && position >= first && position < last && (head == 0 || (head - 1 + s.first) / s.group != kv)) {
            own_key.write(keys + size_t(cells.place(position)) * dim, lane);
            own_value.write(keys + to_values + size_t(cells.place(position)) * dim, lane);
        }
    } else {
        q.read(queries + (size_t(row) * s.heads + head) * dim, lane);
    }

    __shared__ float mosts[2][kAttendWarps], sums[2][kAttendWarps], span_mosts[kMaxSpans], span_sums[kMaxSpans];
    float query[kElements];  // scaled for powers of 2
    const float scale = !kMore ? rsqrtf(float(dim)) * kLog2e : s.cap == 0.0f ? s.scale * kLog2e : s.scale / s.cap;
#pragma unroll
    for (int e = 0; e < kElements; ++e) query[e] = wide(q.value[e]) * (scale * key_scale<C>(s));
    T* result = out + (size_t(row) * s.heads + head) * dim;
    const bool receives = own_end == span_count;
    int slot = 0;
    // The block's spans, each of which all threads then combine from the warps; at last, in the block that has the last
    // span, all spans.
#pragma unroll 1
    for (int i = own;; ++i) {
        const bool joins = i == own_end;
        const int turn = (i - own) % 2;
        if (!joins) {
            // An online softmax: maximum (times log2 e), sum of weights, weighted values. All lanes of a warp stay in
            // the loop together because they shuffle.
            float most = -INFINITY, sum = 0, value[kElements] = {};
            const int end = min(begin + (i + 1) * span, last);
#pragma unroll 1
            for (int j = begin + i * span + group; j - group < end; j += R::kBatch * kAttendGroups) {
                Kept k[R::kBatch], v[R::kBatch];
                asm volatile("cp.async.wait_group %0;" ::"n"(R::kSlots / R::kBatch - 1) : "memory");
#pragma unroll
                for (int b = 0; b < R::kBatch; ++b) {
                    R::get(ring, slot + b, 0, k[b]);
                    R::get(ring, slot + b, 1, v[b]);
                }
                ask(slot);
                slot = slot + R::kBatch == R::kSlots ? 0 : slot + R::kBatch;
                float score[R::kBatch] = {}, larger = most;
#pragma unroll
                for (int b = 0; b < R::kBatch; ++b) {
                    const int at = j + b * kAttendGroups;
                    if constexpr (kPass == Pass::kDrafts) {
                        // A key of a token before in the same step. A warp's two groups read theirs together.
                        if (at - group % 2 + 1 >= fresh) {
                            const int token_of = min(max(at, fresh), position);
                            Kept key, other;
                            read_key(first_row + token_of - fresh, weights_of(in.k_norm, kv), key, other,
                                     rotation_at(token_of));
                            if (at >= fresh) {
                                k[b] = key;
                                v[b] = other;
                            }
                        }
                    }
                    if (kDecode && at == position) {
                        k[b] = own_key;
                        v[b] = own_value;
                    }
                    float key[kElements];
                    widen(k[b].value, key);
#pragma unroll
                    for (int e = 0; e < kElements; ++e) score[b] = fmaf(query[e], key[e], score[b]);
                }
#pragma unroll
                for (int step = kLanes / 2; step > 0; step /= 2)
#pragma unroll
                    for (int b = 0; b < R::kBatch; ++b) score[b] += __shfl_xor_sync(~0u, score[b], step);
                if (j >= end) continue;
                if constexpr (kMore) {
                    if (s.cap != 0) {
#pragma unroll
                        for (int b = 0; b < R::kBatch; ++b) score[b] = capped(score[b], s.cap);
                    }
                }
#pragma unroll
                for (int b = 0; b < R::kBatch; ++b) {
                    if (j + b * kAttendGroups >= end) score[b] = -INFINITY;
                    larger = fmaxf(larger, score[b]);
                }
                const float before = power_of_2(most - larger);
                most = larger;
                sum = __fmul_rn(sum, before);
#pragma unroll
                for (int e = 0; e < kElements; ++e) value[e] *= before;
#pragma unroll
                for (int b = 0; b < R::kBatch; ++b) {
                    const float weight = power_of_2(score[b] - larger);
                    sum += weight;
                    float seen[kElements];
                    widen(v[b].value, seen);
#pragma unroll
                    for (int e = 0; e < kElements; ++e) value[e] = fmaf(weight, seen[e], value[e]);
                }
            }
            // A warp's two groups, in both of which the results are the same.
            const float larger = fmaxf(most, __shfl_xor_sync(~0u, most, kLanes));
            const float part = most == -INFINITY ? 0 : power_of_2(most - larger);
            sum = __fmul_rn(sum, part);
            sum += __shfl_xor_sync(~0u, sum, kLanes);
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
                value[e] = __fmul_rn(value[e], part);
                value[e] += __shfl_xor_sync(~0u, value[e], kLanes);
            }
            if (one_span) {  // the ring's memory is reused, also by zeros that are still to be written to it
                asm volatile("cp.async.wait_all;" ::: "memory");
                __syncthreads();
            }
            const int warp = threadIdx.x / 32;
            if (threadIdx.x % 32 == 0) {
                mosts[turn][warp] = larger;
                sums[turn][warp] = sum;
            }
            if (threadIdx.x % 32 < kLanes)
#pragma unroll
                for (int e = 0; e < kElements; ++e)
                    if (e < lane.count) of_warps[turn * kAttendWarps + warp][lane.begin + e] = value[e];
        }
        __syncthreads();
        const int parts = joins ? span_count : kAttendWarps;
        const float *of_most = joins ? span_mosts : mosts[turn], *of_sum = joins ? span_sums : sums[turn];
        const auto* of_value = joins ? of_spans : of_warps + turn * kAttendWarps;
        float top = -INFINITY, total = 0, factor[kMaxSpans] = {};
#pragma unroll
        for (int g = 0; g < kMaxSpans; ++g)
            if (g < parts) top = fmaxf(top, of_most[g]);
#pragma unroll
        for (int g = 0; g < kMaxSpans; ++g)
            if (g < parts) {
                factor[g] = of_most[g] == -INFINITY ? 0 : power_of_2(of_most[g] - top);
                total = fmaf(of_sum[g], factor[g], total);
            }
        const bool final = joins || span_count == 1;
#pragma unroll 1
        for (int j = threadIdx.x; j < dim; j += kAttendThreads) {
            float x = 0;
#pragma unroll
            for (int g = 0; g < kMaxSpans; ++g)
                if (g < parts) x = fmaf(of_value[g][j], factor[g], x);
            if (final)
                result[j] = narrow<T>(x / total * value_scale<C>(s));
            else if (receives)
                of_spans[i][j] = x;
            else
                joint.send(i, 2 + j, x);
        }
        if (final) {
            if (own > 0 && threadIdx.x == 0) joint.end();
            return;
        }
        if (receives && threadIdx.x == 0) {
            span_mosts[i] = top;
            span_sums[i] = total;
        } else if (!receives && threadIdx.x < 2) {
            joint.send(i, threadIdx.x, threadIdx.x == 0 ? top : total);
        }
        if (i + 1 < own_end) continue;
        if (!receives) return;
        joint.receive(own, limit, [&](int of, int at, float one, float two) {
            (at == 0 ? span_mosts[of] : of_spans[of][at - 2]) = one;
            (at == 0 ? span_sums[of] : of_spans[of][at - 1]) = two;
        });
    }
}

// The caches that attention has used on a stream since the last point that no later kernel can overtake. Only these can
// be read too early.
class Touched {
public:
    // Records the use of a cache on a stream. *overlap: whether a kernel that reads the cache early may overlap its
    // predecessors; if not, it must be launched without overlap.
    int note(cudaStream_t stream, const void* cache, bool early, bool* overlap) {
        std::lock_guard<std::mutex> lock(mutex_);
        Caches* caches = nullptr;
        if (find(stream, &caches)) return -1;
        // This handle means a different stream in every thread.
        *overlap = stream != cudaStreamPerThread && caches->count(cache) == 0;
        if (early && !*overlap) caches->clear();
        caches->insert(cache);
        return 0;
    }

    int clear(cudaStream_t stream) {
        std::lock_guard<std::mutex> lock(mutex_);
        Caches* caches = nullptr;
        if (find(stream, &caches)) return -1;
        caches->clear();
        return 0;
    }

private:
    using Caches = std::set<const void*>;

    // A graph starts after everything before it has ended, and ends before anything after it starts. So its kernels and
    // the ones launched on the stream itself cannot overlap: each have their own set.
    struct Stream {
        Caches launched;
        unsigned long long capture = 0;  // 0: none
        Caches captured;
    };

    int find(cudaStream_t handle, Caches** caches) {
        int device = 0;
        CQIL_CUDA(cudaGetDevice(&device));
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        unsigned long long capture = 0;
        CQIL_CUDA(cudaStreamGetCaptureInfo(handle, &status, &capture));
        Stream& stream = streams_[{device, handle == nullptr ? cudaStreamLegacy : handle}];
        if (status != cudaStreamCaptureStatusActive) capture = 0;
        if (capture != stream.capture) {
            stream.capture = capture;
            stream.captured.clear();
        }
        *caches = capture == 0 ? &stream.launched : &stream.captured;
        return 0;
    }

    std::mutex mutex_;
    std::map<std::pair<int, cudaStream_t>, Stream> streams_;
};

Touched& touched() {
    static auto* all = new Touched;
    return *all;
}

std::atomic<uint64_t> timeout_ns{uint64_t(kDefaultTimeoutSeconds * 1e9)};
std::mutex record_mutex;
std::atomic<GaveUp*> record{nullptr};

// Page-locked memory stays readable after the device is lost. It is never freed because graphs hold its address.
int find_limit(Limit* limit) {
    if (record == nullptr) {
        std::lock_guard<std::mutex> lock(record_mutex);
        void* memory = record;
        if (memory == nullptr) {
            // The default mode forbids allocation during this thread's capture, but this one does not affect it.
            cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
            CQIL_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
            const cudaError_t error =
                cudaHostAlloc(&memory, sizeof(GaveUp), cudaHostAllocMapped | cudaHostAllocPortable);
            CQIL_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
            CQIL_CUDA(error);
            *static_cast<GaveUp*>(memory) = {};
            record = static_cast<GaveUp*>(memory);
        }
    }
    *limit = {timeout_ns, record};
    return 0;
}

template <typename T, typename C, int kElements, bool kPacked, bool kMore>
int attend(const cqil_attention_shape& s, const Inputs& in, void* out, void* scratch, cudaStream_t stream) {
    bool overlap = true;
    const bool decode = s.length == 1 || s.drafts != 0;
    if (touched().note(stream, in.cache, decode, &overlap)) return -1;
    T* result = static_cast<T*>(out);
    using M = AttendMemory<C, kElements, kPacked>;
    if (decode) {
        int processors = 0;
        if (device_attribute(cudaDevAttrMultiProcessorCount, &processors)) return -1;
        const int rows = s.batch * s.length;
        const Spans spans = spans_of(s, rows, processors);
        const Launch l = {dim3(s.heads, spans.blocks(), rows), kAttendThreads, stream, overlap, M::bytes(spans.each)};
        Limit limit = {};
        if (find_limit(&limit)) return -1;
        return s.length == 1 ? launch(attend_kernel<T, C, kElements, kPacked, Pass::kStep, kMore>, l, s, in, nullptr,
                                      result, spans, limit)
                             : launch(attend_kernel<T, C, kElements, kPacked, Pass::kDrafts, kMore>, l, s, in, nullptr,
                                      result, spans, limit);
    }
    T* queries = static_cast<T*>(scratch);
    const int heads = s.heads + 2 * s.kv_heads;
    const dim3 grid(s.batch * s.length, (heads + kAppended * kGroups - 1) / (kAppended * kGroups));
    if (launch(append_kernel<T, C, kElements, kPacked, kMore>, {grid, kThreads, stream}, s, in, queries)) return -1;
    if (!std::is_same_v<T, float> && s.head_dim % 8 == 0 && s.head_dim <= kFlashDim) {
        const C *keys = static_cast<const C*>(in.cache), *values = keys + cache_elements(s);
        const bool fp8 = is_fp8<C>;
        Flash f = {};
        f.queries = queries, f.keys = keys, f.values = values, f.out = out, f.past = in.past, f.slots = in.slots;
        f.length = s.length, f.heads = s.heads, f.kv_heads = s.kv_heads, f.group = s.group, f.first = s.first;
        f.dim = s.head_dim, f.capacity = s.capacity, f.positions = s.positions, f.window = s.window, f.cap = s.cap;
        f.scale = (s.scale != 0 ? s.scale : 1 / std::sqrt(float(s.head_dim))) * (fp8 ? s.key_scale : 1);
        f.value_scale = fp8 ? s.value_scale : 1;
        return flash_attention(f, s.dtype, fp8, s.batch, stream);
    }
    return launch(attend_kernel<T, C, kElements, kPacked, Pass::kPrompt, kMore>,
                  {dim3(s.heads, s.length, s.batch), kAttendThreads, stream, true, M::bytes(1)}, s, in, queries, result,
                  Spans{1, 1}, Limit{});
}

// Whether the kernels with kMore are needed.
bool needs_more(const cqil_attention_shape& s, const Inputs& in) {
    const bool norms = in.q_norm != nullptr && (s.norm != CQIL_NORM_ROUNDED || in.squares != nullptr);
    return norms || s.window != 0 || s.rotary != s.head_dim || s.scale != 0 || s.cap != 0 || in.cos == nullptr;
}

template <typename T, typename C, int kElements>
int attend(cqil_attention_shape s, const Inputs& in, void* out, void* scratch, cudaStream_t stream) {
    if (s.rotary == 0) s.rotary = s.head_dim;
    if (s.positions == 0) s.positions = s.capacity;
    if (s.window >= s.positions) s.window = 0;
    const bool packed = is_packed<kElements>(s.head_dim, s.rotary);
    if (!needs_more(s, in))
        return packed ? attend<T, C, kElements, true, false>(s, in, out, scratch, stream)
                      : attend<T, C, kElements, false, false>(s, in, out, scratch, stream);
    if (s.scale == 0) s.scale = 1 / std::sqrt(float(s.head_dim));
    // Of the kernels that are not packed, one takes every head.
    return packed ? attend<T, C, kElements, true, true>(s, in, out, scratch, stream)
                  : attend<T, C, kMaxHeadDim / kLanes, false, true>(s, in, out, scratch, stream);
}

template <typename T, typename C>
int attend(const cqil_attention_shape& s, const Inputs& in, void* out, void* scratch, cudaStream_t stream) {
    if (s.head_dim <= 64) return attend<T, C, 4>(s, in, out, scratch, stream);
    if (s.head_dim <= 128) return attend<T, C, 8>(s, in, out, scratch, stream);
    return attend<T, C, 16>(s, in, out, scratch, stream);
}

int check(const cqil_attention_shape& s) {
    if (s.batch < 0 || s.batch > s.max_batch || s.length < 0 || s.capacity < 1 || s.heads < 1 || s.kv_heads < 1)
        return fail("%d of %d sequences, %d tokens of %d, %d and %d heads", s.batch, s.max_batch, s.length, s.capacity,
                    s.heads, s.kv_heads);
    if (s.head_dim < 2 || s.head_dim % 2 || s.head_dim > kMaxHeadDim)
        return fail("head dimension %d is not an even number up to %d", s.head_dim, kMaxHeadDim);
    if (s.group < 1 || s.first < 0 || (s.heads - 1 + s.first) / s.group >= s.kv_heads)
        return fail("%d query heads from %d in groups of %d need more than %d key/value heads", s.heads, s.first,
                    s.group, s.kv_heads);
    if (s.window < 0 || s.rotary < 0 || s.rotary % 2 || s.rotary > s.head_dim)
        return fail("a window of %d, %d of %d elements rotated", s.window, s.rotary, s.head_dim);
    if (s.positions != 0 && s.positions != s.capacity &&
        (s.positions < s.capacity || s.capacity % CQIL_CIRCLE_STEP || s.window < 1 ||
         s.capacity < int64_t(s.window) + s.length - 1))
        return fail("a circle of %d positions of %d, for %d tokens and a window of %d", s.capacity, s.positions,
                    s.length, s.window);
    if (s.norm < CQIL_NORM_ROUNDED || s.norm > CQIL_NORM_OFFSET || !(s.scale >= 0 && s.cap >= 0))
        return fail("norms of kind %d, a scale of %g, a cap of %g", s.norm, double(s.scale), double(s.cap));
    if (s.dtype < CQIL_FLOAT32 || s.dtype > CQIL_BFLOAT16) return fail("type %d is not known", s.dtype);
    if (s.cache != CQIL_CACHE_PLAIN && s.cache != CQIL_CACHE_FP8) return fail("cache %d is not known", s.cache);
    if (s.cache == CQIL_CACHE_FP8 && !(s.key_scale > 0 && s.value_scale > 0))
        return fail("scales %g and %g of a cache are not above 0", s.key_scale, s.value_scale);
    if (s.batch > 65535 || s.length > 65535 || (s.drafts != 0 && int64_t(s.batch) * s.length > 65535))
        return fail("%d sequences or %d tokens are too many", s.batch, s.length);
    return 0;
}

}  // namespace

int cqil_trt::note_full_wait(cudaStream_t stream) { return touched().clear(stream); }

extern "C" {

size_t cqil_attention_cache_bytes(const cqil_attention_shape* s) {
    return align(2 * cache_elements(*s) * cache_element_bytes(*s)) + Joint::bytes(*s);
}

size_t cqil_attention_scratch_bytes(const cqil_attention_shape* s) {
    return align(size_t(s->batch) * s->length * s->heads * s->head_dim * element_bytes(s->dtype));
}

int cqil_attention_timeout(double seconds) {
    uint64_t nanoseconds = 0;
    if (to_nanoseconds(seconds, &nanoseconds)) return -1;
    timeout_ns = nanoseconds;
    return 0;
}

const char* cqil_attention_failure(void) {
    const volatile GaveUp* r = record;
    if (r == nullptr || r->code == 0) return nullptr;
    thread_local char text[256];
    snprintf(text, sizeof(text),
             "attention gave up waiting for part %u of head %u of row %u, in the head's join number %u: another block "
             "of the same kernel did not deliver it within the time limit",
             r->span, r->head, r->row, r->join);
    return text;
}

int cqil_attention(const cqil_attention_shape* s, const void* qkv, const int32_t* past, const int32_t* slots,
                   const float* cos, const float* sin, const void* q_norm, const void* k_norm, const float* squares,
                   void* cache, void* out, void* scratch, void* stream) {
    if (check(*s)) return -1;
    if ((q_norm == nullptr) != (k_norm == nullptr)) return fail("one head norm of two is given");
    if ((cos == nullptr) != (sin == nullptr)) return fail("one rotary table of two is given");
    if (s->batch == 0 || s->length == 0) return 0;
    const Inputs in = {qkv, past, slots, cos, sin, q_norm, k_norm, squares, cache};
    auto st = static_cast<cudaStream_t>(stream);
    return by_type(s->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return s->cache == CQIL_CACHE_FP8 ? attend<T, Fp8>(*s, in, out, scratch, st)
                                          : attend<T, T>(*s, in, out, scratch, st);
    });
}

}  // extern "C"
