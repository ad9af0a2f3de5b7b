// Memory shared between ranks, and the rules for reading and writing it. docs/allreduce.md has the picture.
//
// There are two protocols, each with its own memory and counters.
//
// Symmetric (all_reduce, argmax): every rank sends to every rank. Data is its own flag. A receive buffer holds a
// pattern that is never sent (kEmpty in every 32-bit word); a word has arrived when it differs. Operation g uses buffer
// g % 3 and clears buffer (g + 2) % 3, which operation g - 1 used. A rank needs everyone's data of g to finish g, so it
// is at most one operation ahead of any other. While we are in g, a peer may already write to buffer (g + 1) % 3, but
// only the owner touches buffer (g + 2) % 3. So every symmetric operation must receive at least one packet from every
// peer on every rank, whatever its size: a rank that waits for nobody would run ahead. The counter begins again at a
// multiple of 3: with its 2^32 values the operations before and after that would use one buffer.
//
// Directed (broadcast, bypass): one rank sends and others receive. A sender that hears nothing back could run ahead
// without bound, so each pair of ranks has a channel of kChannelSlots slots. A 16-byte packet is two 8-byte halves.
// Each half is 4 bytes of data and the message's number, stored and loaded as one access, so a half with the right
// number has the right data. The receiver returns an acknowledgement; the sender waits when it is kChannelSlots
// messages ahead.
//
// Fences. All accesses to memory that another GPU reads or writes are .relaxed.sys or stronger; the scope makes them
// reach the other GPU. Words (symmetric) and halves (directed) are checked one by one and need no order among each
// other. Three orders matter:
// (1) Our clear of a buffer before a peer's next write to it. The clear is complete when our kernel ends. The peer
//     writes only after it has seen our data of the following operation, which a later kernel of the same stream sends.
// (2) Our reads of a channel slot before the sender overwrites it. Release: the acknowledgement comes after a block
//     barrier and a __threadfence in every block, and a fence.acq_rel.sys in the last block. Acquire: in each of the
//     sender's blocks, one thread reads the acknowledgement with ld.acquire.sys, and a block barrier extends the order
//     to the threads that overwrite the slot. Both are off the data's path.
// (3) This rank's counters (epoch, message numbers). The last block writes them after all blocks have read and used
//     them; the next kernel of the stream reads them.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "cqil_trt.h"
#include "patience.cuh"

namespace cqil_trt {

constexpr int kMaxRanks = CQIL_MAX_RANKS;
constexpr int kBuffers = 3;
constexpr uint32_t kEpochs = UINT32_MAX / kBuffers * kBuffers;  // numbers of symmetric operations
static_assert(kEpochs % kBuffers == 0, "buffers stay in turn when the numbers begin again");
constexpr int kChannelSlots = 4;
constexpr size_t kChannelBytes = 1 << 20;  // data of one directed message; longer ones are sent in parts
// -0.0 as float32, (+0.0, -0.0) as a pair of 16-bit values. Where data has this pattern, zero is sent: it is equal in
// value.
constexpr uint32_t kEmpty = 0x80000000u;

struct alignas(16) Packet {
    uint32_t word[4];
};

// The part of a rank's memory that peers write to, at the same offsets on every rank.
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

// What kernels know about their rank. In this rank's device memory, private to it.
struct State {
    char* memory[kMaxRanks];  // every rank's memory as mapped here
    Layout layout;
    int rank;
    int world;
    uint64_t timeout_ns;    // 0: no limit
    cqil_failure* failure;  // in host memory

    // Counters of the symmetric operations. Each operation starts by reading them as two packets. First packet:
    // operations completed, then for each of the kBuffers one-shot buffers the bytes of each source's part that its
    // last use filled. Second packet: blocks of the current operation that have read both packets, then the same for
    // the two-shot buffers.
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

// Pairs with a fence and store of the writer: this thread's later accesses, and its block's after a barrier, come after
// the writer's earlier ones.
__device__ inline uint32_t load_acquire_system(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// As above, but as two accesses of 8 bytes, each of which is atomic.
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

// Counts the polls of a loop. After the time limit it leaves a record for the host and traps. This is Deadline with its
// own state: through a member of that type nvcc allocates registers worse in all_reduce_kernel.
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
