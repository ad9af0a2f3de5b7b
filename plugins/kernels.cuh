// The kernels of the collectives. One template serves every operation of a protocol. protocol.cuh has the rules.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "argmax.cuh"
#include "launch.cuh"
#include "protocol.cuh"

namespace cqil_trt {

template <typename T>
constexpr int kElements = sizeof(Packet) / sizeof(T);

// Element i of a packet, by arithmetic on its words: taking a packet's address would move it to local memory. i is a
// constant after unrolling.
template <typename T>
__device__ inline float element(const Packet& p, int i) {
    if constexpr (sizeof(T) == 4) {
        return __uint_as_float(p.word[i]);
    } else {
        const unsigned short bits = static_cast<unsigned short>(p.word[i / 2] >> (16 * (i % 2)));
        if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(bits));
        return __bfloat162float(__ushort_as_bfloat16(bits));
    }
}

// The packet with elements value(i), rounded to T.
template <typename T, typename Value>
__device__ inline Packet rounded(Value value) {
    Packet p;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4) {
            p.word[w] = __float_as_uint(value(w));
        } else if constexpr (std::is_same_v<T, __half>) {
            p.word[w] = __half_as_ushort(__float2half_rn(value(2 * w))) |
                        uint32_t(__half_as_ushort(__float2half_rn(value(2 * w + 1)))) << 16;
        } else {
            p.word[w] = __bfloat16_as_ushort(__float2bfloat16_rn(value(2 * w))) |
                        uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(value(2 * w + 1)))) << 16;
        }
    }
    return p;
}

template <typename T>
__device__ inline float round_to(float x) {
    if constexpr (std::is_same_v<T, __half>) return __half2float(__float2half_rn(x));
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(__float2bfloat16_rn(x));
    return x;
}

template <typename T>
__device__ inline void add_to(float (&sum)[kElements<T>], const Packet& p) {
#pragma unroll
    for (int i = 0; i < kElements<T>; ++i) sum[i] += element<T>(p, i);
}

// The arguments of all_reduce_kernel. Data is divided into rows of `width` packets. The last row may be shorter, and
// the last packet may be partial: it then holds `tail` elements (0: it is full).
struct AllReduce {
    const void* in;
    const void* residual;  // may be null without kNorm
    const void* weight;
    void* out;
    void* normed;
    uint32_t packets;
    uint32_t width;
    uint32_t rows;
    uint32_t tail;
    float eps;
    float inverse_hidden;
    const void* in_norm;  // with Norms::kAny: of the sum before the residual is added; may be null, as weight may
    int kind;             // with Norms::kAny: a cqil_norm
};

// What all_reduce_kernel does besides the sum: nothing, the RMSNorm of the new residual as LLaMA has it, or (one-shot
// only) norms of any kind, also of the sum before it is added.
enum class Norms { kNone, kAfter, kAny };

__device__ inline bool partial(uint32_t index, const AllReduce& a) { return a.tail != 0 && index + 1 == a.packets; }

template <typename T>
__device__ Packet load_packet(const void* base, uint32_t index, const AllReduce& a) {
    if (!partial(index, a)) return static_cast<const Packet*>(base)[index];
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, unsigned short>;
    Packet p = {{0, 0, 0, 0}};
#pragma unroll
    for (uint32_t i = 0; i < kElements<T>; ++i)
        if (i < a.tail)
            p.word[i * sizeof(T) / 4] |= uint32_t(static_cast<const Bits*>(base)[size_t(index) * kElements<T> + i])
                                         << (8 * (i * sizeof(T) % 4));
    return p;
}

template <typename T>
__device__ void store_packet(void* base, uint32_t index, const Packet& p, const AllReduce& a) {
    if (!partial(index, a)) {
        static_cast<Packet*>(base)[index] = p;
        return;
    }
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, unsigned short>;
#pragma unroll
    for (uint32_t i = 0; i < kElements<T>; ++i)
        if (i < a.tail)
            static_cast<Bits*>(base)[size_t(index) * kElements<T> + i] =
                static_cast<Bits>(p.word[i * sizeof(T) / 4] >> (8 * (i * sizeof(T) % 4)));
}

// One symmetric operation's use of the buffers. The last block to call finish() starts the next epoch; every block has
// read the current one by then.
struct Turn {
    State* state;
    uint32_t epoch;
    uint32_t buffer;

    __device__ explicit Turn(State* s) : state(s) {
        one_shot_ = load_system(&s->epoch_and_one_shot);
        chunk_ = load_system(&s->arrived_and_chunk);
        epoch = one_shot_.word[0];
        buffer = epoch % kBuffers;
    }

