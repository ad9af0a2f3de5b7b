// Launches kernels that overlap the end of the previous kernel (programmatic dependent launch, compute capability 9.0
// and later).
#pragma once

#include <cuda_runtime.h>

#ifdef CQIL_TEST_DELAYS
#include "delays.cuh"
#endif
#include "errors.h"

namespace cqil_trt {

// Rule: before wait_for_predecessor() a kernel neither reads what an earlier kernel writes nor writes what one reads.
// The "memory" clobbers keep loads from moving above the wait. Every kernel waits, so when one has ended, all before it
// have. Releasing the successor early is therefore safe: it waits too, or was launched without overlap. Since most
// kernels release at once, one may start while several before it still run.
//
// These are all the reads before the wait, and why each is safe:
// - all_reduce_kernel reads `world`, `rank`, `layout` and `memory` of State. Only cqil_workspace_open writes them, and
//   it synchronises the device. Counters on the same cache lines are read after the wait and bypass L1 (load_system).
// - all_reduce_kernel reads the norms' weights; few_rows_kernel, packed_kernel and packed_bytes_kernel read W and the
//   norm's weight; norms_kernel reads the weights of its norms; attend_kernel, when decoding, reads cos, sin and the
//   weights of its norms. The header requires that none of them is the result of work still on the stream.
// - attend_kernel, when decoding, reads `past`, `slots`, the cache and the joints' counters, which earlier work writes.
//   So between two uses of a cache there must be a kernel that ends before any later kernel starts. Those of
//   cqil_advance, cqil_accept and cqil_arrange are such: they wait, fence after writing `past`, and do not release
//   their successor. Without one in between, cqil_attention launches without overlap (class Touched). `slots` is
//   written by copies, which no kernel overlaps. `past`, `slots` and the counters bypass L1; lines of the cache in L1
//   are invalidated when a kernel starts.
__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#ifdef CQIL_TEST_DELAYS
    delay(kDelayWork);
#endif
}

__device__ inline void release_successor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#ifdef CQIL_TEST_DELAYS
    delay(kDelayStart);
#endif
}

struct Launch {
    dim3 grid, block;
    cudaStream_t stream;
    bool overlap = true;
    size_t shared_bytes = 0;
};

// Records that kernels launched on the stream from now on start after all earlier ones have ended.
int note_full_wait(cudaStream_t stream);

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute, int* value) {
    int device = 0;
    CQIL_CUDA(cudaGetDevice(&device));
    CQIL_CUDA(cudaDeviceGetAttribute(value, attribute, device));
    return 0;
}

// Whether the kernel's code that runs here was compiled for compute capability 9.0 or later. A library may lack it.
template <typename Kernel>
int is_modern(Kernel* kernel, bool* modern) {
    cudaFuncAttributes attributes;
    CQIL_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    *modern = attributes.ptxVersion >= 90;
    return 0;
}

// Overlap has no effect before compute capability 9.0. All kernels ask for the same split between L1 and shared memory:
// a multiprocessor drains before it changes the split, which would prevent overlap.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& l, Arguments... arguments) {
    bool modern = false;
    if (is_modern(kernel, &modern)) return -1;
    CQIL_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    if (l.shared_bytes > 48 << 10)
        CQIL_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.shared_bytes)));
    cudaLaunchConfig_t config = {};
    config.gridDim = l.grid;
    config.blockDim = l.block;
    config.dynamicSmemBytes = l.shared_bytes;
    config.stream = l.stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = modern && l.overlap ? 1 : 0;
    CQIL_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
    return 0;
}

}  // namespace cqil_trt
