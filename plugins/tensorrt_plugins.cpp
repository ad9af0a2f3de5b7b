// The collectives and the fused operations of a decoder layer as TensorRT plugins, on the interface that TensorRT 8.5
// to 11 share (IPluginV2DynamicExt).
//
// Collectives take a last input `workspace`: an int32 tensor bound to cqil_workspace_address(), so that an engine holds
// no pointers; where a runtime binds no inputs of ours (field shared = 1, which may be left out), they use the
// process's cqil_workspace_shared() instead. Data tensors are linear and of the type that the field dtype names (a
// cqil_dtype; bfloat16 from TensorRT 10 on): a weakly typed network would otherwise choose one by its speed.
//
//   CqilAllReduce   mode 0: delta                   -> sum over ranks
//                   mode 1: delta, residual         -> residual + sum
//                   mode 2: delta, residual, weight -> residual + sum, RMSNorm of it * weight
//   CqilBroadcast   rank 0: x -> x; others: tokens int32 [B, T] -> rank 0's x [B, T, hidden], [B * T, hidden] if `flat`
//   CqilBypass      x -> sum of the x of the `distance` ranks before this one (zeros on rank 0)
//   CqilNorm        x, (delta,) weight -> RMSNorm(x + delta) * weight; `kind` is a cqil_norm, also below
//   CqilPostNorm    delta, delta_norm, (residual,) (weight) -> residual + RMSNorm(delta) * delta_norm, and where weight
//                   is given (`next`) RMSNorm of it * weight
//   CqilLinear      x, (delta,) weight, (bias,) (norm,) (residual) -> as cqil_linear
//                   a field is 1 where its input is given, and sum where there are two results; `gated` is a cqil_gating.
//                   With packed weights, `weights` (a cqil_weights), `outputs` and `group` are those of
//                   cqil_linear_shape, and weight is an int32 tensor bound to what cqil_pack made
//   CqilAdd         x, (y) -> x + y (terms 2), zeros (terms 0); with `after` zeros that wait for a float32 y
//   CqilScale       x -> x * factor, capped, as cqil_scale
//   CqilGather      table [M, H], indices int32 of N in all -> table[indices] [N, H]
//   CqilHeadSquares qkv -> float32 [N, 2], as cqil_head_squares
//   CqilAttention   qkv, (cos, sin,) (q_norm, k_norm,) (squares,) past int32 [B, E],
//                   slots int32 [B, E], cache -> [N, heads * head_dim], as cqil_attention with B sequences: E is 1,
//                   or in a step with drafts the tokens of each; cache is an int32 tensor bound to a layer's cache.
//                   `unrotated`: without cos and sin; `joint`: with squares

#include <NvInfer.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cqil_trt.h"
#include "errors.h"

namespace {

using namespace nvinfer1;
using cqil_trt::fail;

constexpr char kNamespace[] = CQIL_PLUGIN_NAMESPACE;
constexpr char kVersion[] = CQIL_PLUGIN_VERSION;
bool building = false;

struct FieldDeclaration {
    const char* name;
    PluginFieldType type;
    bool optional;  // it may be left out, and is 0 then
};

template <typename Fields>
struct Declaration;

// For each plugin of CQIL_PLUGINS: its fields as a struct, as in CqilAddFields, and the Declaration of that.
#define INT_MEMBER(name) int32_t name;
#define FLOAT_MEMBER(name) float name;
#define FIELDS(plugin, members) \
    struct plugin##Fields {     \
        members                 \
    };
CQIL_PLUGINS(FIELDS, INT_MEMBER, FLOAT_MEMBER, INT_MEMBER, FLOAT_MEMBER)

#define INT_FIELD(name) {#name, PluginFieldType::kINT32, false},
#define FLOAT_FIELD(name) {#name, PluginFieldType::kFLOAT32, false},
#define OPTIONAL_INT_FIELD(name) {#name, PluginFieldType::kINT32, true},
#define OPTIONAL_FLOAT_FIELD(name) {#name, PluginFieldType::kFLOAT32, true},
#define DECLARATION(plugin, fields)                             \
    template <>                                                 \
    struct Declaration<plugin##Fields> {                        \
        static constexpr char kName[] = #plugin;                \
        static constexpr FieldDeclaration kFields[] = {fields}; \
    };
