// cuBLASLt on a host, as far as plugins/library_linear.cu uses it, for float32; written from the library's
// documentation. It refuses what that says is wrong. And what library_linear.cu asks of CUDA, without a GPU.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

namespace {

constexpr int kInvalid = 7, kNotSupported = 15;

struct Desc {
    int compute, scale;
    int32_t transpose_a = 0;
    uint32_t epilogue = 1;
    const float* bias = nullptr;
};

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};

struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

int handle_of_this_library;

template <typename T>
int take(T* to, const void* value, size_t size) {
    if (size != sizeof(T)) return kInvalid;
    std::memcpy(to, value, size);
    return 0;
}

}  // namespace

extern "C" {

int cudaGetDevice(int* device) {
    *device = 0;
    return 0;
}

int cudaThreadExchangeStreamCaptureMode(int*) { return 0; }

int cudaDriverGetVersion(int* version) {
    *version = 13000;
    return 0;
}

// The release of CUDA that this library was made with.
size_t cublasLtGetCudartVersion() {
    const char* release = std::getenv("HOST_CUBLASLT_CUDA");
    return release == nullptr ? 12080 : std::atoi(release);
}

int cublasLtCreate(void** handle) {
    *handle = &handle_of_this_library;
    return 0;
}

int cublasLtMatmulDescCreate(void** desc, int compute, int scale) {
    *desc = new Desc{compute, scale};
    return compute == 68 && scale == 0 ? 0 : kInvalid;  // CUBLAS_COMPUTE_32F, CUDA_R_32F
}

int cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value, size_t size) {
    auto* d = static_cast<Desc*>(desc);
    switch (attribute) {
        case 3: return take(&d->transpose_a, value, size);
        case 7: return take(&d->epilogue, value, size);
        case 8: return take(&d->bias, value, size);
        default: return kInvalid;
    }
}

int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *layout = new Layout{type, rows, columns, stride};
    return type == 0 ? 0 : kInvalid;
}

int cublasLtMatmulPreferenceCreate(void** preference) {
    *preference = new std::map<int, uint64_t>;
    return 0;
}

int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t size) {
    uint32_t narrow = 0;
    uint64_t wide = 0;
    if (attribute == 1 ? take(&wide, value, size) : take(&narrow, value, size)) return kInvalid;
    (*static_cast<std::map<int, uint64_t>*>(preference))[attribute] = attribute == 1 ? wide : narrow;
    return 0;
}

int cublasLtMatmulPreferenceDestroy(void* preference) {
    delete static_cast<std::map<int, uint64_t>*>(preference);
    return 0;
}

// Supports any shape of at most 64 outputs, if it may have a workspace and no sum may be rounded on the way.
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void* d, void* preference, int wanted,
                                   Heuristic* found, int* count) {
    auto& asked = *static_cast<std::map<int, uint64_t>*>(preference);
    if (wanted < 1 || asked[1] == 0 || asked[3] != 2) return kInvalid;
    for (const int alignment : {5, 6, 7, 8})
        if (asked[alignment] < 4 || asked[alignment] > 256) return kInvalid;
    *count = static_cast<Layout*>(d)->rows <= 64;
    *found = {};
    found->algorithm[0] = 42;
    return *count ? 0 : kNotSupported;
}

int cublasLtMatmul(void* handle, void* desc, const float* alpha, const float* a, void* a_layout, const float* b,
                   void* b_layout, const float* beta, const float* c, void* c_layout, float* d, void* d_layout,
                   const uint64_t* algorithm, void*, size_t, void*) {
    const auto* o = static_cast<Desc*>(desc);
    const auto *la = static_cast<Layout*>(a_layout), *lb = static_cast<Layout*>(b_layout),
               *lc = static_cast<Layout*>(c_layout), *ld = static_cast<Layout*>(d_layout);
    const bool fits = o->transpose_a == 1 && la->columns == ld->rows && la->rows == lb->rows &&
                      lb->columns == ld->columns && lc->rows == ld->rows && lc->columns == ld->columns;
    if (handle != &handle_of_this_library || algorithm[0] != 42 || !fits) return kInvalid;
    for (uint64_t column = 0; column < ld->columns; ++column)
        for (uint64_t row = 0; row < ld->rows; ++row) {
            double sum = 0;
            for (uint64_t k = 0; k < la->rows; ++k)
                sum += double(a[row * la->stride + k]) * double(b[column * lb->stride + k]);
            sum *= *alpha;
            if (*beta != 0) sum += double(*beta) * double(c[column * lc->stride + row]);
            if (o->epilogue == 4) sum += o->bias[row];
            d[column * ld->stride + row] = float(sum);
        }
    return 0;
}

}  // extern "C"