    // Clears the buffer that the previous operation used, records how many bytes of each source's part this one uses,
    // and counts this block. All threads call it once.
    __device__ void finish(uint32_t used_one_shot, uint32_t used_chunk) {
        const Layout& layout = state->layout;
        char* mine = state->memory[state->rank];
        const uint32_t old = (buffer + 2) % kBuffers;
        // Selected rather than indexed: a variable index would move the packets to local memory.
        auto used = [&](const Packet& p) { return old == 0 ? p.word[1] : old == 1 ? p.word[2] : p.word[3]; };
        const uint32_t clear_one_shot = used(one_shot_), clear_chunk = used(chunk_);
        const uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x) * sizeof(Packet);
        const uint32_t stride = gridDim.x * blockDim.x * sizeof(Packet);
        const Packet empty = {{kEmpty, kEmpty, kEmpty, kEmpty}};
        for (int source = 0; source < state->world; ++source) {
            for (uint32_t i = first; i < clear_one_shot; i += stride)
                store_system(mine + layout.one_shot(old, source) + i, empty);
            for (uint32_t i = first; i < clear_chunk; i += stride) {
                store_system(mine + layout.scatter(old, source) + i, empty);
                store_system(mine + layout.gather(old, source) + i, empty);
            }
        }
        __syncthreads();
        if (threadIdx.x != 0) return;
        if (gridDim.x == 1 || atomicAdd(&state->arrived_and_chunk.word[0], 1) == gridDim.x - 1) {
            state->epoch_and_one_shot.word[1 + buffer] = used_one_shot;
            state->arrived_and_chunk.word[1 + buffer] = used_chunk;
            state->arrived_and_chunk.word[0] = 0;
            state->epoch_and_one_shot.word[0] = epoch + 1 == kEpochs ? 0 : epoch + 1;
        }
    }

private:
    Packet one_shot_, chunk_;
};

// Waits for the packets of all other ranks at offset(source) and sums them with `own` in rank order.
template <typename T, int kWorld, typename Offset>
__device__ void gather_sum(State* state, const Packet& own, float (&sum)[kElements<T>], Patience& patience,
                           Offset offset) {
    const char* mine = state->memory[state->rank];
    const int rank = state->rank, world = state->world;
    Packet part[kWorld];
    while (true) {
        int missing = -1;
#pragma unroll
        for (int source = 0; source < kWorld; ++source)
            if (source < world && source != rank) part[source] = load_system(mine + offset(source));
#pragma unroll
        for (int source = 0; source < kWorld; ++source)
            if (source < world && source != rank && !complete(part[source])) missing = source;
        if (missing < 0) break;
        patience.turn(1, missing);
    }
#pragma unroll
    for (int i = 0; i < kElements<T>; ++i) sum[i] = 0;
#pragma unroll
    for (int source = 0; source < kWorld; ++source) {
        if (source >= world) continue;
        Packet p = part[source];
        if (source == rank) p = own;
        add_to<T>(sum, p);
    }
}