CQIL_PLUGINS(DECLARATION, INT_FIELD, FLOAT_FIELD, OPTIONAL_INT_FIELD, OPTIONAL_FLOAT_FIELD)

DataType to_tensorrt(int32_t dtype) {
#if NV_TENSORRT_MAJOR >= 10
    if (dtype == CQIL_BFLOAT16) return DataType::kBF16;
#endif
    return dtype == CQIL_FLOAT16 ? DataType::kHALF : DataType::kFLOAT;
}

bool valid_dtype(int32_t dtype) {
#if NV_TENSORRT_MAJOR < 10
    if (dtype == CQIL_BFLOAT16) return false;
#endif
    return dtype >= CQIL_FLOAT32 && dtype <= CQIL_BFLOAT16;
}

bool valid_norm(int32_t kind) { return kind >= CQIL_NORM_ROUNDED && kind <= CQIL_NORM_OFFSET; }

size_t elements(const Dims& dims) {
    size_t count = 1;
    for (int i = 0; i < dims.nbDims; ++i) count *= static_cast<size_t>(dims.d[i]);
    return count;
}

// The dimension of a vector with as many elements.
DimsExprs flat(DimsExprs dims, IExprBuilder& builder) {
    for (int i = 1; i < dims.nbDims; ++i)
        dims.d[0] = builder.operation(DimensionOperation::kPROD, *dims.d[0], *dims.d[i]);
    dims.nbDims = 1;
    return dims;
}

int32_t report(const char* plugin, const char* reason) {
    std::fprintf(stderr, "error: %s: %s\n", plugin, reason);
    return -1;
}

// Base class of the plugins. Derived is named as in CQIL_PLUGINS and provides valid(), inputs(), outputs() and run().
// run() fails through fail(); enqueue() prints the reason. Derived may replace output_dimensions() and supports(): by
// default outputs are shaped like the first input, and all data is of its type. The last kIntegers inputs are int32.
template <typename Derived, typename FieldsT>
class Plugin : public IPluginV2DynamicExt, public Declaration<FieldsT> {
public:
    using Fields = FieldsT;
    static_assert(std::is_trivially_copyable_v<Fields>, "fields are serialised as they are");

    explicit Plugin(const Fields& fields) noexcept : fields_(fields) {}

    char const* getPluginType() const noexcept override { return Derived::kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    int32_t getNbOutputs() const noexcept override { return self().outputs(); }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    size_t getSerializationSize() const noexcept override { return sizeof(Fields); }
    void serialize(void* buffer) const noexcept override { std::memcpy(buffer, &fields_, sizeof(Fields)); }
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(char const* space) noexcept override { namespace_ = space; }
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    IPluginV2DynamicExt* clone() const noexcept override {
        auto* copy = new Derived(fields_);
        copy->setPluginNamespace(namespace_.c_str());
        return copy;
    }

    DataType getOutputDataType(int32_t, DataType const*, int32_t) const noexcept override { return type(); }
    DimsExprs getOutputDimensions(int32_t, DimsExprs const* inputs, int32_t, IExprBuilder& builder) noexcept override {
        return self().output_dimensions(inputs, builder);
    }
    bool supportsFormatCombination(int32_t position, PluginTensorDesc const* io, int32_t inputs,
                                   int32_t) noexcept override {
        if (io[position].format != TensorFormat::kLINEAR) return false;
        if (position < inputs && position >= inputs - self().integers()) return io[position].type == DataType::kINT32;
        return self().supports(position, io, inputs);
    }
    void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                         int32_t) noexcept override {}
    size_t getWorkspaceSize(PluginTensorDesc const* inputs, int32_t, PluginTensorDesc const*,
                            int32_t) const noexcept override {
        return self().scratch_bytes(inputs);
    }
    int32_t enqueue(PluginTensorDesc const* input, PluginTensorDesc const* output, void const* const* in,
                    void* const* out, void* scratch, cudaStream_t stream) noexcept override {
        if (building) return 0;
        return self().run(input, output, in, out, scratch, stream) ? report(Derived::kName, cqil_last_error()) : 0;
    }

protected:
    static constexpr int kIntegers = 1;
    int integers() const { return Derived::kIntegers; }
    size_t scratch_bytes(PluginTensorDesc const*) const { return 0; }
    DimsExprs output_dimensions(DimsExprs const* in, IExprBuilder&) const { return in[0]; }
    bool supports(int32_t position, PluginTensorDesc const* io, int32_t) const { return io[position].type == type(); }
    DataType type() const { return to_tensorrt(fields_.dtype); }
    cqil_dtype dtype() const { return static_cast<cqil_dtype>(fields_.dtype); }
    // Null after fail().
    cqil_workspace* workspace(void const* const* in) const {
        if (self().integers() == 0) {
            cqil_workspace* shared = cqil_workspace_shared();
            if (shared == nullptr) fail("this process shares no workspace (cqil_workspace_share)");
            return shared;
        }
        cqil_workspace* found = cqil_workspace_find(in[self().inputs() - 1]);
        if (found == nullptr) fail("its input `workspace` is not bound to the address of an open workspace");
        return found;
    }

