// C interface of the collectives and of a decoder's kernels, for ctypes, the TensorRT plugins and C++ programs.
//
// This is its only declaration. cqil_trt/gpu/abi.py reads it: types, enumerations and functions in plain C, constants
// that are literals, and CQIL_PLUGINS.
//
// Every function returns 0, or a negative number and a message for cqil_last_error(). All ranks call the same
// operations with the same sizes in the same order, on one stream each. Operations are asynchronous and may be captured
// into CUDA graphs. Pointers are device pointers, 16-byte aligned, unless stated otherwise.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CQIL_MAX_RANKS 8
#define CQIL_HANDLE_BYTES 64

typedef enum { CQIL_FLOAT32 = 0, CQIL_FLOAT16 = 1, CQIL_BFLOAT16 = 2 } cqil_dtype;

// How an RMSNorm multiplies by its weight: after it has rounded, before, or before and by 1 + weight.
typedef enum { CQIL_NORM_ROUNDED = 0, CQIL_NORM_WIDE = 1, CQIL_NORM_OFFSET = 2 } cqil_norm;

typedef struct cqil_workspace cqil_workspace;

// The record of a kernel that gave up waiting; `code` is 0 if none did.
typedef struct {
    uint32_t code;       // 1: a peer's data did not arrive; 2: a peer did not read ours
    uint32_t rank;       // who waited
    uint32_t peer;       // for whom
    uint32_t operation;  // cqil_operation
    uint32_t sequence;   // number of earlier symmetric operations, or of the message between the two
} cqil_failure;

typedef enum { CQIL_ALL_REDUCE = 1, CQIL_ARGMAX = 2, CQIL_DIRECTED = 3 } cqil_operation;

// The last error on this thread.
const char* cqil_last_error(void);

// The library's build, e.g. "0.1.0+<hash of its sources>". An engine names the one it needs.
const char* cqil_version(void);

// Allocates the workspace of `rank` on the current device. `one_shot_bytes` bounds messages that are sent whole to
// every peer, `max_bytes` any all-reduce (larger ones are split); 0 selects the defaults. `timeout_seconds` bounds
// every wait for a peer; 0: no limit.
int cqil_workspace_create(int rank, int world_size, size_t one_shot_bytes, size_t max_bytes, double timeout_seconds,
                          cqil_workspace** workspace);

// CUDA IPC handle of this rank's memory, CQIL_HANDLE_BYTES bytes at `handle` (host).
int cqil_workspace_handle(cqil_workspace* workspace, void* handle);

// Maps all ranks' memory. `handles` holds world_size handles in rank order (host). All ranks must pass a barrier
// between create and the first operation of any rank; gathering the handles is one.
int cqil_workspace_open(cqil_workspace* workspace, const void* handles);

// Unmaps the peers' memory. All ranks must pass a barrier between close and the destroy of any rank: memory that a peer
// still maps must not be freed.
int cqil_workspace_close(cqil_workspace* workspace);

int cqil_workspace_destroy(cqil_workspace* workspace);

// Device address that identifies the workspace to the TensorRT plugins: bind it to their input `workspace`.
void* cqil_workspace_address(cqil_workspace* workspace);

// The workspace with that address, or NULL.
cqil_workspace* cqil_workspace_find(const void* address);

// Sets the workspace for plugins without an input `workspace` in this process; NULL unsets it.
int cqil_workspace_share(cqil_workspace* workspace);
cqil_workspace* cqil_workspace_shared(void);

int cqil_workspace_rank(cqil_workspace* workspace);

// Reads the record of a failed kernel. Works after the device is lost.
int cqil_workspace_failure(cqil_workspace* workspace, cqil_failure* failure);

// For measurements and tests: threads per block, blocks and one_shot_bytes (0: the defaults), and whether launches may
// overlap the end of the previous kernel (programmatic dependent launch). Must be equal on all ranks.
int cqil_workspace_tune(cqil_workspace* workspace, int threads, int blocks, size_t one_shot_bytes, int overlap);

