// Products of many rows by cuBLASLt, which is looked up when it is first needed: nothing is linked against it, and
// where it is not, our kernels multiply (linear.cu).

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <type_traits>

#include "cqil_trt.h"
#include "errors.h"
#include "linear.cuh"
#include "types.cuh"

using namespace cqil_trt;

namespace {

// cuBLASLt's interface, as far as it is used. Releases 12 and 13 have the same, under the same numbers (cublasLt.h).
constexpr int kCompute32F = 68, kReal32F = 0, kReal16F = 2, kReal16BF = 14, kTransposed = 1;
constexpr int kDescTransposeA = 3, kDescEpilogue = 7, kDescBiasPointer = 8;
constexpr int kPreferenceWorkspace = 1, kPreferenceReductions = 3, kPreferenceAlignment = 5;  // of A; then B, C, D
constexpr int kEpilogueDefault = 1, kEpilogueBias = 4;
constexpr uint32_t kReduceInComputeType = 2;

struct Algorithm {
    uint64_t data[8];
};

struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

struct Interface {
    int (*create)(void** handle);
    int (*desc_create)(void** desc, int compute, int scale);
    int (*desc_set)(void* desc, int attribute, const void* value, size_t size);
    int (*layout_create)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride);
    int (*preference_create)(void** preference);
    int (*preference_set)(void* preference, int attribute, const void* value, size_t size);
    int (*preference_destroy)(void* preference);
    int (*heuristic)(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference, int wanted,
                     Heuristic* found, int* count);
    int (*matmul)(void* handle, void* desc, const void* alpha, const void* a, void* a_layout, const void* b,
                  void* b_layout, const void* beta, const void* c, void* c_layout, void* d, void* d_layout,
                  const Algorithm* algorithm, void* workspace, size_t bytes, cudaStream_t stream);
};

// The driver must run the release of CUDA that a library was made with. What says none is judged by its functions.
bool runs_here(void* library) {
    auto* const made_with = reinterpret_cast<size_t (*)()>(dlsym(library, "cublasLtGetCudartVersion"));
    int driver = 0;  // 0: there is none
    if (made_with == nullptr || cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return true;
    return made_with() / 1000 <= size_t(driver / 1000);
}

// The library and what went wrong: `found` without `wrong` is the interface.
struct Library {
    Interface interface = {};
    bool found = false;
    char wrong[256] = "";

    Library() {
        void* library = nullptr;
        const char* named = std::getenv("CQIL_CUBLASLT");
        if (named != nullptr && *named != '\0') {
            library = dlopen(named, RTLD_NOW | RTLD_LOCAL);
            if (library == nullptr) {
                snprintf(wrong, sizeof(wrong), "CQIL_CUBLASLT: %s", dlerror());
                return;
            }
            if (!runs_here(library)) {
                snprintf(wrong, sizeof(wrong), "CQIL_CUBLASLT: %s needs a newer driver", named);
                return;
            }
        }
        // What the process has loaded comes first: one copy is enough.
        for (const int mode : {RTLD_NOLOAD, 0})
            for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
                if (library != nullptr) continue;
                library = dlopen(name, RTLD_NOW | RTLD_LOCAL | mode);
                if (library != nullptr && !runs_here(library)) library = nullptr;
            }
        if (library == nullptr) return;
        found = true;
        auto find = [&](auto& function, const char* name) {
            void* symbol = dlsym(library, name);
            if (symbol == nullptr) snprintf(wrong, sizeof(wrong), "%s: has no %s", named ? named : "cuBLASLt", name);
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
        };
        find(interface.create, "cublasLtCreate");
        find(interface.desc_create, "cublasLtMatmulDescCreate");
        find(interface.desc_set, "cublasLtMatmulDescSetAttribute");
        find(interface.layout_create, "cublasLtMatrixLayoutCreate");
        find(interface.preference_create, "cublasLtMatmulPreferenceCreate");
        find(interface.preference_set, "cublasLtMatmulPreferenceSetAttribute");
        find(interface.preference_destroy, "cublasLtMatmulPreferenceDestroy");
        find(interface.heuristic, "cublasLtMatmulAlgoGetHeuristic");
        find(interface.matmul, "cublasLtMatmul");
    }
};

const Library& library() {
    static const auto* all = new Library;
    return *all;
}

std::atomic<bool> is_allowed{true};

#define CQIL_CUBLASLT(call)                                                                      \
    do {                                                                                         \
        if (const int status_ = (call)) return fail("cuBLASLt: status %d from " #call, status_); \
    } while (0)

int alignment(const void* p) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    return address == 0 ? 256 : int(std::min<uintptr_t>(256, address & ~(address - 1)));
}

// cuBLASLt counts in columns: out is [outputs, rows] there, the product of Wᵀ with x. Its description of one shape, and
// the algorithm that its heuristics prefer; none if it has no algorithm.
struct Plan {
    void *desc = nullptr, *weight = nullptr, *x = nullptr, *out = nullptr;
    Algorithm algorithm = {};
    bool possible = false;
};

