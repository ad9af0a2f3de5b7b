// library_product of plugins/library_linear.cu for Python, with the errors that collectives.cu would keep.

#include <cstdarg>
#include <cstdio>

#include "linear.cuh"

namespace {

char error[512];

}  // namespace

int cqil_trt::fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, sizeof(error), format, arguments);
    va_end(arguments);
    return -1;
}

int cqil_trt::fail_cuda(const char* call, cudaError_t) { return fail("%s", call); }

extern "C" {

const char* last_error() { return error; }

int product(const float* x, const float* weight, const float* bias, const float* residual, float* out, int rows,
            int outputs, int inputs) {
    const cqil_trt::Operands o = {x,       nullptr, weight,  bias,   nullptr, residual, out,
                                  nullptr, rows,    outputs, inputs, 0,       1};
    return cqil_trt::library_product(o, CQIL_FLOAT32, nullptr, nullptr);
}

}  // extern "C"