// out = residual + sum over ranks of in; residual may be NULL. `count` elements. out may be in or residual.
int cqil_all_reduce(cqil_workspace* workspace, const void* in, const void* residual, void* out, size_t count,
                    cqil_dtype dtype, void* stream);

// residual_out = residual + sum over ranks of in; normed = RMSNorm(residual_out) * weight, for `rows` rows of `hidden`
// elements. hidden * element size must be a multiple of 16 and at most 32 KiB. residual_out may be residual. `weight`
// may be read before earlier work on the stream is done, so it must not be the result of that work.
int cqil_all_reduce_residual_norm(cqil_workspace* workspace, const void* in, const void* residual, const void* weight,
                                  void* residual_out, void* normed, int rows, int hidden, float eps, cqil_dtype dtype,
                                  void* stream);

// As cqil_residual_norm, with the sum over ranks of in as delta and in_norm as delta_norm; residual is given, and is not
// residual_out. hidden * element size must be a multiple of 16 and at most 16 KiB. One kernel for messages of up to
// one_shot_bytes, with the same bits for a row whatever the others are; more for longer ones. The weights may be read
// before earlier work on the stream is done, so they must not be the results of that work.
int cqil_all_reduce_norms(cqil_workspace* workspace, const void* in, const void* in_norm, const void* residual,
                          const void* weight, void* residual_out, void* normed, int rows, int hidden, float eps,
                          cqil_norm norm, cqil_dtype dtype, void* stream);

// Copies rank 0's `in` to every rank's `out`, on rank 0 unless it is NULL. `in` may be NULL on other ranks.
int cqil_broadcast(cqil_workspace* workspace, const void* in, void* out, size_t count, cqil_dtype dtype, void* stream);

// out = sum of the `in` of the min(distance, rank) ranks just before this one; zeros on rank 0. A rank waits for the
// ranks it receives from. It waits for a rank it sends to only when it is four messages (of up to 1 MiB) ahead. out
// must not be in.
int cqil_bypass(cqil_workspace* workspace, const void* in, void* out, size_t count, int distance, cqil_dtype dtype,
                void* stream);

// For each of `rows` rows, the largest value among all ranks' (values[row], indices[row]), with the smallest index
// among equals, in best_value and best_index on every rank. A rank without a candidate gives -infinity. NaN counts as
// largest.
int cqil_argmax(cqil_workspace* workspace, const float* values, const int32_t* indices, float* best_value,
                int32_t* best_index, int rows, void* stream);

// Measures the latency of one word over the link: `rounds` round trips between ranks 0 and 1 in one kernel.
// `nanoseconds` (host) receives the time of one round trip. Synchronises. Other ranks return at once.
int cqil_ping(cqil_workspace* workspace, int rounds, double* nanoseconds, void* stream);

// The rest of a decode step, on one GPU without a workspace.

// out [rows, hidden] = table[indices], whose rows have `hidden` elements. Indices are not checked.
int cqil_gather_rows(const void* table, const int32_t* indices, void* out, int rows, int hidden, cqil_dtype dtype,
                     void* stream);

// For each of `rows` rows of `width` logits, the largest value and its index + offset, as input for cqil_argmax. The
// smallest index among equals; NaN counts as largest. A rank with width 0 gives -infinity.
int cqil_row_argmax(const void* logits, int rows, int width, int offset, cqil_dtype dtype, float* value, int32_t* index,
                    void* stream);

// A cache has slots for sequences. Row b of a step belongs to slot slots[b]; no two sequences of a step share
// a slot.

// How a slot's tokens are chosen. temperature 0: the likeliest token. top_k 0, top_p 1 and min_p 0 keep every token. A
// repetition_penalty of 1, and 0 for the other penalties, change nothing; repetition_penalty is above 0. logprobs: how
// many of the likeliest tokens cqil_logprobs reports, 0 for only the chosen one, -1 for nothing. masked, biased: 1 if
// the slot's row of the mask and of the bias applies.
typedef struct {
    float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    int32_t top_k, logprobs, masked, biased;
} cqil_sampling;

