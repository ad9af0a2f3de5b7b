// What plugins/flash.cuh takes from linear.cuh and kv_cache.cuh, for a host: a block's threads are fibers, in an order
// of their own. A warp's operations and barriers wait for all that take part, and copies to shared memory arrive when
// they are waited for, not before. Written from the PTX instruction set's description of ldmatrix and mma.m16n8k16.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
    int x, y, z;

    dim3(int x = 1, int y = 1, int z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockIdx;
inline struct {
    int x;
} threadIdx;
using cudaStream_t = void*;

namespace host {

constexpr int kThreads = 128;

struct Copy {
    unsigned to;
    const void* from;
    bool valid;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 << 10);
    bool done = false;
    std::vector<Copy> copies;  // of the group that is not committed
    std::vector<std::vector<Copy>> groups;
    unsigned given[6];  // to the warp's current operation
};
inline Fiber fibers[kThreads];
inline ucontext_t scheduler;
inline std::function<void()> body;

inline Fiber& mine() { return fibers[threadIdx.x]; }
inline Fiber& of_warp(int lane) { return fibers[threadIdx.x / 32 * 32 + lane]; }

struct Barrier {
    int wanted, arrived = 0, turn = 0;

    void wait() {
        const int now = turn, me = threadIdx.x;
        if (++arrived == wanted) {
            arrived = 0;
            ++turn;
            return;
        }
        while (turn == now) {
            swapcontext(&fibers[me].context, &scheduler);
            threadIdx.x = me;
        }
    }
};
inline Barrier block{kThreads}, warps[kThreads / 32] = {{32}, {32}, {32}, {32}};

// What every lane of the warp has given is there between the two.
inline void begin(std::initializer_list<unsigned> given) {
    std::copy(given.begin(), given.end(), mine().given);
    warps[threadIdx.x / 32].wait();
}
inline void end() { warps[threadIdx.x / 32].wait(); }

inline void start() {
    body();
    mine().done = true;
}

// Runs a block, one fiber after another; `seed` says in which order, and which warps fall behind.
inline void run(unsigned seed) {
    for (Fiber& fiber : fibers) {
        fiber.done = false;
        fiber.copies.clear();
        fiber.groups.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, start, 0);
    }
    for (bool any = true; any;) {
        any = false;
        seed = seed * 1664525 + 1013904223;
        for (int i = 0; i < kThreads; ++i) {
            threadIdx.x = (i * 37 + seed) % kThreads;
            if (mine().done) continue;
            any = true;
            if (seed >> (24 + threadIdx.x / 32) & 1) continue;
            swapcontext(&scheduler, &mine().context);
        }
    }
}

}  // namespace host

inline void __syncthreads() { host::block.wait(); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    host::begin({bits});
    std::memcpy(&x, &host::of_warp(threadIdx.x % 32 ^ mask).given[0], 4);
    host::end();
    return x;
}

inline float __fdividef(float x, float y) { return x / y; }

struct uint4 {
    unsigned x, y, z, w;
};

namespace cqil_trt {

alignas(512) inline char memory[96 << 10];  // the block's shared memory

template <typename T>
struct Pair {
    struct Type {
        T x, y;
    };
    static Type narrow(float x, float y) { return {T(x), T(y)}; }
};

inline unsigned shared_address(const void* p) { return unsigned(static_cast<const char*>(p) - memory); }

inline void copy_async(unsigned to, const void* from, bool valid) { host::mine().copies.push_back({to, from, valid}); }

inline void store_shared(unsigned to, uint4 packet) { std::memcpy(memory + to, &packet, 16); }

inline void commit_copies() {
    host::mine().groups.push_back(host::mine().copies);
    host::mine().copies.clear();
}

template <int kPending>
void wait_for_copies() {
    auto& groups = host::mine().groups;
    for (; groups.size() > kPending; groups.erase(groups.begin()))
        for (const host::Copy& copy : groups[0])
            if (copy.valid)
                std::memcpy(memory + copy.to, copy.from, 16);
            else
                std::memset(memory + copy.to, 0, 16);
}

template <bool kTransposed = false>
void load_matrices(unsigned (&r)[4], unsigned address) {
    const int lane = threadIdx.x % 32;
    host::begin({address});
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t two[2];
        for (int i = 0; i < 2; ++i) {
            const int outer = lane / 4, inner = lane % 4 * 2 + i;
            const int row = kTransposed ? inner : outer, column = kTransposed ? outer : inner;
            std::memcpy(&two[i], memory + host::of_warp(matrix * 8 + row).given[0] + column * 2, 2);
        }
        std::memcpy(&r[matrix], two, 4);
    }
    host::end();
}

template <typename T>
void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], const unsigned* b) {
    const int lane = threadIdx.x % 32;
    host::begin({a[0], a[1], a[2], a[3], b[0], b[1]});
    auto element = [](int of, int which, int half) {
        T x;
        std::memcpy(&x, reinterpret_cast<const char*>(&host::of_warp(of).given[which]) + half * 2, 2);
        return float(x);
    };
    for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; ++k) {
            const float left = element(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
            c[e] += left * element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
    }
    host::end();
}

constexpr int kCircleStep = 64;
#define CQIL_CIRCLE_STEP cqil_trt::kCircleStep

// E4M3 as the Open Compute Project's specification has it: no infinities, NaN with all bits but the sign.
struct Fp8 {
    uint8_t code;

    float value() const {
        const int exponent = code >> 3 & 15, fraction = code & 7;
        if (exponent == 15 && fraction == 7) return NAN;
        const float size = exponent == 0 ? std::ldexp(float(fraction), -9) : std::ldexp(8.0f + fraction, exponent - 10);
        return code >> 7 ? -size : size;
    }
};

template <typename T>
uint4 load_packet(const Fp8* row, int packet) {
    T values[8];
    for (int i = 0; i < 8; ++i) values[i] = T(row[packet * 8 + i].value());
    uint4 found;
    std::memcpy(&found, values, 16);
    return found;
}

inline float power_of_2(float x) { return std::exp2(x); }

inline void release_successor() {}
inline void wait_for_predecessor() {}

struct Launch {
    dim3 grid;
    int block;
    cudaStream_t stream;
    bool overlap;
    size_t shared_bytes;
};

// Fills shared memory with NaN before each block.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& l, Arguments... arguments) {
    if (l.block != host::kThreads || l.shared_bytes > sizeof(memory)) return -1;
    gridDim = l.grid;
    host::body = [&] { kernel(arguments...); };
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
                std::memset(memory, 0xff, sizeof(memory));
                host::run(unsigned(blockIdx.x + 7 * blockIdx.y + 31 * blockIdx.z));
            }
    return 0;
}

}  // namespace cqil_trt
