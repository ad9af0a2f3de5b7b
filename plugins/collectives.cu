// Host side of the collectives: the workspace, the choice of kernel and grid, and the C interface.

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "errors.h"
#include "kernels.cuh"
#include "types.cuh"

#ifndef CQIL_VERSION
#define CQIL_VERSION "unversioned"
#endif

using namespace cqil_trt;

struct cqil_workspace {
    State host;  // copy of what the device has
    State* device = nullptr;
    char* memory = nullptr;
    cqil_failure* failure = nullptr;
    bool open = false;
    int multiprocessors = 0;
    size_t one_shot_capacity = 0;
    size_t max_bytes = 0;
    size_t one_shot_bytes = 0;  // the cross-over in use
    int threads = 0;            // 0: chosen by size
    int blocks = 0;
    bool overlap = true;
};

namespace {

thread_local char last_error[512] = "";

}  // namespace

int cqil_trt::fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    return -1;
}

int cqil_trt::fail_cuda(const char* call, cudaError_t error) {
    cudaGetLastError();  // cleared, so that no later call reports this error again
    const char* reason = cqil_attention_failure();
    return fail("%s: %s%s%s", call, cudaGetErrorString(error), reason ? ": " : "", reason ? reason : "");
}

namespace {

std::mutex registry_mutex;
std::unordered_map<const void*, cqil_workspace*>& registry() {
    static auto* workspaces = new std::unordered_map<const void*, cqil_workspace*>;
    return *workspaces;
}

std::atomic<cqil_workspace*> shared_workspace{nullptr};

// Messages up to this size go whole to every peer. Above it, each rank sums its share and returns the result. Measured
// for two ranks on H200s (docs/allreduce.md); scaled down for more ranks, where one-shot sends world - 1 times the
// data, but not measured.
size_t default_one_shot_bytes(int world) { return world <= 2 ? 2 << 20 : world <= 4 ? 512 << 10 : 256 << 10; }
constexpr size_t kDefaultMaxBytes = 16 << 20;
// A row of the fused kernel: at most 1,024 threads of two packets each.
constexpr size_t kMaxRowBytes = 32 << 10;

using AllReduceKernel = void (*)(State*, AllReduce);

template <typename T, int kWorld, int kVectors, Norms kNorms>
AllReduceKernel pick(bool two_shot) {
    // cqil_all_reduce_norms sends long messages otherwise.
    if constexpr (kNorms != Norms::kAny)
        if (two_shot) return all_reduce_kernel<T, kWorld, kVectors, kNorms, true>;
    return all_reduce_kernel<T, kWorld, kVectors, kNorms, false>;
}

template <typename T, int kWorld, Norms kNorms>
AllReduceKernel pick(int vectors, bool two_shot) {
    if constexpr (kNorms != Norms::kNone)
        if (vectors == 2) return pick<T, kWorld, 2, kNorms>(two_shot);
    return pick<T, kWorld, 1, kNorms>(two_shot);
}

template <typename T, int kWorld>
AllReduceKernel pick(int vectors, Norms norms, bool two_shot) {
    switch (norms) {
        case Norms::kNone: return pick<T, kWorld, Norms::kNone>(vectors, two_shot);
        case Norms::kAfter: return pick<T, kWorld, Norms::kAfter>(vectors, two_shot);
        default: return pick<T, kWorld, Norms::kAny>(vectors, two_shot);
    }
}

template <typename T>
AllReduceKernel pick(int world, int vectors, Norms norms, bool two_shot) {
    if (world <= 2) return pick<T, 2>(vectors, norms, two_shot);
    if (world <= 4) return pick<T, 4>(vectors, norms, two_shot);
    return pick<T, 8>(vectors, norms, two_shot);
}

AllReduceKernel pick(cqil_dtype dtype, int world, int vectors, Norms norms, bool two_shot) {
    switch (dtype) {
        case CQIL_FLOAT32: return pick<float>(world, vectors, norms, two_shot);
        case CQIL_FLOAT16: return pick<__half>(world, vectors, norms, two_shot);
        default: return pick<__nv_bfloat16>(world, vectors, norms, two_shot);
    }
}

using DirectedKernel = void (*)(State*, Directed);

DirectedKernel pick_directed(cqil_dtype dtype) {
    switch (dtype) {
        case CQIL_FLOAT32: return directed_kernel<float>;
        case CQIL_FLOAT16: return directed_kernel<__half>;
        default: return directed_kernel<__nv_bfloat16>;
    }
}

// All kernels are loaded before the first collective. Lazy loading may wait for the device, where a kernel may be
// waiting for a peer that is loading the same kernel.
int load_kernels(int world) {
    cudaFuncAttributes attributes;
    for (cqil_dtype dtype : {CQIL_FLOAT32, CQIL_FLOAT16, CQIL_BFLOAT16}) {
        for (int vectors : {1, 2})
            for (Norms norms : {Norms::kNone, Norms::kAfter, Norms::kAny})
                for (bool two_shot : {false, true})
                    CQIL_CUDA(
                        cudaFuncGetAttributes(&attributes, (const void*)pick(dtype, world, vectors, norms, two_shot)));
        CQIL_CUDA(cudaFuncGetAttributes(&attributes, (const void*)pick_directed(dtype)));
    }
    CQIL_CUDA(cudaFuncGetAttributes(&attributes, (const void*)argmax_kernel));
    CQIL_CUDA(cudaFuncGetAttributes(&attributes, (const void*)ping_kernel));
    return 0;
}

__global__ void fill_kernel(Packet* packets, size_t count) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        packets[i] = Packet{{kEmpty, kEmpty, kEmpty, kEmpty}};
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Packet) == 0; }

