// Runs TensorRT plugins into failures and prints what each call says on standard error: "== NAME STATUS" and its lines.
//
// Usage: plugin_failures LIBRARY. Needs the headers of TensorRT 10 or 11, and no TensorRT: the library hands out
// creators. On a machine without a GPU the failures that need one are left out.
#include <NvInfer.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cqil_trt.h"

using namespace nvinfer1;

namespace {

void* library = nullptr;

template <typename F>
F* symbol(const char* name) {
    void* found = dlsym(library, name);
    if (found == nullptr) {
        std::fprintf(stderr, "no %s\n", name);
        std::exit(2);
    }
    return reinterpret_cast<F*>(found);
}

IPluginV2DynamicExt* make(const std::string& name, const std::vector<std::pair<const char*, int32_t>>& values) {
    int32_t count = 0;
    auto* const* creators = symbol<IPluginCreatorInterface* const*(int32_t&)>("getCreators")(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* creator = static_cast<IPluginCreator*>(creators[i]);
        if (name != creator->getPluginName()) continue;
        std::vector<PluginField> fields;
        for (const auto& [field, value] : values) fields.emplace_back(field, &value, PluginFieldType::kINT32, 1);
        const PluginFieldCollection given = {static_cast<int32_t>(fields.size()), fields.data()};
        return static_cast<IPluginV2DynamicExt*>(creator->createPlugin("", &given));
    }
    std::exit(2);
}

PluginTensorDesc tensor(DataType type, int32_t rows, int32_t width) {
    PluginTensorDesc desc = {};
    desc.dims.nbDims = 3;
    desc.dims.d[0] = 1;
    desc.dims.d[1] = rows;
    desc.dims.d[2] = width;
    desc.type = type;
    return desc;
}

void enqueue(const char* what, IPluginV2DynamicExt* plugin, void* in, void* workspace, void* out) {
    const PluginTensorDesc inputs[] = {tensor(DataType::kFLOAT, 1, 8), tensor(DataType::kINT32, 1, 1)};
    const PluginTensorDesc outputs[] = {tensor(DataType::kFLOAT, 1, 8)};
    const void* given[] = {in, workspace};
    void* results[] = {out};
    std::fprintf(stderr, "== %s\n", what);
    const int32_t status = plugin->enqueue(inputs, outputs, given, results, nullptr, nullptr);
    std::fprintf(stderr, "status %d\n", status);
}

}  // namespace

int main(int, char** arguments) {
    library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    // An older error of this thread, which no later failure may repeat.
    symbol<decltype(cqil_residual_norm)>("cqil_residual_norm")(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, -7,
                                                               1, 0.0f, CQIL_NORM_ROUNDED, CQIL_FLOAT32, nullptr);
    auto* add = make("CqilAdd", {{"terms", 0}, {"dtype", 0}});
    auto* broadcast = make("CqilBroadcast", {{"rank", 0}, {"hidden", 8}, {"dtype", 0}});
    auto* other = make("CqilBroadcast", {{"rank", 1}, {"hidden", 8}, {"dtype", 0}});
    auto* bypass = make("CqilBypass", {{"distance", 1}, {"dtype", 0}});
    auto* shared = make("CqilBypass", {{"distance", 1}, {"dtype", 0}, {"shared", 1}});
    static char host[64];
    auto* nowhere = reinterpret_cast<void*>(16);  // no memory of a GPU, nor of the host
    enqueue("memset", add, nowhere, nullptr, nowhere);
    enqueue("unbound broadcast", broadcast, host, nullptr, host);
    enqueue("unbound bypass", bypass, host, nullptr, host);
    enqueue("unshared bypass", shared, host, nullptr, host);

    cqil_workspace* workspace = nullptr;
    if (symbol<decltype(cqil_workspace_create)>("cqil_workspace_create")(0, 1, 0, 0, 1.0, &workspace)) {
        std::fprintf(stderr, "== no GPU\n");
        return 0;
    }
    void* address = symbol<decltype(cqil_workspace_address)>("cqil_workspace_address")(workspace);
    enqueue("wrong rank", other, address, address, address);
    enqueue("distance", bypass, address, address, address);
    return 0;
}