// out [rows, width], float32: the logits, as the rows' slots want them adjusted. In this order, for token j of a row:
// - biased: + bias[slot * width + j]
// - counts[slot * width + j] says in its upper bit whether the token is in the prompt, in the others how often it was
//   generated. If it is not 0, a positive value is divided by repetition_penalty and any other multiplied by it. Then
//   frequency_penalty is subtracted as often as the token was generated, and presence_penalty once if it was
// - masked: -infinity if bit j % 32 of mask[slot * ceil(width / 32) + j / 32] is 0
// Of counts, bias and mask only what a row's slot uses is read; each may be NULL if none uses it. `settings` has an
// entry for each slot, in device memory. out may be logits of float32.
int cqil_adjust(const void* logits, int rows, int width, cqil_dtype dtype, const cqil_sampling* settings,
                const int32_t* slots, const uint32_t* counts, const float* bias, const uint32_t* mask, float* out,
                void* stream);

// index[row]: a token chosen from `rows` rows of `width` logits as settings[slots[row]] says. With temperature 0 it has
// the largest logit. Else by temperature, then top-k, then top-p, then min_p, which keeps the tokens that are at least
// min_p times as likely as the likeliest; draws with uniforms[slots[row] * stride + past[row]], which are in [0, 1).
// Equal logits are ordered by id, the smallest first. -infinity and NaN are not chosen; a row of nothing else gives 0.
int cqil_sample(const float* logits, int rows, int width, const cqil_sampling* settings, const int32_t* slots,
                const double* uniforms, int stride, const int32_t* past, int32_t* index, void* stream);

// Tokens and their log-probabilities (log-softmax of the logits as they are, in float32), for the rows whose settings
// have logprobs >= 0, in ids and values [rows, limit + 1]: first chosen[row], then the min(logprobs, limit, width)
// likeliest in falling order, the smaller id first among equals. The rest is not written. limit is at most 256.
int cqil_logprobs(const void* logits, int rows, int width, cqil_dtype dtype, const cqil_sampling* settings,
                  const int32_t* slots, const int32_t* chosen, int limit, int32_t* ids, float* values, void* stream);

// out [rows, all]: part [rows, width] in the columns from `first` on, zeros elsewhere. Its sum over ranks puts all
// ranks' columns side by side.
int cqil_spread(const void* part, void* out, int rows, int width, int first, int all, cqil_dtype dtype, void* stream);

// The input of a step whose rows are not those of the step before, `width` for each sequence: tokens[row] =
// slot_tokens[slots[row]] in a sequence's first row and drafts[row] in the others, past[row] =
// min(slot_past[slots[row]] + row % width, last). With a width of 1, drafts may be NULL.
int cqil_arrange(const int32_t* slots, const int32_t* slot_tokens, const int32_t* slot_past, const int32_t* drafts,
                 int32_t* tokens, int32_t* past, int rows, int width, int last, void* stream);

// Makes the chosen tokens the input of the next step: tokens[row] = next[row], past[row] = min(past[row] + 1, last),
// both also in slot_tokens[slots[row]] and slot_past[slots[row]]. Unless counts is NULL, counts[slots[row] * vocabulary
// + next[row]] += 1. Then *step += 1. Also writes history[*step % history_slots * stride + row] in one store: next[row]
// in the lower half and *step + 1 in the upper half. In page-locked host memory this tells the host that the token is
// there before the stream's work is done. history_slots is a power of 2, so that places stay in turn when *step begins
// again after 2^32 steps.
int cqil_advance(const int32_t* next, const int32_t* slots, int32_t* tokens, int32_t* past, int32_t* slot_tokens,
                 int32_t* slot_past, uint32_t* counts, int vocabulary, int rows, int last, uint32_t* step,
                 uint64_t* history, int history_slots, int stride, void* stream);

