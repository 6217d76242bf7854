// What the norms of every device ask of their tensors. All lie on the device of x, which is that of the kernel.
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
  DEPTHPRUNE_CHECK(
      weight.device() == x.device(), op, "weight", c10::str("device ", x.device(), " (that of x)"), weight.device());
}

// x [..., C], weight [C]
inline void check_norm(const char* op, const at::Tensor& x, const at::Tensor& weight) {
  DEPTHPRUNE_CHECK(x.dim() >= 1, op, "x", "at least one dimension", x.sizes());
  check_gain(op, x, weight, x.sizes().slice(x.dim() - 1));
}

// x and residual [T, C], weight [C]
inline void check_add_norm(const char* op, const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight) {
  check_norm(op, x, weight);
  DEPTHPRUNE_CHECK(
      residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type() && residual.device() == x.device(), op,
      "residual", c10::str("shape ", x.sizes(), ", dtype ", x.scalar_type(), ", device ", x.device()),
      c10::str(residual.sizes(), " ", residual.scalar_type(), " ", residual.device()));
}

// x [T, H, D], weight [H, D]
inline void check_head_norm(const char* op, const at::Tensor& x, const at::Tensor& weight) {
  DEPTHPRUNE_CHECK(x.dim() == 3, op, "x", "shape [T, H, D]", x.sizes());
  check_gain(op, x, weight, x.sizes().slice(1));
}

}  // namespace depthprune
