// Launching kernels so that they overlap the end of the kernel before them (programmatic dependent launch, compute
// capability 9.0 on).
#pragma once

#include <cuda_runtime.h>

#ifdef CQIL_TEST_DELAYS
#include "delays.cuh"
#endif
#include "errors.h"

namespace cqil_trt {

// Nothing that an earlier kernel wrote, or that one may still read, is touched before wait_for_predecessor(); the
// "memory" clobbers keep loads from moving above it. Every kernel waits, so one that has ended knows that all before it
// have. Letting the next kernel start early is safe because it waits in the same way, or was launched to start after
// this one. A kernel may start while several before it still run, as each releases its successor at once.
//
// Reads before the wait, all of them, and why each is safe:
//  - all_reduce_kernel: `world`, `rank`, `layout` and `memory` of State, written by cqil_workspace_open, which
//  synchronises
//    the device. Its counters share cache lines with them; they are read later, past the L1 cache (load_system).
//  - all_reduce_kernel: the norm's weight. stream_kernel: W and the norm's weight. attend_kernel in decoding: cos and
//  sin.
//    The header demands that they are no result of work still on the stream.
//  - attend_kernel in decoding: `past`, the cache and its joints' counters. Earlier kernels write all three, so one
//  that ends
//    before any later one starts must lie between. cqil_advance is one: it waits, writes `past`, fences, and releases
//    no successor. Where none lies between two calls on a cache, cqil_attention launches the second without overlap
//    (Touched). `past` and the counters are read past the L1 cache; the cache's lines in L1 are dropped when a kernel
//    starts.
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

// Notes that kernels launched on the stream from now on start after all before them have ended.
int note_full_wait(cudaStream_t stream);

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute, int* value) {
    int device = 0;
    CQIL_CUDA(cudaGetDevice(&device));
    CQIL_CUDA(cudaDeviceGetAttribute(value, attribute, device));
    return 0;
}

// Whether the code that runs of a kernel is that for compute capability 9.0 on: a library may lack it for the GPU at
// hand.
template <typename Kernel>
int is_modern(Kernel* kernel, bool* modern) {
    cudaFuncAttributes attributes;
    CQIL_CUDA(cudaFuncGetAttributes(&attributes, kernel));
    *modern = attributes.ptxVersion >= 90;
    return 0;
}

// Overlap has no effect before compute capability 9.0. All kernels ask for the same split between L1 and
// shared memory: a multiprocessor that has to change it runs empty first, and nothing overlaps.
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
