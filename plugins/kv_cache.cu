// Reads a KV cache in FP8, or one that is a circle, for a library's attention: it takes keys and values of the engine's
// type, in their order.

#include <algorithm>
#include <type_traits>

#include "errors.h"
#include "kv_cache.cuh"
#include "launch.cuh"

using namespace cqil_trt;

namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 32;  // per head

template <size_t kBytes>
using Packet =
    std::conditional_t<kBytes == 2, uint16_t,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>>;

// Grid: blocks of a head, heads of keys and then of values. kWidth elements a thread and turn.
template <typename T, typename C, int kWidth, bool kCircle>
__global__ void __launch_bounds__(kThreads)
    read_kernel(cqil_attention_shape s, const int32_t* past, const int32_t* slots, const C* cache, T* out) {
    release_successor();
    wait_for_predecessor();
    const int end = min(*past + s.length, kCircle ? s.positions : s.capacity);
    const int first = kCircle ? max(*past + 1 - s.window, 0) : 0;
    const size_t each = size_t(s.capacity) * s.head_dim, count = size_t(end - first) * s.head_dim;
    const size_t begin = kCircle ? size_t(first % s.capacity) * s.head_dim : 0;
    const int head = blockIdx.y % s.kv_heads, part = blockIdx.y / s.kv_heads, slot = slots == nullptr ? 0 : *slots;
    const C* from = cache + ((size_t(part) * s.max_batch + slot) * s.kv_heads + head) * each;
    T* to = out + blockIdx.y * each;
    for (size_t i = (size_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth; i < count;
         i += size_t(gridDim.x) * kThreads * kWidth) {
        size_t at = begin + i;
        if (kCircle && at >= each) at -= each;
        using Kept = Packet<sizeof(C) * kWidth>;
        alignas(Kept) C kept[kWidth];
        *reinterpret_cast<Kept*>(kept) = *reinterpret_cast<const Kept*>(from + at);
        if constexpr (std::is_same_v<C, T>) {
            *reinterpret_cast<Kept*>(to + i) = *reinterpret_cast<const Kept*>(kept);
        } else {
            float values[kWidth];
            widen(kept, values);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) to[i + j] = T(values[j]);
        }
    }
}

template <typename C, bool kCircle, int kWidth, typename T>
int read(const cqil_attention_shape& s, const int32_t* past, const int32_t* slots, const void* cache, T* out,
         cudaStream_t stream) {
    const int64_t turn = int64_t(kThreads) * kWidth, each = int64_t(s.capacity) * s.head_dim;
    const dim3 grid(int(std::min<int64_t>((each + turn - 1) / turn, kMaxBlocks)), 2 * s.kv_heads);
    return launch(read_kernel<T, C, kWidth, kCircle>, {grid, kThreads, stream}, s, past, slots,
                  static_cast<const C*>(cache), out);
}

// kWidth elements at a time where rows, or a whole head's, are a multiple of them; else two.
template <typename C, bool kCircle, typename T>
int read(const cqil_attention_shape& s, const int32_t* past, const int32_t* slots, const void* cache, T* out,
         cudaStream_t stream) {
    constexpr int kWidth = is_fp8<C> ? 8 : 16 / int(sizeof(C));
    const int64_t together = kCircle ? s.head_dim : int64_t(s.capacity) * s.head_dim;
    return together % kWidth == 0 ? read<C, kCircle, kWidth>(s, past, slots, cache, out, stream)
                                  : read<C, kCircle, 2>(s, past, slots, cache, out, stream);
}

}  // namespace

extern "C" int cqil_read_cache(const cqil_attention_shape* s, const int32_t* past, const int32_t* slots,
                               const void* cache, void* out, void* stream) {
    const bool circle = s->positions > s->capacity;
    if (s->cache != CQIL_CACHE_FP8 && !circle)
        return fail("a cache that is neither in FP8 nor a circle is read as it is");
    if (s->batch != 1 || s->head_dim < 2 || s->head_dim % 2 || s->kv_heads < 1 || s->capacity < 1)
        return fail("%d sequences, %d heads of %d elements, %d tokens", s->batch, s->kv_heads, s->head_dim,
                    s->capacity);
    if (circle && s->capacity < int64_t(s->window) + s->length - 1)
        return fail("%d tokens and a window of %d, of a circle of %d", s->length, s->window, s->capacity);
    auto st = static_cast<cudaStream_t>(stream);
    return by_type(s->dtype, [&](auto* type) {
        auto* to = static_cast<decltype(type)>(out);
        using T = std::remove_pointer_t<decltype(type)>;
        if (s->cache != CQIL_CACHE_FP8) return read<T, true>(*s, past, slots, cache, to, st);
        return circle ? read<Fp8, true>(*s, past, slots, cache, to, st)
                      : read<Fp8, false>(*s, past, slots, cache, to, st);
    });
}