    Fields fields_;

private:
    const Derived& self() const noexcept { return static_cast<const Derived&>(*this); }
    std::string namespace_ = kNamespace;
};

class CqilAllReduce final : public Plugin<CqilAllReduce, CqilAllReduceFields> {
public:
    using Plugin::Plugin;

    static bool valid(const Fields& f) {
        return f.mode >= 0 && f.mode <= 2 && f.eps >= 0 && valid_dtype(f.dtype) && (f.shared == 0 || f.shared == 1);
    }
    int integers() const { return 1 - fields_.shared; }
    int32_t inputs() const { return fields_.mode + 1 + integers(); }
    int32_t outputs() const { return fields_.mode == 2 ? 2 : 1; }
    int run(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* in, void* const* out, void*,
            cudaStream_t stream) const {
        const Dims& dims = input[0].dims;
        const size_t count = elements(dims);
        cqil_workspace* space = workspace(in);
        if (space == nullptr) return -1;
        if (fields_.mode < 2)
            return cqil_all_reduce(space, in[0], fields_.mode ? in[1] : nullptr, out[0], count, dtype(), stream);
        const int hidden = static_cast<int>(dims.d[dims.nbDims - 1]);
        return cqil_all_reduce_residual_norm(space, in[0], in[1], in[2], out[0], out[1],
                                             static_cast<int>(count / hidden), hidden, fields_.eps, dtype(), stream);
    }
};

class CqilBroadcast final : public Plugin<CqilBroadcast, CqilBroadcastFields> {
public:
    using Plugin::Plugin;

    static bool valid(const Fields& f) {
        return f.rank >= 0 && f.rank < CQIL_MAX_RANKS && f.hidden > 0 && valid_dtype(f.dtype) &&
               (f.flat == 0 || f.flat == 1);
    }
    int32_t inputs() const { return 2; }
    int32_t outputs() const { return 1; }
    DimsExprs output_dimensions(DimsExprs const* in, IExprBuilder& builder) const {
        DimsExprs dims = in[0];
        if (fields_.rank == 0) return dims;
        if (fields_.flat) dims = flat(dims, builder);
        dims.d[dims.nbDims++] = builder.constant(fields_.hidden);
        return dims;
    }
    bool supports(int32_t position, PluginTensorDesc const* io, int32_t inputs) const {
        const bool tokens = position < inputs && fields_.rank != 0;
        return io[position].type == (tokens ? DataType::kINT32 : type());
    }
    int run(PluginTensorDesc const*, PluginTensorDesc const* output, void const* const* in, void* const* out, void*,
            cudaStream_t stream) const {
        const size_t count = elements(output[0].dims);
        cqil_workspace* space = workspace(in);
        if (space == nullptr) return -1;
        if (const int rank = cqil_workspace_rank(space); rank != fields_.rank)
            return fail("the engine was built for rank %d, the workspace is that of rank %d", fields_.rank, rank);
        return cqil_broadcast(space, in[0], out[0], count, dtype(), stream);
    }
};

