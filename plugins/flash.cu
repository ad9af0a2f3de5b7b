// Attention of prompts (flash.cuh), of every type.

#include "errors.h"
#include "flash.cuh"
#include "types.cuh"

int cqil_trt::flash_attention(const Flash& f, int dtype, bool fp8, int batch, cudaStream_t stream) {
    int processors = 0;
    if (device_attribute(cudaDevAttrMultiProcessorCount, &processors)) return -1;
    return by_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (std::is_same_v<T, float>)
            return fail("tensor cores attend in half types");
        else
            return fp8 ? flash<T, Fp8>(f, batch, processors, stream) : flash<T, T>(f, batch, processors, stream);
    });
}
