// How functions of the C interface fail: `return fail(...)` leaves the message for cqil_last_error().
#pragma once

#include <cuda_runtime_api.h>

namespace cqil_trt {

int fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// fail() for an error that CUDA reports. Names the kernel that gave up, where that is the cause.
int fail_cuda(const char* call, cudaError_t error);

#define CQIL_CUDA(call)                                                       \
    do {                                                                      \
        cudaError_t error_ = (call);                                          \
        if (error_ != cudaSuccess) return cqil_trt::fail_cuda(#call, error_); \
    } while (0)

}  // namespace cqil_trt