int check(const cqil_workspace* w, cqil_dtype dtype) {
    if (w == nullptr) return fail("no workspace");
    if (!w->open) return fail("the workspace is not open");
    if (dtype < CQIL_FLOAT32 || dtype > CQIL_BFLOAT16) return fail("unknown data type %d", int(dtype));
    return 0;
}

int ceil_to(int value, int step) { return (value + step - 1) / step * step; }

// Launches one all-reduce that fits the workspace.
int launch_all_reduce(cqil_workspace* w, AllReduce a, cqil_dtype dtype, int vectors, int threads, Norms norms,
                      cudaStream_t stream) {
    const size_t bytes = size_t(a.packets) * sizeof(Packet);
    const bool two_shot = bytes > w->one_shot_bytes;
    // A block waits only for the blocks of its own index on the peers, which send before they wait. So the grid need
    // not fit on the GPU at once. But a block that has not started keeps its peers waiting, so the grid is no larger
    // than what roughly fits.
    const int resident = w->multiprocessors * std::max(1, std::min(2, 1536 / threads));
    int blocks = std::min<int>(a.rows, w->blocks ? w->blocks : resident);
    // If the number of blocks were a multiple of the ranks, all rows of a block would belong to one rank.
    if (two_shot && blocks > 1 && blocks < int(a.rows) && blocks % w->host.world == 0) --blocks;
    return launch(pick(dtype, w->host.world, vectors, norms, two_shot),
                  {dim3(blocks), dim3(threads), stream, w->overlap}, w->device, a);
}

struct NormOperands {
    const void *in, *in_norm, *residual, *weight;
    void *residual_out, *normed;
};

