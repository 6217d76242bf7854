// The ops over dense projections, on tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/gemm.h"

namespace depthprune {

// ValueError unless x [T, K], weight [N, K] and bias [N] fit together.
void check_linear(
    const char* op, const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// The product of x [T, K] in bfloat16, with dense rows; bias: contiguous, or undefined; out: dense.
Gemm gemm_job(const at::Tensor& x, const at::Tensor& bias, at::Tensor& out, bool gated);

at::Tensor silu_mul(const at::Tensor& gate_up);

// linear, or gated_linear, by gemm.h; nothing where that has no kernel or better ones exist.
std::optional<at::Tensor> many_tokens(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool gated);

}  // namespace depthprune