class Plans {
public:
    int multiply(const Operands& o, int dtype, void* scratch, cudaStream_t stream) {
        std::lock_guard<std::mutex> lock(mutex_);
        int device = 0;
        CQIL_CUDA(cudaGetDevice(&device));
        const void* added = o.residual != nullptr ? o.residual : o.out;
        const Key key = {device,
                         dtype,
                         o.rows,
                         o.outputs,
                         o.inputs,
                         o.bias != nullptr,
                         o.residual != nullptr,
                         alignment(o.weight),
                         alignment(o.x),
                         alignment(added),
                         alignment(o.out)};
        auto found = plans_.find(key);
        if (found == plans_.end()) {
            // What is set up once must not count as part of a capture.
            cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
            CQIL_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
            Plan plan;
            const int failed = make(key, o, &plan);
            CQIL_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
            if (failed) return -1;
            found = plans_.emplace(key, plan).first;
        }
        const Plan& plan = found->second;
        if (!plan.possible) return 0;
        const Interface& lt = library().interface;
        if (o.bias != nullptr) CQIL_CUBLASLT(lt.desc_set(plan.desc, kDescBiasPointer, &o.bias, sizeof(o.bias)));
        const float alpha = o.scale, beta = o.residual != nullptr ? 1 : 0;
        CQIL_CUBLASLT(lt.matmul(handles_[device], plan.desc, &alpha, o.weight, plan.weight, o.x, plan.x, &beta, added,
                                plan.out, o.out, plan.out, &plan.algorithm, scratch, kLibraryScratchBytes, stream));
        return 1;
    }

private:
    // Device, type, rows, outputs, inputs, whether there are a bias and a residual, alignments of W, x, what is added
    // and out.
    using Key = std::array<int, 11>;

    int make(const Key& key, const Operands& o, Plan* plan) {
        const Interface& lt = library().interface;
        void*& handle = handles_[key[0]];
        if (handle == nullptr) CQIL_CUBLASLT(lt.create(&handle));
        const int type = key[1] == CQIL_FLOAT32 ? kReal32F : key[1] == CQIL_FLOAT16 ? kReal16F : kReal16BF;
        const int32_t transposed = kTransposed;
        const uint32_t epilogue = o.bias != nullptr ? kEpilogueBias : kEpilogueDefault;
        CQIL_CUBLASLT(lt.desc_create(&plan->desc, kCompute32F, kReal32F));
        CQIL_CUBLASLT(lt.desc_set(plan->desc, kDescTransposeA, &transposed, sizeof(transposed)));
        CQIL_CUBLASLT(lt.desc_set(plan->desc, kDescEpilogue, &epilogue, sizeof(epilogue)));
        if (o.bias != nullptr) CQIL_CUBLASLT(lt.desc_set(plan->desc, kDescBiasPointer, &o.bias, sizeof(o.bias)));
        CQIL_CUBLASLT(lt.layout_create(&plan->weight, type, o.inputs, o.outputs, o.inputs));
        CQIL_CUBLASLT(lt.layout_create(&plan->x, type, o.inputs, o.rows, o.inputs));
        CQIL_CUBLASLT(lt.layout_create(&plan->out, type, o.outputs, o.rows, o.outputs));

        void* preference = nullptr;
        CQIL_CUBLASLT(lt.preference_create(&preference));
        const uint64_t bytes = kLibraryScratchBytes;
        CQIL_CUBLASLT(lt.preference_set(preference, kPreferenceWorkspace, &bytes, sizeof(bytes)));
        // Parts of a sum are added up in float32, as in our kernels, never in the type of out.
        CQIL_CUBLASLT(
            lt.preference_set(preference, kPreferenceReductions, &kReduceInComputeType, sizeof(kReduceInComputeType)));
        for (int i = 0; i < 4; ++i) {
            const uint32_t aligned = key[7 + i];
            CQIL_CUBLASLT(lt.preference_set(preference, kPreferenceAlignment + i, &aligned, sizeof(aligned)));
        }
        Heuristic best = {};
        int count = 0;
        // An error here says that there is no algorithm for the shape.
        const int status =
            lt.heuristic(handle, plan->desc, plan->weight, plan->x, plan->out, plan->out, preference, 1, &best, &count);
        plan->possible = status == 0 && count > 0 && best.state == 0;
        plan->algorithm = best.algorithm;
        CQIL_CUBLASLT(lt.preference_destroy(preference));
        return 0;
    }

    std::mutex mutex_;
    std::map<Key, Plan> plans_;
    std::map<int, void*> handles_;  // by device
};

// Never freed: graphs hold nothing of it, but streams may still use it when the process ends.
Plans& plans() {
    static auto* all = new Plans;
    return *all;
}

}  // namespace

int cqil_trt::library_product(const Operands& o, int dtype, void* scratch, cudaStream_t stream) {
    static_assert(sizeof(Operands) == 8 * sizeof(void*) + 6 * sizeof(int),
                  "what a product fuses, cuBLASLt is asked for");
    if (o.scale != 1 && o.bias != nullptr) return 0;  // its bias is not scaled
    const int here = cqil_linear_library(-1);
    return here < 1 ? here : plans().multiply(o, dtype, scratch, stream);
}

extern "C" int cqil_linear_library(int allowed) {
    if (allowed >= 0) is_allowed = allowed != 0;
    if (!is_allowed) return 0;
    if (library().wrong[0] != '\0') return fail("%s", library().wrong);
    return library().found;
}