// The sum of x over the block, on every thread. `half` alternates between calls: a block may be one row ahead of its
// slowest warp and must not overwrite what that warp still reads.
__device__ inline float block_sum(float x, uint32_t half) {
    __shared__ float partial[2][32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    if (threadIdx.x % 32 == 0) partial[half][threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? partial[half][threadIdx.x % 32] : 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// x after an RMSNorm: `scaled`, not rounded yet, times the weight.
template <typename T>
__device__ inline float weighted(float scaled, float weight, int kind) {
    if (kind == CQIL_NORM_ROUNDED) return round_to<T>(scaled) * weight;
    return scaled * (kind == CQIL_NORM_OFFSET ? 1 + weight : weight);
}

// out = residual + sum over ranks of in; with norms also its RMSNorm. A block takes whole rows, a thread up to kVectors
// packets of a row.
//
// One-shot: every rank sends its rows to all others and sums everything. Two-shot: row r belongs to rank r % world,
// which sums what it is sent and returns the result to all.
template <typename T, int kWorld, int kVectors, Norms kNorms, bool kTwoShot>
__global__ void __launch_bounds__(kNorms == Norms::kAny ? 512 : 1024) all_reduce_kernel(State* state, AllReduce a) {
    constexpr bool kNorm = kNorms != Norms::kNone, kAny = kNorms == Norms::kAny;
    release_successor();
    const uint32_t world = state->world, rank = state->rank;  // constant since the workspace was opened
    const Layout layout = state->layout;
    Packet weight[kVectors];
    if (kNorm) {
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            uint32_t column = k * blockDim.x + threadIdx.x;
            if (column < a.width && (!kAny || a.weight)) weight[k] = static_cast<const Packet*>(a.weight)[column];
        }
    }
    Packet in_norm[kAny ? kVectors : 1];
    if constexpr (kAny) {
        if (a.in_norm) {
#pragma unroll
            for (int k = 0; k < kVectors; ++k) {
                const uint32_t column = k * blockDim.x + threadIdx.x;
                if (column < a.width) in_norm[k] = static_cast<const Packet*>(a.in_norm)[column];
            }
        }
    }
    // Every rank starts with a different peer, so no link is hit by all at once.
    char* peer[kWorld];
#pragma unroll
    for (uint32_t i = 1; i < kWorld; ++i)
        if (i < world) peer[i] = state->memory[rank + i < world ? rank + i : rank + i - world];
    // Whatever does not depend on the epoch is computed before there is data to wait for.
    const size_t my_slot = layout.one_shot(0, rank), buffer_stride = layout.one_shot(1, 0) - layout.one_shot(0, 0);
    wait_for_predecessor();

    auto place = [&](uint32_t row, int k, uint32_t& column, uint32_t& index) {
        column = k * blockDim.x + threadIdx.x;
        index = row * a.width + column;
        return column < a.width && index < a.packets;
    };
    // The offset of the packet at `column` of `row` in a source's part of a two-shot buffer.
    auto chunk = [&](uint32_t row, uint32_t column) {
        return (size_t(row / world) * a.width + column) * sizeof(Packet);
    };

    // The block's first row is loaded before the epoch, so both loads are in flight together.
    Packet own[kVectors];
    auto load_row = [&](uint32_t row) {
        uint32_t column, index;
#pragma unroll
        for (int k = 0; k < kVectors; ++k)
            if (place(row, k, column, index)) own[k] = sendable(load_packet<T>(a.in, index, a));
    };
    load_row(blockIdx.x);
    Turn turn(state);
    const uint32_t buffer = turn.buffer;

    for (uint32_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        if (row != blockIdx.x) load_row(row);
        uint32_t column, index;
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            if (!place(row, k, column, index)) continue;
            if (kTwoShot) {
                uint32_t owner = row % world;
                if (owner != rank)
                    store_system(state->memory[owner] + layout.scatter(buffer, rank) + chunk(row, column), own[k]);
            } else {
#pragma unroll
                for (uint32_t i = 1; i < kWorld; ++i)
                    if (i < world)
                        store_system(peer[i] + my_slot + buffer * buffer_stride + size_t(index) * sizeof(Packet),
                                     own[k]);
            }
        }
    }
    Packet residual[kVectors];
    auto load_residual = [&](uint32_t row) {
        uint32_t column, index;
#pragma unroll
        for (int k = 0; k < kVectors; ++k)
            if (place(row, k, column, index) && (kNorm || a.residual))
                residual[k] = load_packet<T>(a.residual, index, a);
    };
    // With one row per block, usual in decoding, the residual is loaded before the first packet arrives.
    const bool one_row = gridDim.x >= a.rows;
    if (one_row) load_residual(blockIdx.x);

    uint32_t used_chunk = kTwoShot ? uint32_t(size_t((a.rows + world - 1) / world) * a.width * sizeof(Packet)) : 0;
    turn.finish(kTwoShot ? 0 : a.packets * uint32_t(sizeof(Packet)), used_chunk);
    Patience patience(state, CQIL_ALL_REDUCE, turn.epoch);

    uint32_t half = 0;
    auto finish_row = [&](uint32_t row, Packet(&value)[kVectors]) {
        if constexpr (kAny) {
            if (a.in_norm) {
                float squares = 0;
                uint32_t column, index;
#pragma unroll
                for (int k = 0; k < kVectors; ++k)
                    if (place(row, k, column, index))
#pragma unroll
                        for (int i = 0; i < kElements<T>; ++i)
                            squares += element<T>(value[k], i) * element<T>(value[k], i);
                const float scale = rsqrtf(block_sum(squares, half ^= 1) * a.inverse_hidden + a.eps);
#pragma unroll
                for (int k = 0; k < kVectors; ++k)
                    if (place(row, k, column, index))
                        value[k] = rounded<T>([&](int i) {
                            const float scaled = element<T>(value[k], i) * scale;
                            return element<T>(residual[k], i) +
                                   round_to<T>(weighted<T>(scaled, element<T>(in_norm[k], i), a.kind));
                        });
            }
        }
        float squares = 0;
        uint32_t column, index;
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            if (!place(row, k, column, index)) continue;
            store_packet<T>(a.out, index, value[k], a);
#pragma unroll
            for (int i = 0; i < kElements<T>; ++i) squares += element<T>(value[k], i) * element<T>(value[k], i);
        }
        if (!kNorm || (kAny && !a.weight)) return;
        // As Hugging Face's LlamaRMSNorm: in float32, rounded to T, then times the weight, rounded again.
        const float scale = rsqrtf(block_sum(squares, half ^= 1) * a.inverse_hidden + a.eps);
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            if (!place(row, k, column, index)) continue;
            static_cast<Packet*>(a.normed)[index] = rounded<T>([&](int i) {
                if constexpr (kAny)
                    return weighted<T>(element<T>(value[k], i) * scale, element<T>(weight[k], i), a.kind);
                return element<T>(weight[k], i) * round_to<T>(element<T>(value[k], i) * scale);
            });
        }
    };

    // Rows that this rank sums: all of them, or its own.
    for (uint32_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        if (kTwoShot && row % world != rank) continue;
        if (!one_row) {
            load_row(row);
            load_residual(row);
        }
        Packet value[kVectors];
        uint32_t column, index;
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            if (!place(row, k, column, index)) continue;
            float sum[kElements<T>];
            gather_sum<T, kWorld>(state, own[k], sum, patience, [&](int source) {
                return kTwoShot ? layout.scatter(buffer, source) + chunk(row, column)
                                : layout.one_shot(buffer, source) + size_t(index) * sizeof(Packet);
            });
            if (kAny ? !a.in_norm : kNorm || a.residual) add_to<T>(sum, residual[k]);
            value[k] = rounded<T>([&](int i) { return sum[i]; });
            if (kTwoShot) {
                value[k] = sendable(value[k]);
#pragma unroll
                for (uint32_t i = 1; i < kWorld; ++i)
                    if (i < world) store_system(peer[i] + layout.gather(buffer, rank) + chunk(row, column), value[k]);
            }
        }
        finish_row(row, value);
    }
    if (!kTwoShot) return;

    // Rows that other ranks summed.
    const char* mine = state->memory[rank];
    for (uint32_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const uint32_t owner = row % world;
        if (owner == rank) continue;
        Packet value[kVectors];
        uint32_t column, index;
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            if (!place(row, k, column, index)) continue;
            while (!complete(value[k] = load_system(mine + layout.gather(buffer, owner) + chunk(row, column))))
                patience.turn(1, owner);
        }
        finish_row(row, value);
    }
}