int all_reduce_norms(cqil_workspace* w, const NormOperands& o, int rows, int hidden, float eps, cqil_norm kind,
                     Norms norms, cqil_dtype dtype, cudaStream_t stream) {
    if (check(w, dtype)) return -1;
    if (rows < 0 || hidden < 1) return fail("%d rows of %d", rows, hidden);
    const size_t row_bytes = size_t(hidden) * element_bytes(dtype);
    const size_t most = norms == Norms::kAny ? kMaxRowBytes / 2 : kMaxRowBytes;
    if (row_bytes % sizeof(Packet) || row_bytes > most)
        return fail("a row of %zu bytes is not a multiple of 16 up to %zu", row_bytes, most);
    for (const void* p : {o.in, o.residual, static_cast<const void*>(o.residual_out)})
        if (p == nullptr || !aligned(p)) return fail("pointers must be given and 16-byte aligned");
    if (!aligned(o.in_norm) || !aligned(o.weight) || !aligned(o.normed))
        return fail("pointers must be 16-byte aligned");
    if ((o.weight == nullptr) != (o.normed == nullptr)) return fail("a norm's weight and its result belong together");
    const int step = int(w->max_bytes / row_bytes);
    for (int row = 0; row < rows; row += step) {
        const size_t offset = size_t(row) * row_bytes;
        AllReduce a = {};
        a.in = static_cast<const char*>(o.in) + offset;
        a.residual = static_cast<const char*>(o.residual) + offset;
        a.weight = o.weight;
        a.out = static_cast<char*>(o.residual_out) + offset;
        a.normed = o.normed ? static_cast<char*>(o.normed) + offset : nullptr;
        a.rows = uint32_t(std::min(step, rows - row));
        a.width = uint32_t(row_bytes / sizeof(Packet));
        a.packets = a.rows * a.width;
        a.eps = eps;
        a.inverse_hidden = 1.0f / float(hidden);
        a.in_norm = o.in_norm;
        a.kind = kind;
        const int width = int(a.width);
        // Blocks this small fit next to those of two products (linear.cu).
        const int vectors = width > 512 || (w->threads && width > w->threads) ? 2 : 1;
        const int threads = ceil_to((width + vectors - 1) / vectors, 32);
        if (launch_all_reduce(w, a, dtype, vectors, threads, norms, stream)) return -1;
    }
    return 0;
}

int directed(cqil_workspace* w, const void* in, void* out, size_t count, uint32_t targets, uint32_t sources,
             bool copies, cqil_dtype dtype, cudaStream_t stream) {
    if (check(w, dtype)) return -1;
    if (!aligned(in) || !aligned(out)) return fail("pointers must be 16-byte aligned");
    size_t bytes = count * element_bytes(dtype);
    for (size_t done = 0; done < bytes; done += kChannelBytes) {
        const size_t part = std::min(kChannelBytes, bytes - done);
        Directed d = {};
        d.in = in ? static_cast<const char*>(in) + done : nullptr;
        d.out = out ? static_cast<char*>(out) + done : nullptr;
        d.units = uint32_t((part + 7) / 8);
        d.tail = uint32_t(part % 8);
        d.targets = targets;
        d.sources = sources;
        d.copies = copies;
        const int threads = w->threads ? w->threads : 256;
        const int wanted = int((d.units + threads - 1) / threads);
        const int blocks = std::min(wanted, w->blocks ? w->blocks : w->multiprocessors);
        if (launch(pick_directed(dtype), {dim3(blocks), dim3(threads), stream, w->overlap}, w->device, d)) return -1;
    }
    return 0;
}

}  // namespace

