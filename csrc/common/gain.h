// What the norms of every device ask of x and of their gain.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/check.h"
#include "common/dtype_of.h"

namespace depthprune {

inline void check_gain(const char* op, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef shape) {
  DEPTHPRUNE_CHECK(is_known(x.scalar_type()), op, "x", "dtype bfloat16, float16 or float32", x.scalar_type());
  DEPTHPRUNE_CHECK(weight.sizes() == shape, op, "weight", c10::str("shape ", shape), weight.sizes());
  DEPTHPRUNE_CHECK(
      weight.scalar_type() == x.scalar_type() || weight.scalar_type() == at::kFloat, op, "weight",
      c10::str("dtype ", x.scalar_type(), " (that of x) or Float"), weight.scalar_type());
}

}  // namespace depthprune
