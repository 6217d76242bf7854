// silu(gate) * up in memory; see activation.cpp.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace depthprune {

// `size` elements of dtype each.
void silu_mul_row(const void* gate, const void* up, void* out, int64_t size, Dtype dtype);

// The same in bfloat16 where the level is there, half the instructions of what the compiler makes of the loop.
void silu_mul_avx512(const void* gate, const void* up, void* out, int64_t size);

}  // namespace depthprune