extern "C" {

const char* cqil_last_error(void) { return last_error; }

const char* cqil_version(void) { return CQIL_VERSION; }

int cqil_workspace_create(int rank, int world_size, size_t one_shot_bytes, size_t max_bytes, double timeout_seconds,
                          cqil_workspace** workspace) {
    if (world_size < 1 || world_size > kMaxRanks)
        return fail("world size %d is not from 1 to %d", world_size, kMaxRanks);
    if (rank < 0 || rank >= world_size) return fail("rank %d is not from 0 to %d", rank, world_size - 1);
    uint64_t timeout_ns = 0;
    if (to_nanoseconds(timeout_seconds, &timeout_ns)) return -1;
    auto* w = new (std::nothrow) cqil_workspace();
    if (w == nullptr) return fail("out of host memory");
    auto create = [&]() -> int {
        if (device_attribute(cudaDevAttrMultiProcessorCount, &w->multiprocessors)) return -1;
        w->one_shot_capacity = align(one_shot_bytes ? one_shot_bytes : default_one_shot_bytes(world_size));
        w->one_shot_bytes = w->one_shot_capacity;
        w->max_bytes = std::max(align(max_bytes ? max_bytes : kDefaultMaxBytes), w->one_shot_capacity);

        State& s = w->host;
        s = State{};
        s.rank = rank;
        s.world = world_size;
        s.timeout_ns = timeout_ns;
        s.layout.world = world_size;
        s.layout.one_shot_stride = w->one_shot_capacity;
        // Rows are dealt out to ranks, so one rank may get up to a row more than its share.
        s.layout.chunk_stride = align(w->max_bytes / world_size + kMaxRowBytes);
        CQIL_CUDA(cudaHostAlloc(&w->failure, sizeof(cqil_failure), cudaHostAllocMapped | cudaHostAllocPortable));
        *w->failure = {};
        CQIL_CUDA(cudaHostGetDevicePointer(&s.failure, w->failure, 0));
        CQIL_CUDA(cudaMalloc(&w->memory, s.layout.total()));
        CQIL_CUDA(cudaMalloc(&w->device, sizeof(State)));
        // Everything except the data buffers starts at zero. No message has number 0.
        CQIL_CUDA(cudaMemset(w->memory, 0, s.layout.total()));
        const size_t first = s.layout.one_shot(0, 0), last = s.layout.channel(0, 0);
        auto* packets = reinterpret_cast<Packet*>(w->memory + first);
        if (launch(fill_kernel, {256, 256, nullptr, false}, packets, (last - first) / sizeof(Packet))) return -1;
        if (load_kernels(world_size)) return -1;
        s.memory[rank] = w->memory;
        CQIL_CUDA(cudaMemcpy(w->device, &s, sizeof(State), cudaMemcpyHostToDevice));
        CQIL_CUDA(cudaDeviceSynchronize());
        w->open = world_size == 1;
        return 0;
    };
    if (create()) {
        cqil_workspace_destroy(w);
        return -1;
    }
    std::lock_guard<std::mutex> lock(registry_mutex);
    registry()[w->device] = w;
    *workspace = w;
    return 0;
}

int cqil_workspace_handle(cqil_workspace* w, void* handle) {
    static_assert(sizeof(cudaIpcMemHandle_t) == CQIL_HANDLE_BYTES, "size of an IPC handle");
    CQIL_CUDA(cudaIpcGetMemHandle(static_cast<cudaIpcMemHandle_t*>(handle), w->memory));
    return 0;
}

int cqil_workspace_open(cqil_workspace* w, const void* handles) {
    for (int peer = 0; peer < w->host.world; ++peer) {
        if (peer == w->host.rank || w->host.memory[peer]) continue;
        cudaIpcMemHandle_t handle;
        memcpy(&handle, static_cast<const char*>(handles) + size_t(peer) * CQIL_HANDLE_BYTES, sizeof(handle));
        void* mapped = nullptr;
        cudaError_t error = cudaIpcOpenMemHandle(&mapped, handle, cudaIpcMemLazyEnablePeerAccess);
        if (error != cudaSuccess)
            return fail(
                "rank %d cannot map the memory of rank %d (%s): peer-to-peer access between their GPUs is needed",
                w->host.rank, peer, cudaGetErrorString(error));
        w->host.memory[peer] = static_cast<char*>(mapped);
    }
    CQIL_CUDA(cudaMemcpy(w->device, &w->host, sizeof(State), cudaMemcpyHostToDevice));
    CQIL_CUDA(cudaDeviceSynchronize());
    w->open = true;
    return 0;
}

int cqil_workspace_close(cqil_workspace* w) {
    w->open = false;
    // After a failed kernel every call fails; the end of the process releases the rest.
    cudaDeviceSynchronize();
    for (int peer = 0; peer < w->host.world; ++peer)
        if (peer != w->host.rank && w->host.memory[peer]) {
            cudaIpcCloseMemHandle(w->host.memory[peer]);
            w->host.memory[peer] = nullptr;
        }
    return 0;
}

int cqil_workspace_destroy(cqil_workspace* w) {
    if (w == nullptr) return 0;
    {
        std::lock_guard<std::mutex> lock(registry_mutex);
        registry().erase(w->device);
    }
    cqil_workspace* mine = w;
    shared_workspace.compare_exchange_strong(mine, nullptr);
    cudaFree(w->device);
    cudaFree(w->memory);
    if (w->failure) cudaFreeHost(w->failure);
    delete w;
    return 0;
}

void* cqil_workspace_address(cqil_workspace* w) { return w->device; }

cqil_workspace* cqil_workspace_find(const void* address) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    auto found = registry().find(address);
    return found == registry().end() ? nullptr : found->second;
}

int cqil_workspace_share(cqil_workspace* w) {
    shared_workspace = w;
    return 0;
}

cqil_workspace* cqil_workspace_shared(void) { return shared_workspace; }

int cqil_workspace_rank(cqil_workspace* w) { return w->host.rank; }