class CqilBypass final : public Plugin<CqilBypass, CqilBypassFields> {
public:
    using Plugin::Plugin;

    static bool valid(const Fields& f) {
        return f.distance >= 1 && f.distance < CQIL_MAX_RANKS && valid_dtype(f.dtype) &&
               (f.shared == 0 || f.shared == 1);
    }
    int integers() const { return 1 - fields_.shared; }
    int32_t inputs() const { return 1 + integers(); }
    int32_t outputs() const { return 1; }
    int run(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* in, void* const* out, void*,
            cudaStream_t stream) const {
        cqil_workspace* space = workspace(in);
        if (space == nullptr) return -1;
        return cqil_bypass(space, in[0], out[0], elements(input[0].dims), fields_.distance, dtype(), stream);
    }
};

class CqilNorm final : public Plugin<CqilNorm, CqilNormFields> {
public:
    static constexpr int kIntegers = 0;
    using Plugin::Plugin;

    static bool valid(const Fields& f) {
        return (f.delta == 0 || f.delta == 1) && f.eps >= 0 && valid_norm(f.kind) && valid_dtype(f.dtype);
    }
    int32_t inputs() const { return 2 + fields_.delta; }
    int32_t outputs() const { return 1; }
    size_t scratch_bytes(PluginTensorDesc const* input) const {
        return fields_.delta ? elements(input[0].dims) * 4 : 0;
    }
    int run(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* in, void* const* out,
            void* scratch, cudaStream_t stream) const {
        const Dims& dims = input[0].dims;
        const int hidden = static_cast<int>(dims.d[dims.nbDims - 1]), rows = static_cast<int>(elements(dims) / hidden);
        return cqil_residual_norm(fields_.delta ? in[1] : nullptr, nullptr, in[0], in[1 + fields_.delta], scratch,
                                  out[0], rows, hidden, fields_.eps, static_cast<cqil_norm>(fields_.kind), dtype(),
                                  stream);
    }
};

class CqilPostNorm final : public Plugin<CqilPostNorm, CqilPostNormFields> {
public:
    static constexpr int kIntegers = 0;
    using Plugin::Plugin;

    static bool valid(const Fields& f) {
        for (int32_t flag : {f.residual, f.next})
            if (flag != 0 && flag != 1) return false;
        return f.eps >= 0 && valid_norm(f.kind) && valid_dtype(f.dtype);
    }
    int32_t inputs() const { return 2 + fields_.residual + fields_.next; }
    int32_t outputs() const { return 1 + fields_.next; }
    int run(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* in, void* const* out, void*,
            cudaStream_t stream) const {
        const Dims& dims = input[0].dims;
        const int hidden = static_cast<int>(dims.d[dims.nbDims - 1]), rows = static_cast<int>(elements(dims) / hidden);
        const void* weight = fields_.next ? in[2 + fields_.residual] : nullptr;
        return cqil_residual_norm(in[0], in[1], fields_.residual ? in[2] : nullptr, weight, out[0],
                                  fields_.next ? out[1] : nullptr, rows, hidden, fields_.eps,
                                  static_cast<cqil_norm>(fields_.kind), dtype(), stream);
    }
};

class CqilLinear final : public Plugin<CqilLinear, CqilLinearFields> {
public:
    static constexpr int kIntegers = 0;
    using Plugin::Plugin;