// One thread per row. A packet carries the value and the index; the padding is anything but kEmpty.
__global__ void __launch_bounds__(1024) argmax_kernel(State* state, const float* values, const int32_t* indices,
                                                      float* best_value, int32_t* best_index, uint32_t rows) {
    release_successor();
    wait_for_predecessor();
    Turn turn(state);
    const Layout layout = state->layout;
    const int world = state->world, rank = state->rank;
    const uint32_t stride = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
    auto packet = [&](uint32_t row) {
        return sendable(Packet{{__float_as_uint(values[row]), uint32_t(indices[row]), 0, 0}});
    };
    for (uint32_t row = first; row < rows; row += stride)
        for (int i = 1; i < world; ++i)
            store_system(state->memory[(rank + i) % world] + layout.one_shot(turn.buffer, rank) + row * sizeof(Packet),
                         packet(row));
    turn.finish(rows * sizeof(Packet), 0);
    Patience patience(state, CQIL_ARGMAX, turn.epoch);
    for (uint32_t row = first; row < rows; row += stride) {
        float best = 0;
        int32_t index = 0;
        for (int source = 0; source < world; ++source) {
            Packet p = packet(row);
            if (source != rank)
                while (!complete(
                    p = load_system(state->memory[rank] + layout.one_shot(turn.buffer, source) + row * sizeof(Packet))))
                    patience.turn(1, source);
            float value = __uint_as_float(p.word[0]);
            if (source == 0 || better(value, int32_t(p.word[1]), best, index)) {
                best = value;
                index = int32_t(p.word[1]);
            }
        }
        best_value[row] = best;
        best_index[row] = index;
    }
}

// Sends `in` to the ranks in `targets` and writes the sum, in rank order, of what the ranks in `sources` sent: zeros
// when there are none and out is not null, or `in` itself if `copies`. `units` are 8 bytes; the last may hold `tail`
// bytes (0: all 8).
struct Directed {
    const void* in;
    void* out;
    uint32_t units;
    uint32_t tail;
    uint32_t targets;
    uint32_t sources;
    bool copies;
};

