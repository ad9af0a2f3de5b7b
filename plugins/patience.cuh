// Time limits for the polling loops of kernels.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "errors.h"

namespace cqil_trt {

// Tells a polling loop when its time is up. Reads the clock only every 4,096 polls.
class Deadline {
public:
    // Call once per poll. A limit of 0 never passes. The limit is read only when the clock is.
    __device__ bool passed(const uint64_t& limit_ns) {
        if ((++polls_ & 0xfff) != 0) return false;
        uint64_t now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (began_ == 0) began_ = now;
        return limit_ns != 0 && now - began_ >= limit_ns;
    }

private:
    uint32_t polls_ = 0;
    uint64_t began_ = 0;
};

// Returns only on the first thread to give up, which then writes its record and traps. The others wait for the trap.
__device__ inline void be_first_to_give_up(uint32_t* gave_up) {
    if (atomicCAS(gave_up, 0u, 1u) != 0)
        while (true) __nanosleep(1000);
}

constexpr double kDefaultTimeoutSeconds = 30;

// Converts a time limit for Deadline. Fails unless it is from 0 to 1e9 seconds.
inline int to_nanoseconds(double seconds, uint64_t* nanoseconds) {
    if (!(seconds >= 0 && seconds <= 1e9)) return fail("a time limit of %g s is not from 0 to 1e9 s", seconds);
    *nanoseconds = uint64_t(seconds * 1e9);
    return 0;
}

}  // namespace cqil_trt
