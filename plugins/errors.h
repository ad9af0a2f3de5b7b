// How functions of the C interface fail: `return fail(...)` stores the message for cqil_last_error().
#pragma once

#include <cuda_runtime_api.h>

namespace cqil_trt {

int fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// fail() for a CUDA error. Adds why attention gave up, if it did.
int fail_cuda(const char* call, cudaError_t error);

#define CQIL_CUDA(call)                                                       \
    do {                                                                      \
        cudaError_t error_ = (call);                                          \
        if (error_ != cudaSuccess) return cqil_trt::fail_cuda(#call, error_); \
    } while (0)

}  // namespace cqil_trt