// The end of a step with drafts, `width` rows for each sequence, of which the first fed its next token and drafted[i]
// more (fewer than `width`) fed drafts. next[row] was chosen after tokens[row]. Of sequence i the chosen tokens are
// accepted up to the first that is not the draft that was fed after it. In place of each of them cqil_advance would
// have been called: the last one and its position go to slot_tokens and slot_past, all are counted. `history` gets
// next[row] of every row.
int cqil_accept(const int32_t* next, const int32_t* tokens, const int32_t* drafted, const int32_t* slots,
                const int32_t* past, int32_t* slot_tokens, int32_t* slot_past, uint32_t* counts, int vocabulary,
                int rows, int width, int last, uint32_t* step, uint64_t* history, int history_slots, int stride,
                void* stream);

// sum = residual + delta, normed = RMSNorm(sum) * weight, for `rows` rows of `hidden` elements. Without delta (NULL),
// normed is that of residual, and sum is not written. With delta_norm, RMSNorm(delta) * delta_norm takes the place of
// delta, residual may be NULL, for zeros, and weight may be, for no normed. `norm` is of both norms. With delta_norm,
// or with another `norm` than CQIL_NORM_ROUNDED, rows have up to 16384 elements. The weights may be read before earlier
// work on the stream is done, so they must not be results of that work. sum may be residual or delta.
int cqil_residual_norm(const void* delta, const void* delta_norm, const void* residual, const void* weight, void* sum,
                       void* normed, int rows, int hidden, float eps, cqil_norm norm, cqil_dtype dtype, void* stream);

// out = x + y, `count` elements; out may be x or y.
int cqil_add(const void* x, const void* y, void* out, size_t count, cqil_dtype dtype, void* stream);

// out = x * factor, `count` elements; with a cap other than 0, cap * tanh(x * factor / cap). out may be x.
int cqil_scale(const void* x, void* out, size_t count, float factor, float cap, cqil_dtype dtype, void* stream);

// What multiplies the second half of a product, made of the first: nothing, SiLU, or GELU in its form with tanh.
typedef enum { CQIL_UNGATED = 0, CQIL_SWIGLU = 1, CQIL_GEGLU = 2 } cqil_gating;

// out [rows, inner] = act(gate) * up, of gate_up [rows, 2 * inner] that holds gate and up one after the other.
int cqil_gate(const void* gate_up, void* out, int rows, int inner, cqil_gating gating, cqil_dtype dtype, void* stream);

// The squares of a row's queries and keys, for norms over all heads: out [rows, 2], float32, is query_factor times the
// sum of q^2, and key_factor times that of k^2 of the key/value heads from first_key up to last_key. qkv is as in
// cqil_attention; without heads it is not read.
int cqil_head_squares(const void* qkv, float* out, int rows, int heads, int kv_heads, int head_dim, int first_key,
                      int last_key, float query_factor, float key_factor, cqil_dtype dtype, void* stream);

// How W is stored: as elements of the type, or packed by cqil_pack from codes of 8 bits (FP8 is E4M3) or 4 bits.
typedef enum { CQIL_DENSE = 0, CQIL_FP8 = 1, CQIL_INT8 = 2, CQIL_INT4 = 3 } cqil_weights;

// Rows of x; elements of a row of out and of x. `gated`, a cqil_gating: W holds gate and up one after the other, and
// out is act(gate) * up, with gate and up rounded to the type first. `eps` is for the norm. `weights` is a
// cqil_weights. `group`: with CQIL_INT4, the columns that have a scale in common, 32, 64 or 128. `scale`: a factor of
// the product; 0 means 1.
typedef struct {
    int32_t rows, outputs, inputs, gated, dtype;
    float eps;
    int32_t weights, group;
    float scale;
} cqil_linear_shape;

