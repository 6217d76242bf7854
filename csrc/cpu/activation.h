// silu(gate) * up in memory; see activation.cpp.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace depthprune {

// `size` elements of dtype each.
void silu_mul_row(const void* gate, const void* up, void* out, int64_t size, Dtype dtype);

// The same in bfloat16 where the level is there, with the silu of the gated products (silu16.h).
void silu_mul_avx512(const void* gate, const void* up, void* out, int64_t size);

}  // namespace depthprune
