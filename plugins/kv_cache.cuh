// The elements of a KV cache: of the engine's type, or FP8 codes (E4M3) of values that are divided by a scale.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "cqil_trt.h"
#include "types.cuh"

namespace cqil_trt {

using Fp8 = __nv_fp8_e4m3;

template <typename C>
constexpr bool is_fp8 = std::is_same_v<C, Fp8>;

inline size_t cache_element_bytes(const cqil_attention_shape& s) {
    return s.cache == CQIL_CACHE_FP8 ? sizeof(Fp8) : element_bytes(s.dtype);
}

// What scores and results are multiplied by, because keys and values were divided by it.
template <typename C>
__device__ float key_scale(const cqil_attention_shape& s) {
    return is_fp8<C> ? s.key_scale : 1.0f;
}

template <typename C>
__device__ float value_scale(const cqil_attention_shape& s) {
    return is_fp8<C> ? s.value_scale : 1.0f;
}

// The elements that a cache of type C keeps. Codes are rounded to even; the largest stands for all that are larger.
template <typename C, typename T, int kCount>
__device__ void keep(const T (&values)[kCount], float scale, C (&kept)[kCount]) {
    if constexpr (is_fp8<C>) {
        static_assert(kCount % 2 == 0, "codes are made in pairs");
        const float inverse = 1 / scale;
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
            const float2 two = {float(values[i]) * inverse, float(values[i + 1]) * inverse};
            const __nv_fp8x2_storage_t codes = __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3);
            kept[i].__x = __nv_fp8_storage_t(codes & 0xff);
            kept[i + 1].__x = __nv_fp8_storage_t(codes >> 8);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) kept[i] = values[i];
    }
}

// Two codes as what they stand for, which half types hold exactly.
__device__ inline float2 two_values(const Fp8* codes) {
    const auto two = __nv_fp8x2_storage_t(codes[0].__x | codes[1].__x << 8);
    return __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
}

// Elements of a cache as float32.
template <typename C, int kCount>
__device__ void widen(const C (&kept)[kCount], float (&values)[kCount]) {
    if constexpr (is_fp8<C>) {
        static_assert(kCount % 2 == 0, "codes are read in pairs");
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
            const float2 two = two_values(kept + i);
            values[i] = two.x;
            values[i + 1] = two.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = float(kept[i]);
    }
}

// 16 bytes of elements of type T from a row, the ones after `packet` times as many.
template <typename T, typename C>
__device__ uint4 load_packet(const C* row, int packet) {
    if constexpr (is_fp8<C>) {
        constexpr int kCount = 16 / int(sizeof(T));
        const C* from = row + packet * kCount;
        alignas(8) Fp8 codes[kCount];
        if constexpr (kCount == 8)
            *reinterpret_cast<uint2*>(codes) = *reinterpret_cast<const uint2*>(from);
        else
            *reinterpret_cast<uint32_t*>(codes) = *reinterpret_cast<const uint32_t*>(from);
        float values[kCount];
        widen(codes, values);
        alignas(16) T wide[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) wide[i] = T(values[i]);
        return *reinterpret_cast<const uint4*>(wide);
    } else {
        return reinterpret_cast<const uint4*>(row)[packet];
    }
}

}  // namespace cqil_trt
