// plugins/flash.cuh on a host, for Python.

#include "flash.cuh"

using namespace cqil_trt;

extern "C" int attend(const void* queries, const void* keys, const void* values, void* out, const int32_t* past,
                      const int32_t* slots, int batch, int length, int heads, int kv_heads, int dim, int capacity,
                      int positions, int group, int first, int window, float scale, float value_scale, float cap,
                      int fp8, int processors) {
    const Flash f = {queries, keys,     values,    out,   past,  slots,  length, heads,       kv_heads,
                     dim,     capacity, positions, group, first, window, scale,  value_scale, cap};
    return fp8 ? flash<_Float16, Fp8>(f, batch, processors, nullptr)
               : flash<_Float16, _Float16>(f, batch, processors, nullptr);
}