int cqil_workspace_failure(cqil_workspace* w, cqil_failure* failure) {
    memcpy(failure, w->failure, sizeof(*failure));
    return 0;
}

int cqil_workspace_tune(cqil_workspace* w, int threads, int blocks, size_t one_shot_bytes, int overlap) {
    if (threads < 0 || threads > 1024 || threads % 32)
        return fail("%d threads are not a multiple of 32 up to 1024", threads);
    if (blocks < 0 || blocks > w->multiprocessors) return fail("%d blocks are more than the multiprocessors", blocks);
    w->threads = threads;
    w->blocks = blocks;
    w->one_shot_bytes = std::min(one_shot_bytes ? one_shot_bytes : w->one_shot_capacity, w->one_shot_capacity);
    w->overlap = overlap != 0;
    return 0;
}

int cqil_all_reduce(cqil_workspace* w, const void* in, const void* residual, void* out, size_t count, cqil_dtype dtype,
                    void* stream) {
    if (check(w, dtype)) return -1;
    if (!aligned(in) || !aligned(residual) || !aligned(out)) return fail("pointers must be 16-byte aligned");
    const size_t element = element_bytes(dtype), bytes = count * element;
    for (size_t done = 0; done < bytes; done += w->max_bytes) {
        const size_t part = std::min(w->max_bytes, bytes - done);
        AllReduce a = {};
        a.in = static_cast<const char*>(in) + done;
        a.residual = residual ? static_cast<const char*>(residual) + done : nullptr;
        a.out = static_cast<char*>(out) + done;
        a.packets = uint32_t((part + sizeof(Packet) - 1) / sizeof(Packet));
        a.tail = uint32_t(part % sizeof(Packet) / element);
        // Small messages are spread over many small blocks; large ones fill the multiprocessors.
        const int threads = w->threads ? w->threads : part <= (64 << 10) ? 128 : 512;
        a.width = threads;
        a.rows = (a.packets + a.width - 1) / a.width;
        if (launch_all_reduce(w, a, dtype, 1, threads, Norms::kNone, static_cast<cudaStream_t>(stream))) return -1;
    }
    return 0;
}

int cqil_all_reduce_residual_norm(cqil_workspace* w, const void* in, const void* residual, const void* weight,
                                  void* residual_out, void* normed, int rows, int hidden, float eps, cqil_dtype dtype,
                                  void* stream) {
    if (weight == nullptr || normed == nullptr) return fail("pointers must be given and 16-byte aligned");
    return all_reduce_norms(w, {in, nullptr, residual, weight, residual_out, normed}, rows, hidden, eps,
                            CQIL_NORM_ROUNDED, Norms::kAfter, dtype, static_cast<cudaStream_t>(stream));
}

int cqil_all_reduce_norms(cqil_workspace* w, const void* in, const void* in_norm, const void* residual,
                          const void* weight, void* residual_out, void* normed, int rows, int hidden, float eps,
                          cqil_norm norm, cqil_dtype dtype, void* stream) {
    if (norm < CQIL_NORM_ROUNDED || norm > CQIL_NORM_OFFSET) return fail("norms of kind %d", int(norm));
    if (check(w, dtype)) return -1;
    const size_t count = size_t(std::max(rows, 0)) * std::max(hidden, 0);
    if (count * element_bytes(dtype) <= w->one_shot_bytes)
        return all_reduce_norms(w, {in, in_norm, residual, weight, residual_out, normed}, rows, hidden, eps, norm,
                                Norms::kAny, dtype, static_cast<cudaStream_t>(stream));
    if (cqil_all_reduce(w, in, in_norm == nullptr ? residual : nullptr, residual_out, count, dtype, stream)) return -1;
    if (in_norm != nullptr)
        return cqil_residual_norm(residual_out, in_norm, residual, weight, residual_out, normed, rows, hidden, eps,
                                  norm, dtype, stream);
    if (weight == nullptr) return 0;
    return cqil_residual_norm(nullptr, nullptr, residual_out, weight, nullptr, normed, rows, hidden, eps, norm, dtype,
                              stream);
}

