// What the kernels of matrix products share: types, copies to shared memory, tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cqil_trt.h"
#include "launch.cuh"

namespace cqil_trt {

struct Operands {
    const void* x;
    const void* delta;
    const void* weight;
    const void* bias;
    const void* norm;
    const void* residual;
    void* out;
    void* sum;
    int rows, outputs, inputs;
    float eps, scale;
    int gating;
};

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
    using Type = __half2;
    static __device__ float2 wide(Type x) { return __half22float2(x); }
    static __device__ Type narrow(float x, float y) { return __floats2half2_rn(x, y); }
};
template <>
struct Pair<__nv_bfloat16> {
    using Type = __nv_bfloat162;
    static __device__ float2 wide(Type x) { return __bfloat1622float2(x); }
    static __device__ Type narrow(float x, float y) { return __floats2bfloat162_rn(x, y); }
};

// sum + the dot product of 16 bytes of w and x.
template <typename T>
__device__ inline float dot(uint4 w, uint4 x, float sum) {
    if constexpr (std::is_same_v<T, float>) {
        const auto *a = reinterpret_cast<const float*>(&w), *b = reinterpret_cast<const float*>(&x);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum = fmaf(a[i], b[i], sum);
    } else {
        using Two = typename Pair<T>::Type;
        const Two *a = reinterpret_cast<const Two*>(&w), *b = reinterpret_cast<const Two*>(&x);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 p = Pair<T>::wide(a[i]), q = Pair<T>::wide(b[i]);
            sum = fmaf(p.x, q.x, fmaf(p.y, q.y, sum));
        }
    }
    return sum;
}

// The sum of two packets, rounded.
template <typename T>
__device__ inline uint4 sum_of(uint4 x, uint4 y) {
    using Two = typename Pair<T>::Type;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        auto& two = reinterpret_cast<Two*>(&x)[i];
        const float2 a = Pair<T>::wide(two), b = Pair<T>::wide(reinterpret_cast<const Two*>(&y)[i]);
        two = Pair<T>::narrow(a.x + b.x, a.y + b.y);
    }
    return x;
}

// A packet of x after RMSNorm: x * scale, rounded, times the norm's weight.
template <typename T>
__device__ inline uint4 normed(uint4 x, uint4 weight, float scale) {
    using Two = typename Pair<T>::Type;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        auto& two = reinterpret_cast<Two*>(&x)[i];
        const float2 wide = Pair<T>::wide(two);
        two = __hmul2(Pair<T>::narrow(wide.x * scale, wide.y * scale), reinterpret_cast<const Two*>(&weight)[i]);
    }
    return x;
}

// Writes result y of a product that is not gated; `added` is what the residual holds there.
template <typename T>
__device__ inline void write(const Operands& o, size_t at, float y, float added) {
    if (o.sum == nullptr) {
        static_cast<T*>(o.out)[at] = T(fmaf(y, o.scale, added));
        return;
    }
    const T alone(y * o.scale);
    static_cast<T*>(o.out)[at] = alone;
    static_cast<T*>(o.sum)[at] = T(float(alone) + added);
}

__device__ inline float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// The sum of what eight warps have, in 32 bytes of shared memory.
__device__ inline float total_of(const float* of_warps) {
    const auto *a = reinterpret_cast<const float4*>(of_warps), *b = a + 1;
    return ((a->x + a->y) + (a->z + a->w)) + ((b->x + b->y) + (b->z + b->w));
}

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes to shared memory, or zeros unless `valid`.
__device__ inline void copy_async(unsigned to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ inline void store_shared(unsigned to, uint4 packet) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(packet.x), "r"(packet.y), "r"(packet.z),
                 "r"(packet.w)
                 : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the thread's copies, but for those of its last kPending groups.
template <int kPending>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 x 8 elements of 16 bits; lane i has the address of row i % 8 of the matrix i / 8. A lane gets two
// elements of row lane / 4 of each, or if kTransposed of column lane / 4.
template <bool kTransposed = false>
__device__ inline void load_matrices(unsigned (&r)[4], unsigned address) {
    if constexpr (kTransposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ inline void barrier_init(uint64_t* barrier, int arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// To be called by every thread between its reads of shared memory and the arrival after which a bulk copy replaces what
// was read. Reads may still be on their way, behind other warps' copies, when the arrival has been counted.
__device__ inline void finish_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// For data that is read once: L2 should keep activations and code instead.
__device__ inline uint64_t streaming_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// The arrival of so many bytes completes the barrier's phase.
__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Starts a copy of `bytes` to shared memory.
__device__ inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier, uint64_t policy) {
    const unsigned b = shared_address(barrier);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(b), "l"(policy)
        : "memory");
}

__device__ inline void barrier_wait(uint64_t* barrier, unsigned phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(phase)
        : "memory");
}
#endif

template <typename T>
__device__ inline void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// out = (x · Wᵀ + bias) * scale + residual by cuBLASLt, with kLibraryScratchBytes of scratch. 1: enqueued, 0: it is not
// here, not allowed, or does not take the shape or a bias with a scale; negative: an error. `dtype` is a cqil_dtype.
int library_product(const Operands& o, int dtype, void* scratch, cudaStream_t stream);

// What cuBLAS itself takes on compute capability 9.0.
constexpr size_t kLibraryScratchBytes = 32 << 20;

// cqil_linear with packed weights.
int packed_linear(const cqil_linear_shape& shape, Operands o, void* scratch, cudaStream_t stream);

struct Device {
    int processors, shared_bytes;
};

inline int describe(Device* device) {
    if (device_attribute(cudaDevAttrMultiProcessorCount, &device->processors)) return -1;
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes);
}

}  // namespace cqil_trt