    static bool valid(const Fields& f) {
        for (int32_t flag : {f.delta, f.bias, f.norm, f.residual, f.sum})
            if (flag != 0 && flag != 1) return false;
        if (f.gated < CQIL_UNGATED || f.gated > CQIL_GEGLU) return false;
        const bool packed = f.weights != CQIL_DENSE, groups = f.group == 32 || f.group == 64 || f.group == 128;
        if (f.weights < CQIL_DENSE || f.weights > CQIL_INT4 || packed != (f.outputs > 0)) return false;
        if (packed && f.dtype == CQIL_FLOAT32) return false;
        if (f.weights == CQIL_INT4 ? !groups : f.group != 0) return false;
        if (f.gated && (f.residual || f.scale != 0)) return false;
        return (f.norm || !f.delta) && (f.residual || !f.sum) && f.eps >= 0 && valid_dtype(f.dtype);
    }
    int32_t inputs() const { return 2 + fields_.delta + fields_.bias + fields_.norm + fields_.residual; }
    int32_t outputs() const { return 1 + fields_.sum; }
    DimsExprs output_dimensions(DimsExprs const* in, IExprBuilder& builder) const {
        DimsExprs dims = in[0];
        if (fields_.weights != CQIL_DENSE) {
            dims.d[1] = builder.constant(fields_.outputs);
            return dims;
        }
        const auto* outputs = in[weight()].d[0];
        dims.d[1] =
            fields_.gated ? builder.operation(DimensionOperation::kFLOOR_DIV, *outputs, *builder.constant(2)) : outputs;
        return dims;
    }
    bool supports(int32_t position, PluginTensorDesc const* io, int32_t) const {
        const bool packed = position == weight() && fields_.weights != CQIL_DENSE;
        return io[position].type == (packed ? DataType::kINT32 : type());
    }
    size_t scratch_bytes(PluginTensorDesc const* input) const {
        cqil_linear_shape s = shape(input);
        const size_t dense = dense_bytes(s);
        if (dense) s.weights = CQIL_DENSE;
        return dense + cqil_linear_scratch_bytes(&s);
    }
    int run(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* in, void* const* out,
            void* scratch, cudaStream_t stream) const {
        cqil_linear_shape s = shape(input);
        int at = 0;
        auto next = [&](int32_t given) { return given ? in[at++] : nullptr; };
        const void *x = next(1), *delta = next(fields_.delta), *weight = next(1), *bias = next(fields_.bias),
                   *norm = next(fields_.norm), *residual = next(fields_.residual);
        if (const size_t dense = dense_bytes(s)) {
            if (cqil_unpack(&s, weight, scratch, stream)) return -1;
            weight = scratch;
            scratch = static_cast<char*>(scratch) + dense;
            s.weights = CQIL_DENSE;
        }
        void* const sum = fields_.sum ? out[1] : nullptr;
        return cqil_linear(&s, x, delta, weight, bias, norm, residual, out[0], sum, scratch, stream);
    }

private:
    int weight() const { return 1 + fields_.delta; }
    cqil_linear_shape shape(PluginTensorDesc const* input) const {
        const auto *x = input[0].dims.d, *w = input[weight()].dims.d;
        const bool packed = fields_.weights != CQIL_DENSE;
        return {static_cast<int>(x[0]), packed ? fields_.outputs : static_cast<int>(w[0]) / (fields_.gated ? 2 : 1),
                static_cast<int>(x[1]), fields_.gated,
                fields_.dtype,          fields_.eps,
                fields_.weights,        fields_.group,
                fields_.scale};
    }
    // Bytes of a dense copy of packed weights, for more rows than the packed product takes; else 0. Never for 16 rows
    // or fewer: their product reads W before what is enqueued before it is done.
    static size_t dense_bytes(const cqil_linear_shape& s) {
        if (s.weights == CQIL_DENSE || s.rows <= std::max(16, cqil_packed_rows())) return 0;
        const size_t bytes = size_t(s.outputs) * (s.gated ? 2 : 1) * s.inputs * 2;
        return (bytes + 255) / 256 * 256;
    }
};

class CqilAdd final : public Plugin<CqilAdd, CqilAddFields> {
public:
    static constexpr int kIntegers = 0;
    using Plugin::Plugin;

