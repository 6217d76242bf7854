// The ops over dense projections, on tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace depthprune {

// ValueError unless x [T, K], weight [N, K] and bias [N] fit together.
void check_linear(const char* op, const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// linear, or gated_linear, by panels/; nothing where that has no kernel or better ones exist.
std::optional<at::Tensor> many_tokens(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool gated);

}  // namespace depthprune
