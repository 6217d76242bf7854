// silu(gate) * up in memory; see activation.cpp.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace depthprune {

// `size` elements of dtype each.
void silu_mul_row(const void* gate, const void* up, void* out, int64_t size, Dtype dtype);

}  // namespace depthprune