    static bool valid(const Fields& f) {
        return (f.terms == 0 || f.terms == 2) && (f.after == 0 || (f.after == 1 && f.terms == 0)) &&
               valid_dtype(f.dtype);
    }
    int32_t inputs() const { return fields_.terms || fields_.after ? 2 : 1; }
    int32_t outputs() const { return 1; }
    bool supports(int32_t position, PluginTensorDesc const* io, int32_t) const {
        return io[position].type == (fields_.after && position == 1 ? DataType::kFLOAT : type());
    }
    int run(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* in, void* const* out, void*,
            cudaStream_t stream) const {
        const size_t count = elements(input[0].dims);
        if (fields_.terms) return cqil_add(in[0], in[1], out[0], count, dtype(), stream);
        CQIL_CUDA(cudaMemsetAsync(out[0], 0, count * (fields_.dtype == CQIL_FLOAT32 ? 4 : 2), stream));
        return 0;
    }
};

class CqilScale final : public Plugin<CqilScale, CqilScaleFields> {
public:
    static constexpr int kIntegers = 0;
    using Plugin::Plugin;

    static bool valid(const Fields& f) { return f.cap >= 0 && valid_dtype(f.dtype); }
    int32_t inputs() const { return 1; }
    int32_t outputs() const { return 1; }
    int run(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* in, void* const* out, void*,
            cudaStream_t stream) const {
        return cqil_scale(in[0], out[0], elements(input[0].dims), fields_.factor, fields_.cap, dtype(), stream);
    }
};

class CqilHeadSquares final : public Plugin<CqilHeadSquares, CqilHeadSquaresFields> {
public:
    static constexpr int kIntegers = 0;
    using Plugin::Plugin;

    static bool valid(const Fields& f) {
        return f.heads >= 0 && f.kv_heads >= 0 && f.head_dim > 0 && f.first_key >= 0 && f.last_key <= f.kv_heads &&
               valid_dtype(f.dtype);
    }
    int32_t inputs() const { return 1; }
    int32_t outputs() const { return 1; }
    DataType getOutputDataType(int32_t, DataType const*, int32_t) const noexcept override { return DataType::kFLOAT; }
    DimsExprs output_dimensions(DimsExprs const* in, IExprBuilder& builder) const {
        DimsExprs dims = in[0];
        dims.d[dims.nbDims - 1] = builder.constant(2);
        return dims;
    }
    bool supports(int32_t position, PluginTensorDesc const* io, int32_t inputs) const {
        return io[position].type == (position < inputs ? type() : DataType::kFLOAT);
    }
    int run(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* in, void* const* out, void*,
            cudaStream_t stream) const {
        const Fields& f = fields_;
        const Dims& dims = input[0].dims;
        const int rows = static_cast<int>(elements(dims) / dims.d[dims.nbDims - 1]);
        return cqil_head_squares(in[0], static_cast<float*>(out[0]), rows, f.heads, f.kv_heads, f.head_dim, f.first_key,
                                 f.last_key, f.query_factor, f.key_factor, dtype(), stream);
    }
};

class CqilGather final : public Plugin<CqilGather, CqilGatherFields> {
public:
    using Plugin::Plugin;

    static bool valid(const Fields& f) { return valid_dtype(f.dtype); }
    int32_t inputs() const { return 2; }
    int32_t outputs() const { return 1; }
    DimsExprs output_dimensions(DimsExprs const* in, IExprBuilder& builder) const {
        DimsExprs dims = in[0];
        dims.d[0] = flat(in[1], builder).d[0];
        return dims;
    }
    int run(PluginTensorDesc const*, PluginTensorDesc const* output, void const* const* in, void* const* out, void*,
            cudaStream_t stream) const {
        const Dims& dims = output[0].dims;
        return cqil_gather_rows(in[0], static_cast<const int32_t*>(in[1]), out[0], static_cast<int>(dims.d[0]),
                                static_cast<int>(dims.d[1]), dtype(), stream);
    }
};

class CqilAttention final : public Plugin<CqilAttention, CqilAttentionFields> {
public:
    static constexpr int kIntegers = 3;
    using Plugin::Plugin;

