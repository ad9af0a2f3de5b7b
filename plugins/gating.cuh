// The gated MLP's activation, for every kernel that computes it.
#pragma once

#include <type_traits>

#include "cqil_trt.h"

namespace cqil_trt {

// silu(gate) * up or gelu(gate) * up, with silu(x) = x / (1 + exp(-x)). GELU in its form with tanh (arXiv 1606.08415),
// x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), is x / (1 + exp(-2 u)). The arguments are already
// rounded to T, so a row's result does not depend on which kernel computes it. The fast form's relative error is far
// below the rounding of half types (SiLU: 2e-5); results that it flushes to zero are below 2e-36.
template <typename T>
__device__ inline T gated(T gate, T up, int gating) {
    const float x = float(gate);
    float y = x;
    if (gating == CQIL_GEGLU) y = 1.5957691216057308f * fmaf(0.044715f * x * x, x, x);
    if constexpr (std::is_same_v<T, float>)
        return x / (1 + expf(-y)) * up;
    else
        return T(__fdividef(x, 1 + __expf(-y)) * float(up));
}

}  // namespace cqil_trt
