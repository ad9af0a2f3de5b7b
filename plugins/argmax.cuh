// The order in which greedy decoding prefers tokens, within a rank and between ranks.
#pragma once

#include <cstdint>

namespace cqil_trt {

// The larger value, the smaller index among equals; NaN counts as largest.
__device__ inline bool better(float value, int32_t index, float best, int32_t best_index) {
    if (isnan(value) || isnan(best)) return isnan(value) && (!isnan(best) || index < best_index);
    return value > best || (value == best && index < best_index);
}

}  // namespace cqil_trt