    static bool valid(const Fields& f) {
        for (int32_t flag : {f.head_norms, f.unrotated, f.joint})
            if (flag != 0 && flag != 1) return false;
        if (f.window < 0 || f.rotary < 0 || f.rotary > f.head_dim || !valid_norm(f.norm)) return false;
        if (f.positions != 0 && f.positions != f.capacity &&
            (f.positions < f.capacity || f.capacity % CQIL_CIRCLE_STEP || f.window < 1 || f.window > f.capacity))
            return false;
        return f.heads > 0 && f.kv_heads > 0 && f.head_dim > 0 && f.capacity > 0 && f.max_batch > 0 && f.group > 0 &&
               f.first >= 0 && f.eps >= 0 && f.scale >= 0 && f.cap >= 0 && (f.head_norms || !f.joint) &&
               (f.cache == CQIL_CACHE_PLAIN || f.cache == CQIL_CACHE_FP8) && f.key_scale > 0 && f.value_scale > 0 &&
               valid_dtype(f.dtype);
    }
    int32_t inputs() const {
        return 1 + 2 * (1 - fields_.unrotated) + 2 * fields_.head_norms + fields_.joint + kIntegers;
    }
    int32_t outputs() const { return 1; }
    DimsExprs output_dimensions(DimsExprs const* in, IExprBuilder& builder) const {
        DimsExprs dims = in[0];
        dims.d[dims.nbDims - 1] = builder.constant(fields_.heads * fields_.head_dim);
        return dims;
    }
    bool supports(int32_t position, PluginTensorDesc const* io, int32_t) const {
        const int32_t norms = 1 + 2 * (1 - fields_.unrotated), squares = norms + 2 * fields_.head_norms;
        const bool table = position >= 1 && position < norms, square = fields_.joint && position == squares;
        return io[position].type == (table || square ? DataType::kFLOAT : type());
    }
    size_t scratch_bytes(PluginTensorDesc const* input) const {
        const cqil_attention_shape s = shape(input);
        return cqil_attention_scratch_bytes(&s);
    }
    int run(PluginTensorDesc const* input, PluginTensorDesc const*, void const* const* in, void* const* out,
            void* scratch, cudaStream_t stream) const {
        const cqil_attention_shape s = shape(input);
        int at = 1;
        auto next = [&](bool given) { return given ? in[at++] : nullptr; };
        const void *cos = next(!fields_.unrotated), *sin = next(!fields_.unrotated), *q_norm = next(fields_.head_norms),
                   *k_norm = next(fields_.head_norms), *squares = next(fields_.joint), *past = next(true),
                   *slots = next(true), *cache = next(true);
        return cqil_attention(&s, in[0], static_cast<const int32_t*>(past), static_cast<const int32_t*>(slots),
                              static_cast<const float*>(cos), static_cast<const float*>(sin), q_norm, k_norm,
                              static_cast<const float*>(squares), const_cast<void*>(cache), out[0], scratch, stream);
    }

private:
    cqil_attention_shape shape(PluginTensorDesc const* input) const {
        // Of each sequence one entry, or, of a step with drafts, as many as tokens.
        const Dims& past = input[inputs() - kIntegers].dims;
        const int batch = std::max(1, static_cast<int>(past.d[0])), drafts = past.d[1] > 1;
        const int length = static_cast<int>(input[0].dims.d[0]) / batch;
        const Fields& f = fields_;
        return {batch,   length,  f.heads, f.kv_heads, f.head_dim,  f.capacity,    f.max_batch,
                f.group, f.first, f.dtype, f.eps,      drafts,      f.window,      f.rotary,
                f.norm,  f.scale, f.cap,   f.cache,    f.key_scale, f.value_scale, f.positions};
    }
};

template <typename P>
class Creator final : public IPluginCreator {
public:
    Creator() {
        for (const FieldDeclaration& field : P::kFields) {
            fields_.emplace_back(field.name, nullptr, field.type, 1);
            required_ += !field.optional;
        }
        collection_.nbFields = static_cast<int32_t>(fields_.size());
        collection_.fields = fields_.data();
    }