// The most rows whose results cqil_linear computes independently of each other on the current device in a half type, 16
// or 1; in float32 1. Negative: an error.
int cqil_linear_rows(cqil_dtype dtype);

// Bytes of scratch memory per call.
size_t cqil_linear_scratch_bytes(const cqil_linear_shape* shape);

// out [rows, outputs] = activation(RMSNorm(x + delta) * norm · Wᵀ + bias) * scale + residual, for x [rows, inputs] and
// W [outputs, inputs] ([2 * outputs, inputs] when gated). Without norm (NULL) x is used as it is, and delta must be
// NULL. delta, bias and residual may be NULL. With sum, the residual is not added to out: sum [rows, outputs] = out +
// residual. Sums are in float32; the norm is CQIL_NORM_ROUNDED. W and norm may be read before earlier work on the
// stream is done, so they must not be results of that work; W may be with more than 16 rows. out (or sum) may be
// residual, but not x. A gated product takes no residual and no scale.
// In half types on compute capability 9.0 and later, with up to 16 rows and a multiple of 8 inputs, a row's result has
// the same bits whatever the other rows are, and however many.
int cqil_linear(const cqil_linear_shape* shape, const void* x, const void* delta, const void* weight, const void* bias,
                const void* norm, const void* residual, void* out, void* sum, void* scratch, void* stream);

// Whether cqil_linear multiplies more than 16 rows by dense weights with cuBLASLt: 1, or 0 where our kernels do. The
// library is the file that the environment variable CQIL_CUBLASLT names, else libcublasLt.so.13 or .12, loaded already
// or found by the loader when it is first needed, if the driver runs its CUDA. Sums are in float32 with either.
// `allowed`: 0 keeps later calls in this process to our kernels, 1 ends that, and a negative number changes nothing.
// Negative: the library named cannot be used.
int cqil_linear_library(int allowed);

// The most rows for which cqil_linear should be used with packed weights on the current device; 0: it cannot be. With
// more, cqil_unpack and cqil_linear with dense weights are faster. Negative: an error. However many rows there are, a
// row's result has the same bits.
int cqil_packed_rows(void);

// Bytes of packed weights. Half types, and a multiple of 8 inputs, only.
size_t cqil_packed_bytes(const cqil_linear_shape* shape);

// Packs W = (codes - zeros) * scales, [outputs, inputs] ([2 * outputs, inputs] when gated). Codes of 4 bits are two in
// a byte, the lower half first; a row begins with a byte. Scales of CQIL_INT4 are of the type, others float32. Scales
// and zeros (bytes, NULL for none) are [outputs, groups], for groups of `size` columns, or one if it is 0. Column 0 is
// column `first` of its group. `size` and `first` must be multiples of the shape's group.
int cqil_pack(const cqil_linear_shape* shape, const void* codes, const void* scales, const void* zeros, int size,
              int first, void* packed, void* stream);

// out = W, dense, from what cqil_pack has made.
int cqil_unpack(const cqil_linear_shape* shape, const void* packed, void* out, void* stream);

// out = W, dense, from what cqil_pack takes; any type, any inputs, any groups.
int cqil_dequantize(const cqil_linear_shape* shape, const void* codes, const void* scales, const void* zeros, int size,
                    int first, void* out, void* stream);

// The most elements of a head that cqil_attention takes; an even number.
#define CQIL_MAX_HEAD_DIM 256

// A cache that is a circle holds a multiple of so many positions.
#define CQIL_CIRCLE_STEP 64

// How a cache stores keys and values: in the type, or in FP8 (E4M3), divided by a scale.
typedef enum { CQIL_CACHE_PLAIN = 0, CQIL_CACHE_FP8 = 1 } cqil_cache;

