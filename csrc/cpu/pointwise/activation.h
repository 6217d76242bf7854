// silu(gate) * up in memory; see activation.cpp.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace at {
class Tensor;
}

namespace depthprune {

// The op: gate_up [T, 2F] -> [T, F].
at::Tensor silu_mul(const at::Tensor& gate_up);

// `size` elements of dtype each.
void silu_mul_row(const void* gate, const void* up, void* out, int64_t size, Dtype dtype);

// The same in bfloat16 where the level is there, with the silu of the gated products (simd/silu16.inc).
void silu_mul_avx512(const void* gate, const void* up, void* out, int64_t size);

}  // namespace depthprune
