// From tensors to products by panels.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/panels/panels.h"

namespace depthprune {

// The product of x [T, K] in bfloat16, with dense rows; bias: contiguous, or undefined; out: dense.
Gemm gemm_job(const at::Tensor& x, const at::Tensor& bias, at::Tensor& out, bool gated);

}  // namespace depthprune