// `length` new tokens of `batch` sequences, starting at position past[b], and a cache with `max_batch` slots for
// sequences of `capacity` tokens. Query head i reads key/value head (i + first) / group. `eps` is for the head norms.
// `drafts`: several new tokens are a decode step, the next token of each sequence and drafts of those after it.
//
// What LLaMA does not have, all 0 there. `window`: a query sees so many keys, its own included; 0: all before it.
// `rotary`: elements of a head that are rotated, the first ones; 0: all. `norm` is a cqil_norm, of the head norms.
// `scale` multiplies scores; 0: 1 / sqrt(head_dim). `cap`: a score s becomes cap * tanh(s / cap) where it is not 0.
// `cache` is a cqil_cache. With CQIL_CACHE_FP8, keys and values are multiplied by the reciprocals of key_scale and
// value_scale in float32, rounded to even, and to the largest number of E4M3 if they are larger.
// `positions`: of a sequence; 0: `capacity`. Where there are more, the cache is a circle, for layers with a window:
// position p is at p % capacity. Then `capacity`, a multiple of CQIL_CIRCLE_STEP, is at least window + length - 1, so
// that a step overwrites nothing that its first token sees.
typedef struct {
    int32_t batch, length, heads, kv_heads, head_dim, capacity, max_batch, group, first, dtype;
    float eps;
    int32_t drafts;
    int32_t window, rotary, norm;
    float scale, cap;
    int32_t cache;
    float key_scale, value_scale;
    int32_t positions;
} cqil_attention_shape;

// Bytes of one layer's cache: keys, then values, each [max_batch, kv_heads, capacity, head_dim], then memory through
// which the blocks of a head communicate. The latter must be zero before the first use. And bytes of scratch memory per
// call. If not all elements of a head are rotated, keys are kept in an order in which an element and its partner in the
// rotation are head_dim / 2 apart.
size_t cqil_attention_cache_bytes(const cqil_attention_shape* shape);
size_t cqil_attention_scratch_bytes(const cqil_attention_shape* shape);

// Causal attention: applies head norms with weights [head_dim] unless they are NULL, rotates queries and keys (by
// halves, as Hugging Face does; cos and sin are [positions, rotary / 2], or NULL where nothing is rotated), appends keys
// and values to the cache, and attends. With squares, the norms are over all heads: their weights are [heads *
// head_dim] and [kv_heads * head_dim], and squares [batch * length, 2] has for each token the mean of the squares of
// all queries' elements and that of all keys'. qkv [batch * length, heads + 2 * kv_heads, head_dim] -> out [batch *
// length, heads, head_dim]. Sequence b is in slot slots[b] of the cache, in slot b if slots is NULL; no two sequences
// share one. Only several tokens of a prompt need scratch, for the queries.
//
// In a decode step (one new token, or `drafts`) a row's result has the same bits whatever the other rows are, however
// many, and whether its token is a draft. With `drafts`, `past` and `slots` have an entry for each row, of which the
// first one of each sequence is read. Tokens from position `positions` on are not appended, and have no meaningful
// result.
//
// In a decode step `past`, `slots`, cos, sin, the norms' weights and the cache may be read before earlier work on the
// stream is done. cos, sin and the weights must not be results of that work. `past` and `slots` may be written by
// cqil_advance or cqil_arrange, by a copy, or by a kernel of the caller's that another such kernel or a copy follows.
// Earlier calls on the same cache are waited for: a call overlaps earlier kernels only if a cqil_advance, cqil_accept
// or cqil_arrange, or a call that did not overlap lies between it and the last use of the cache on this stream.
int cqil_attention(const cqil_attention_shape* shape, const void* qkv, const int32_t* past, const int32_t* slots,
                   const float* cos, const float* sin, const void* q_norm, const void* k_norm, const float* squares,
                   void* cache, void* out, void* scratch, void* stream);

// Bounds the wait of attention's blocks for each other, for later calls in this process. 30 s by default; 0: no limit.
int cqil_attention_timeout(double seconds);

// Why an attention kernel gave up waiting and trapped, or NULL if none did. Ask when CUDA reports an error: the trap
// appears as an illegal instruction or a launch failure. Works after the device is lost.
const char* cqil_attention_failure(void);

