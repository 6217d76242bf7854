// gated_linear of many tokens in one matrix product; fewer go through linear and silu_mul. Contract:
// depthprune_runtime/ops/gated_linear.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

#include "common/check.h"
#include "cpu/pointwise/activation.h"
#include "cpu/rows/op.h"

namespace depthprune {
namespace {

at::Tensor gated_linear(
    const at::Tensor& x,                      // [T, K]
    const at::Tensor& weight,                 // [2F, K]
    const std::optional<at::Tensor>& bias) {  // [2F] -> [T, F]
  constexpr const char* op = "gated_linear";
  check_linear(op, x, weight, bias);
  DEPTHPRUNE_CHECK(weight.size(0) % 2 == 0, op, "weight", "shape [2F, K]", weight.sizes());
  if (std::optional<at::Tensor> out = many_tokens(x, weight, bias, true)) return *out;
  return silu_mul(linear(x, weight, bias));
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) { m.impl("gated_linear", &gated_linear); }

}  // namespace depthprune