int cqil_broadcast(cqil_workspace* w, const void* in, void* out, size_t count, cqil_dtype dtype, void* stream) {
    if (check(w, dtype)) return -1;
    const bool root = w->host.rank == 0;
    if ((root ? in : out) == nullptr) return fail("%s is needed", root ? "in" : "out");
    const uint32_t others = ((1u << w->host.world) - 1) & ~1u;
    return directed(w, root ? in : nullptr, out, count, root ? others : 0, root ? 0 : 1, root, dtype,
                    static_cast<cudaStream_t>(stream));
}

int cqil_bypass(cqil_workspace* w, const void* in, void* out, size_t count, int distance, cqil_dtype dtype,
                void* stream) {
    if (check(w, dtype)) return -1;
    if (distance < 0 || distance >= w->host.world)
        return fail("distance %d is not from 0 to %d", distance, w->host.world - 1);
    uint32_t targets = 0, sources = 0;
    for (int i = 1; i <= distance; ++i) {
        if (w->host.rank + i < w->host.world) targets |= 1u << (w->host.rank + i);
        if (w->host.rank - i >= 0) sources |= 1u << (w->host.rank - i);
    }
    return directed(w, in, out, count, targets, sources, false, dtype, static_cast<cudaStream_t>(stream));
}

int cqil_argmax(cqil_workspace* w, const float* values, const int32_t* indices, float* best_value, int32_t* best_index,
                int rows, void* stream) {
    if (check(w, CQIL_FLOAT32)) return -1;
    const int most = int(w->one_shot_capacity / sizeof(Packet));
    if (rows < 0 || rows > most) return fail("%d rows, the workspace takes %d", rows, most);
    if (rows == 0) return 0;
    // After a prompt the kernel clears what its last all-reduce has received, megabytes: one warp takes milliseconds.
    const int threads = 256, blocks = std::min(std::max((rows + threads - 1) / threads, 32), w->multiprocessors);
    return launch(argmax_kernel, {dim3(blocks), dim3(threads), static_cast<cudaStream_t>(stream), w->overlap},
                  w->device, values, indices, best_value, best_index, uint32_t(rows));
}

int cqil_ping(cqil_workspace* w, int rounds, double* nanoseconds, void* stream) {
    if (check(w, CQIL_FLOAT32)) return -1;
    *nanoseconds = 0;
    if (w->host.world < 2 || w->host.rank > 1) return 0;
    auto s = static_cast<cudaStream_t>(stream);
    cudaEvent_t began, ended;
    CQIL_CUDA(cudaEventCreate(&began));
    CQIL_CUDA(cudaEventCreate(&ended));
    // The ranks meet in this kernel, so launch skew is not measured.
    if (launch(ping_kernel, {1, 1, s, false}, w->device, 100)) return -1;
    CQIL_CUDA(cudaEventRecord(began, s));
    if (launch(ping_kernel, {1, 1, s, false}, w->device, rounds)) return -1;
    CQIL_CUDA(cudaEventRecord(ended, s));
    CQIL_CUDA(cudaEventSynchronize(ended));
    float milliseconds = 0;
    CQIL_CUDA(cudaEventElapsedTime(&milliseconds, began, ended));
    CQIL_CUDA(cudaEventDestroy(began));
    CQIL_CUDA(cudaEventDestroy(ended));
    *nanoseconds = double(milliseconds) * 1e6 / rounds;
    return 0;
}

#ifdef CQIL_TEST_DELAYS
int cqil_test_delays(int place, const uint32_t* nanoseconds, int count) {
    static Delays now = {};
    if (place < 0 || place >= kDelayPlaces || count < 0 || count > kMaxDelays)
        return fail("%d delays at place %d", count, place);
    now.count[place] = uint32_t(count);
    std::copy_n(nanoseconds, count, now.nanoseconds[place]);
    for (DelaySetter set : delay_setters()) CQIL_CUDA(set(now));
    CQIL_CUDA(cudaDeviceSynchronize());
    return 0;
}

int cqil_test_epoch(cqil_workspace* w, int left) {
    const uint32_t epoch = kEpochs - uint32_t(left);
    CQIL_CUDA(cudaMemcpy(&w->device->epoch_and_one_shot.word[0], &epoch, sizeof(epoch), cudaMemcpyHostToDevice));
    CQIL_CUDA(cudaDeviceSynchronize());
    return 0;
}
#endif

}  // extern "C"
