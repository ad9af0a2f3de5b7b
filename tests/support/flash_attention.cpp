// plugins/flash.cuh on a host, for Python.

#include "flash.cuh"

extern "C" int attend(const void* queries, const void* keys, const void* values, void* out, const int32_t* past,
                      const int32_t* slots, int batch, int length, int heads, int kv_heads, int dim, int capacity,
                      int group, int first) {
    const cqil_trt::Flash f = {queries, keys,     values, out,      past,  slots, length,
                               heads,   kv_heads, dim,    capacity, group, first};
    return cqil_trt::flash<_Float16>(f, batch, nullptr);
}