template <typename T>
__global__ void __launch_bounds__(1024) directed_kernel(State* state, Directed d) {
    release_successor();
    wait_for_predecessor();
    const Layout layout = state->layout;
    const int world = state->world, rank = state->rank;
    char* mine = state->memory[rank];
    uint32_t* acknowledged = reinterpret_cast<uint32_t*>(mine);
    const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x, stride = gridDim.x * blockDim.x;
    const uint64_t* in = static_cast<const uint64_t*>(d.in);
    auto partial = [&](uint32_t unit) { return d.tail != 0 && unit + 1 == d.units; };
    auto given = [&](uint32_t unit) {
        if (!partial(unit)) return in[unit];
        uint64_t data = 0;
        for (uint32_t i = 0; i < d.tail; ++i)
            data |= uint64_t(static_cast<const uint8_t*>(d.in)[size_t(unit) * 8 + i]) << (8 * i);
        return data;
    };

    for (int target = 0; target < world; ++target) {
        if (!(d.targets >> target & 1)) continue;
        const uint32_t number = load_system(&state->sent[target]) + 1;
        // The slot is free once its last message has been read. Differences survive the counters' wrap-around.
        if (threadIdx.x == 0) {
            Patience patience(state, CQIL_DIRECTED, number);
            while (int32_t(load_acquire_system(&acknowledged[target]) - (number - kChannelSlots)) < 0)
                patience.turn(2, target);
        }
        __syncthreads();
        char* slot = state->memory[target] + layout.channel(rank, number % kChannelSlots);
        for (uint32_t unit = first; unit < d.units; unit += stride) {
            const uint64_t data = given(unit), flag = uint64_t(number) << 32;
            store_halves(slot + size_t(unit) * sizeof(Packet), flag | uint32_t(data), flag | uint32_t(data >> 32));
        }
    }

    if (d.out != nullptr) {
        for (uint32_t unit = first; unit < d.units; unit += stride) {
            // Half a packet: its data words, and their sum over the sources.
            float sum[kElements<T>] = {};
            Packet data = {{0, 0, 0, 0}};
            for (int source = 0; source < world; ++source) {
                if (!(d.sources >> source & 1)) continue;
                const uint32_t number = load_system(&state->received[source]) + 1;
                const char* slot = mine + layout.channel(source, number % kChannelSlots);
                Patience patience(state, CQIL_DIRECTED, number);
                Packet p;
                while ((p = load_halves(slot + size_t(unit) * sizeof(Packet))).word[1] != number || p.word[3] != number)
                    patience.turn(1, source);
                data = Packet{{p.word[0], p.word[2], 0, 0}};
                add_to<T>(sum, data);
            }
            // A single source is passed on unchanged; a sum is rounded once.
            if (__popc(d.sources) > 1) data = rounded<T>([&](int i) { return sum[i]; });
            const uint64_t bits = d.copies ? given(unit) : uint64_t(data.word[1]) << 32 | data.word[0];
            if (partial(unit))
                for (uint32_t i = 0; i < d.tail; ++i)
                    static_cast<uint8_t*>(d.out)[size_t(unit) * 8 + i] = uint8_t(bits >> (8 * i));
            else
                static_cast<uint64_t*>(d.out)[unit] = bits;
        }
    }

    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(&state->directed_arrived, 1) != gridDim.x - 1) return;
    state->directed_arrived = 0;
    fence_system();
    for (int peer = 0; peer < world; ++peer) {
        if (d.targets >> peer & 1) state->sent[peer] += 1;
        if (d.sources >> peer & 1) {
            state->received[peer] += 1;
            store_system(reinterpret_cast<uint32_t*>(state->memory[peer]) + rank, state->received[peer]);
        }
    }
}

// Ranks 0 and 1 pass a word back and forth.
__global__ void ping_kernel(State* state, uint32_t rounds) {
    const int rank = state->rank;
    uint32_t* here = reinterpret_cast<uint32_t*>(state->memory[rank] + Layout::kPingOffset);
    uint32_t* there = reinterpret_cast<uint32_t*>(state->memory[1 - rank] + Layout::kPingOffset);
    Patience patience(state, CQIL_DIRECTED, 0);
    const uint32_t base = state->pings;
    for (uint32_t i = 1; i <= rounds; ++i) {
        if (rank == 0) store_system(there, base + i);
        while (load_system(here) != base + i) patience.turn(1, 1 - rank);
        if (rank == 1) store_system(there, base + i);
    }
    state->pings = base + rounds;
}

}  // namespace cqil_trt
