// Element types and aligned sizes for the kernels' host code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>

#include "cqil_trt.h"
#include "errors.h"

namespace cqil_trt {

inline size_t element_bytes(int dtype) { return dtype == CQIL_FLOAT32 ? 4 : 2; }

// Parts of scratch memory and of caches start at multiples of 256 bytes.
__host__ __device__ inline size_t align(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Calls `run` with a null pointer of the element type; fails for an unknown type.
template <typename F>
int by_type(int dtype, F run) {
    switch (dtype) {
        case CQIL_FLOAT32: return run(static_cast<float*>(nullptr));
        case CQIL_FLOAT16: return run(static_cast<__half*>(nullptr));
        case CQIL_BFLOAT16: return run(static_cast<__nv_bfloat16*>(nullptr));
        default: return fail("type %d is not known", dtype);
    }
}

}  // namespace cqil_trt
