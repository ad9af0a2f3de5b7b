// Delays that tests inject into blocks, only in a library built with CQIL_TEST_DELAYS. They reproduce races that would
// otherwise need an unlucky order of blocks.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <vector>

namespace cqil_trt {

enum DelayPlace {
    kDelayStart,  // after releasing the successor, before any early read
    kDelayWork,   // after the wait for the predecessor
    kDelayPlaces
};

constexpr int kMaxDelays = 1024;

// At each place block i, counted with x fastest, sleeps for nanoseconds[i % count].
struct Delays {
    uint32_t count[kDelayPlaces];
    uint32_t nanoseconds[kDelayPlaces][kMaxDelays];
};

static __device__ Delays delays;  // one per source file

__device__ inline void delay(DelayPlace place) {
    if (delays.count[place] == 0) return;
    const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const uint32_t nanoseconds = delays.nanoseconds[place][block % delays.count[place]];
    uint64_t began, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(began)::"memory");
    do {
        if (nanoseconds > 0) __nanosleep(500);
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    } while (now - began < nanoseconds);
}

using DelaySetter = cudaError_t (*)(const Delays&);

inline std::vector<DelaySetter>& delay_setters() {
    static std::vector<DelaySetter> setters;
    return setters;
}

[[maybe_unused]] static const bool delays_registered = [] {
    delay_setters().push_back([](const Delays& d) { return cudaMemcpyToSymbol(delays, &d, sizeof(d)); });
    return true;
}();

}  // namespace cqil_trt
