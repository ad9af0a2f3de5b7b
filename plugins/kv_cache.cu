// Reads a KV cache in FP8 for a library's attention, which takes keys and values of the engine's type.

#include <algorithm>
#include <type_traits>

#include "errors.h"
#include "kv_cache.cuh"
#include "launch.cuh"

using namespace cqil_trt;

namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 32;  // per head

// Grid: blocks of a head, heads of keys and then of values. kWidth elements a thread and turn.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    read_kernel(cqil_attention_shape s, const int32_t* past, const int32_t* slots, const Fp8* cache, T* out) {
    release_successor();
    wait_for_predecessor();
    const size_t each = size_t(s.capacity) * s.head_dim, count = size_t(min(*past + s.length, s.capacity)) * s.head_dim;
    const int head = blockIdx.y % s.kv_heads, part = blockIdx.y / s.kv_heads, slot = slots == nullptr ? 0 : *slots;
    const Fp8* from = cache + ((size_t(part) * s.max_batch + slot) * s.kv_heads + head) * each;
    T* to = out + blockIdx.y * each;
    for (size_t i = (size_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth; i < count;
         i += size_t(gridDim.x) * kThreads * kWidth) {
        alignas(kWidth) Fp8 codes[kWidth];
        using Packet = std::conditional_t<kWidth == 8, uint2, uint16_t>;
        *reinterpret_cast<Packet*>(codes) = *reinterpret_cast<const Packet*>(from + i);
        float values[kWidth];
        widen(codes, values);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) to[i + j] = T(values[j]);
    }
}

template <typename T, int kWidth>
int read(const cqil_attention_shape& s, const int32_t* past, const int32_t* slots, const void* cache, T* out,
         cudaStream_t stream) {
    const int64_t turn = int64_t(kThreads) * kWidth, each = int64_t(s.capacity) * s.head_dim;
    const dim3 grid(int(std::min<int64_t>((each + turn - 1) / turn, kMaxBlocks)), 2 * s.kv_heads);
    return launch(read_kernel<T, kWidth>, {grid, kThreads, stream}, s, past, slots, static_cast<const Fp8*>(cache),
                  out);
}

}  // namespace

extern "C" int cqil_read_cache(const cqil_attention_shape* s, const int32_t* past, const int32_t* slots,
                               const void* cache, void* out, void* stream) {
    if (s->cache != CQIL_CACHE_FP8) return fail("a cache that is not in FP8 is read as it is");
    if (s->batch != 1 || s->head_dim < 2 || s->head_dim % 2 || s->kv_heads < 1 || s->capacity < 1)
        return fail("%d sequences, %d heads of %d elements, %d tokens", s->batch, s->kv_heads, s->head_dim,
                    s->capacity);
    auto st = static_cast<cudaStream_t>(stream);
    return by_type(s->dtype, [&](auto* type) {
        auto* to = static_cast<decltype(type)>(out);
        const bool wide = int64_t(s->capacity) * s->head_dim % 8 == 0;
        return wide ? read<std::remove_pointer_t<decltype(type)>, 8>(*s, past, slots, cache, to, st)
                    : read<std::remove_pointer_t<decltype(type)>, 2>(*s, past, slots, cache, to, st);
    });
}