    char const* getPluginName() const noexcept override { return P::kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    void setPluginNamespace(char const*) noexcept override {}
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    IPluginV2* createPlugin(char const*, PluginFieldCollection const* given) noexcept override {
        typename P::Fields fields = {};
        static_assert(sizeof(fields) == 4 * std::size(P::kFields), "every field is 4 bytes");
        size_t found = 0;
        for (int32_t i = 0; i < given->nbFields; ++i) {
            const PluginField& field = given->fields[i];
            for (size_t j = 0; j < std::size(P::kFields); ++j) {
                const FieldDeclaration& declared = P::kFields[j];
                if (std::strcmp(field.name, declared.name) == 0 && field.type == declared.type && field.data) {
                    std::memcpy(reinterpret_cast<char*>(&fields) + 4 * j, field.data, 4);
                    found += !declared.optional;
                }
            }
        }
        if (found != required_) {
            report(P::kName, "not every field is given once, with its type");
            return nullptr;
        }
        return create(fields);
    }

    IPluginV2* deserializePlugin(char const*, void const* data, size_t length) noexcept override {
        typename P::Fields fields;
        if (length != sizeof(fields)) {
            report(P::kName, "the engine holds a plugin of another build");
            return nullptr;
        }
        std::memcpy(&fields, data, sizeof(fields));
        return create(fields);
    }

private:
    IPluginV2* create(const typename P::Fields& fields) {
        if (!P::valid(fields)) {
            report(P::kName, "a field is out of range");
            return nullptr;
        }
        return new P(fields);
    }

    std::vector<PluginField> fields_;
    size_t required_ = 0;
    PluginFieldCollection collection_ = {};
};

#define NO_FIELD(name)
#define CREATOR(plugin, fields) Creator<plugin> plugin##_creator;
#define CREATOR_ADDRESS(plugin, fields) &plugin##_creator,
CQIL_PLUGINS(CREATOR, NO_FIELD, NO_FIELD, NO_FIELD, NO_FIELD)
IPluginCreator* const creators[] = {CQIL_PLUGINS(CREATOR_ADDRESS, NO_FIELD, NO_FIELD, NO_FIELD, NO_FIELD)};

}  // namespace

extern "C" {

int cqil_register_plugins(void) {
    // Looked up, not linked: without TensorRT the library still loads, for its C interface.
    auto* registry = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(RTLD_DEFAULT, "getPluginRegistry"));
    if (registry == nullptr || registry() == nullptr) return -1;
    // The interface's virtual functions are not the same in every major version. 8503 is 8.5.3, 101400 is 10.14.0;
    // TensorRT-RTX 1.x counts its own versions and has the interface of 11.
    auto* version_of = reinterpret_cast<int32_t (*)()>(dlsym(RTLD_DEFAULT, "getInferLibVersion"));
    const int32_t version = version_of ? version_of() : 0;
    const int32_t major = version < 10000 ? version / 1000 : version / 10000;
    if (major != NV_TENSORRT_MAJOR && !(major == 1 && NV_TENSORRT_MAJOR == 11)) {
        std::fprintf(stderr, "error: this plugin library was built for TensorRT %d, the process has version %d\n",
                     NV_TENSORRT_MAJOR, major);
        return -1;
    }
    static const bool registered = [&] {
        bool all = true;
        for (IPluginCreator* creator : creators) all = registry()->registerCreator(*creator, kNamespace) && all;
        return all;
    }();
    return registered ? 0 : -1;
}

void cqil_set_building(int value) { building = value != 0; }

// What IPluginRegistry::loadLibrary looks for (trtexec --dynamicPlugins).
#if NV_TENSORRT_MAJOR >= 10
IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static const auto interfaces = [] {
        std::array<IPluginCreatorInterface*, std::size(creators)> all;
        std::copy(std::begin(creators), std::end(creators), all.begin());
        return all;
    }();
    count = static_cast<int32_t>(interfaces.size());
    return interfaces.data();
}
#endif

}  // extern "C"

namespace {
[[maybe_unused]] const int registered_at_load = cqil_register_plugins();
}
