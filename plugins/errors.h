// How functions of the C interface fail: `return fail(...)` leaves the message for cqil_last_error().
#pragma once

namespace cqil_trt {

int fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

#define CQIL_CUDA(call)                                                                                             \
    do {                                                                                                            \
        cudaError_t error_ = (call);                                                                                \
        if (error_ != cudaSuccess) return cqil_trt::fail("%s: %s", #call, cudaGetErrorString(error_));              \
    } while (0)

}  // namespace cqil_trt
