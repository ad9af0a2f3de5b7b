// Memory shared between ranks and the rules for reading and writing it. docs/allreduce.md draws the picture.
//
// Two protocols, each with its own memory and its own counters:
//
// Symmetric (all_reduce, argmax): every rank sends to every rank. Data is its own flag: a receive buffer holds a
// pattern that is never sent (kEmpty in every 32-bit word), and a word has arrived when it differs. Buffers take turns:
// operation g uses buffer g % 3 and meanwhile clears buffer (g + 2) % 3, which operation g - 1 used. A rank can be at
// most one operation ahead of any other, as it needs everyone's data of g to finish g; so while we are in g a peer may
// already write to buffer (g + 1) % 3, and nobody touches buffer (g + 2) % 3 but its owner.
//
// Directed (broadcast, bypass): one rank sends, some receive, and a sender that hears nothing could run ahead without
// bound. So each pair has a channel of kChannelSlots slots. A 16-byte packet is two 8-byte halves, each 4 bytes of data
// and the message's number, stored and loaded as one access, so that a half that bears the number has its data. The
// receiver returns an acknowledgement; the sender waits when it is kChannelSlots messages ahead.
//
// Fences. All accesses to memory that another GPU reads or writes are .relaxed.sys: the scope makes them reach the
// other GPU. Words (symmetric) or halves (directed) are checked one by one and need no order among each other. Orders
// that matter:
//  (1) our clear of a buffer before a peer's next write to it: the clear is done when our kernel ends; the peer writes
//      only after it has seen our data of the following operation, which is a later kernel of the same stream.
//  (2) our reads of a channel slot before the sender's overwrite. Release: the acknowledgement follows a block barrier
//  and a
//      __threadfence of every block, and a fence.acq_rel.sys in the last one. Acquire: in each of the sender's blocks
//      one thread reads the acknowledgement by ld.acquire.sys, and a block barrier passes the order on to the threads
//      that overwrite the slot. Both are off the path of the data.
//  (3) counters of this rank (epoch, messages): written by the last block after all blocks have read them, read by the
//      next kernel of the stream.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "cqil_trt.h"
#include "patience.cuh"

namespace cqil_trt {

constexpr int kMaxRanks = CQIL_MAX_RANKS;
constexpr int kBuffers = 3;
constexpr int kChannelSlots = 4;
constexpr size_t kChannelBytes = 1 << 20;  // data of one directed message; longer ones are sent in parts
// As float32 -0.0; as 16-bit pair (+0.0, -0.0). A word that is really this is sent as zero: equal in value.
constexpr uint32_t kEmpty = 0x80000000u;

struct alignas(16) Packet {
    uint32_t word[4];
};

// A rank's memory that peers write to, at the same offsets on every rank.
struct Layout {
    size_t one_shot_stride;  // one source's part of a one-shot buffer
    size_t chunk_stride;     // one source's part of the two halves of a two-shot buffer
    int world;

    __host__ __device__ size_t one_shot(uint32_t buffer, int source) const {
        return kHeaderBytes + (size_t(buffer) * world + source) * one_shot_stride;
    }
    __host__ __device__ size_t scatter(uint32_t buffer, int source) const {
        return one_shot(kBuffers, 0) + (size_t(buffer) * world + source) * chunk_stride;
    }
    __host__ __device__ size_t gather(uint32_t buffer, int owner) const {
        return scatter(kBuffers, 0) + (size_t(buffer) * world + owner) * chunk_stride;
    }
    __host__ __device__ size_t channel(int source, uint32_t slot) const {
        return gather(kBuffers, 0) + (size_t(source) * kChannelSlots + slot) * (2 * kChannelBytes);
    }
    __host__ __device__ size_t total() const { return channel(world, 0); }

    // The header holds acknowledgements[kMaxRanks] at 0 and the ping word at kPingOffset.
    static constexpr size_t kHeaderBytes = 256;
    static constexpr size_t kPingOffset = 128;
};

// What kernels know of a rank; in this rank's device memory, private to it.
struct State {
    char* memory[kMaxRanks];  // every rank's memory as mapped here
    Layout layout;
    int rank;
    int world;
    uint64_t timeout_ns;    // 0: wait for ever
    cqil_failure* failure;  // in host memory

    // Counters of the symmetric operations, read as packets at the start of each: operations done, then how many bytes
    // of each source's part the last use of each of the kBuffers one-shot buffers filled; blocks of the running
    // operation that have read all this, then the same of the two-shot buffers.
    Packet epoch_and_one_shot;
    Packet arrived_and_chunk;

    uint32_t sent[kMaxRanks];  // directed messages to and from each rank
    uint32_t received[kMaxRanks];
    uint32_t directed_arrived;
    uint32_t gave_up;
    uint32_t pings;
};

__device__ inline void store_system(void* address, const Packet& p) {
    asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(p.word[0]), "r"(p.word[1]),
                 "r"(p.word[2]), "r"(p.word[3])
                 : "memory");
}

__device__ inline Packet load_system(const void* address) {
    Packet p;
    asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
                 : "l"(address)
                 : "memory");
    return p;
}

__device__ inline void store_system(uint32_t* address, uint32_t value) {
    asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ inline uint32_t load_system(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// Orders what this thread, and after a barrier its block, does later after what the writer of the value did before a
// fence.
__device__ inline uint32_t load_acquire_system(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// The same as two accesses of 8 bytes, each whole.
__device__ inline void store_halves(void* address, uint64_t first, uint64_t second) {
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second) : "memory");
}

__device__ inline Packet load_halves(const void* address) {
    uint64_t first, second;
    asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(address) : "memory");
    return Packet{{uint32_t(first), uint32_t(first >> 32), uint32_t(second), uint32_t(second >> 32)}};
}

__device__ inline void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ inline bool complete(const Packet& p) {
    return p.word[0] != kEmpty && p.word[1] != kEmpty && p.word[2] != kEmpty && p.word[3] != kEmpty;
}

__device__ inline Packet sendable(Packet p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p.word[i] = p.word[i] == kEmpty ? 0 : p.word[i];
    return p;
}

// Counts the turns of a polling loop; after the time limit it leaves a record for the host and ends the kernel.
class Patience {
public:
    __device__ explicit Patience(State* state, cqil_operation operation, uint32_t sequence)
        : state_(state), operation_(operation), sequence_(sequence) {}

    __device__ void turn(uint32_t code, int peer) {
        if ((++turns_ & 0xfff) != 0) return;
        uint64_t now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (began_ == 0) began_ = now;
        if (state_->timeout_ns == 0 || now - began_ < state_->timeout_ns) return;
        be_first_to_give_up(&state_->gave_up);
        volatile cqil_failure* record = state_->failure;
        record->rank = state_->rank;
        record->peer = peer;
        record->operation = operation_;
        record->sequence = sequence_;
        __threadfence_system();
        record->code = code;
        __threadfence_system();
        __trap();
    }

private:
    State* state_;
    cqil_operation operation_;
    uint32_t sequence_;
    uint32_t turns_ = 0;
    uint64_t began_ = 0;
};

}  // namespace cqil_trt