#ifdef CQIL_TEST_DELAYS
// For tests, only in a build with CQIL_TEST_DELAYS. Block i of every kernel, counted with x fastest, sleeps for
// nanoseconds[i % count] (host) at its start (place 0) or after the wait for its predecessor (place 1). A count of 0
// ends the delays at a place. Synchronises.
int cqil_test_delays(int place, const uint32_t* nanoseconds, int count);

// For tests, only in such a build. Numbers the first symmetric operation of a workspace so that after `left` more the
// counter begins again. Synchronises. No such operation may have run.
int cqil_test_epoch(cqil_workspace* workspace, int left);
#endif

// The TensorRT plugins of tensorrt_plugins.cpp, and their fields in the order in which engines store them, 4 bytes
// each. An OPTIONAL_INT or OPTIONAL_FLOAT that is left out is 0. `dtype` is a cqil_dtype.
#define CQIL_PLUGIN_NAMESPACE "cqil_trt"
#define CQIL_PLUGIN_VERSION "1"
#define CQIL_PLUGINS(PLUGIN, INT, FLOAT, OPTIONAL_INT, OPTIONAL_FLOAT)                                                 \
    PLUGIN(CqilAllReduce, INT(mode) FLOAT(eps) INT(dtype) OPTIONAL_INT(shared))                                        \
    PLUGIN(CqilBroadcast, INT(rank) INT(hidden) INT(dtype) OPTIONAL_INT(flat))                                         \
    PLUGIN(CqilBypass, INT(distance) INT(dtype) OPTIONAL_INT(shared))                                                  \
    PLUGIN(CqilNorm, INT(delta) FLOAT(eps) INT(dtype) OPTIONAL_INT(kind))                                              \
    PLUGIN(CqilPostNorm, INT(residual) INT(next) FLOAT(eps) INT(kind) INT(dtype))                                      \
    PLUGIN(CqilLinear, INT(delta) INT(bias) INT(norm) INT(residual) INT(gated) FLOAT(eps) INT(dtype) OPTIONAL_INT(     \
                           weights) OPTIONAL_INT(outputs) OPTIONAL_INT(group) OPTIONAL_FLOAT(scale) OPTIONAL_INT(sum)) \
    PLUGIN(CqilAdd, INT(terms) INT(dtype) OPTIONAL_INT(after))                                                         \
    PLUGIN(CqilScale, FLOAT(factor) FLOAT(cap) INT(dtype))                                                             \
    PLUGIN(CqilGather, INT(dtype))                                                                                     \
    PLUGIN(CqilHeadSquares, INT(heads) INT(kv_heads) INT(head_dim) INT(first_key) INT(last_key) FLOAT(query_factor)    \
                                FLOAT(key_factor) INT(dtype))                                                          \
    PLUGIN(CqilAttention,                                                                                              \
           INT(heads) INT(kv_heads) INT(head_dim) INT(capacity) INT(max_batch) INT(group) INT(first) INT(head_norms)   \
               FLOAT(eps) INT(dtype) INT(cache) FLOAT(key_scale) FLOAT(value_scale) OPTIONAL_INT(window)               \
                   OPTIONAL_INT(rotary) OPTIONAL_INT(norm) OPTIONAL_FLOAT(scale) OPTIONAL_FLOAT(cap)                   \
                       OPTIONAL_INT(unrotated) OPTIONAL_INT(joint) OPTIONAL_INT(positions))

// Only in a build with TensorRT. Registers the plugins with the TensorRT that this process has loaded. Loading the
// library does the same if TensorRT is already there.
int cqil_register_plugins(void);

// Between cqil_set_building(1) and cqil_set_building(0) plugins do nothing when TensorRT runs them. A builder times
// plugins, and a collective would wait for ranks that are not there.
void cqil_set_building(int building);

#ifdef __cplusplus
}
#endif
