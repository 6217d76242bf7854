// From tensors to the norms of norm.cu. Contract: depthprune_runtime/ops/norm.py.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "common/dtype_of.h"
#include "common/norm_checks.h"
#include "common/row_strides_of.h"
#include "cuda/norm.h"

namespace depthprune::cuda {
namespace {

// `residual` may be undefined. The result has the strides that the reference gives it.
at::Tensor run(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  const c10::DeviceGuard guard(input.device());
  at::Tensor result = at::empty_like(residual.defined() ? residual : input);
  if (input.numel() == 0) return result;
  const at::Tensor x = with_row_strides(input);
  const at::Tensor gain = weight.contiguous();
  const at::Tensor sum = residual.defined() ? with_row_strides(residual) : residual;
  const at::Tensor out = row_strides_of(result) ? result : at::empty_like(x, at::MemoryFormat::Contiguous);
  Norm arguments{};
  arguments.x = x.const_data_ptr();
  arguments.x_rows = *row_strides_of(x);
  arguments.weight = gain.const_data_ptr();
  arguments.out = out.mutable_data_ptr();
  arguments.out_rows = *row_strides_of(out);
  arguments.hidden_size = x.size(-1);
  arguments.num_rows = x.numel() / x.size(-1);
  arguments.weight_rows = 1;
  arguments.eps = static_cast<float>(eps);
  arguments.dtype = dtype_of(x.scalar_type());
  arguments.weight_dtype = dtype_of(weight.scalar_type());
  if (residual.defined()) {
    arguments.residual = sum.mutable_data_ptr();
    arguments.residual_rows = *row_strides_of(sum);
  }
  norm(arguments, c10::cuda::getCurrentCUDAStream(x.get_device()).stream());
  if (residual.defined() && !sum.is_same(residual)) residual.copy_(sum);
  if (!out.is_same(result)) result.copy_(out);
  return result;
}

at::Tensor rms_norm(
    const at::Tensor& x,       // [..., C]
    const at::Tensor& weight,  // [C]
    double eps) {              // -> [..., C]
  check_norm("rms_norm", x, weight);
  return run(x, {}, weight, eps);
}

at::Tensor add_rms_norm(
    const at::Tensor& x,       // [T, C]
    at::Tensor& residual,      // [T, C], updated in place
    const at::Tensor& weight,  // [C]
    double eps) {              // -> [T, C]
  check_add_norm("add_rms_norm", x, residual, weight);
  return run(x, residual, weight, eps);
}

void head_rms_norm(
    at::Tensor& x,             // [T, H, D], in place
    const at::Tensor& weight,  // [H, D]
    double eps) {
  check_head_norm("head_rms_norm", x, weight);
  if (x.numel() == 0) return;
  const c10::DeviceGuard guard(x.device());
  const at::Tensor gain = weight.contiguous();
  const at::Tensor dense = x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous();
  Norm arguments{};
  arguments.out = dense.mutable_data_ptr();
  arguments.x = arguments.out;
  arguments.x_rows = arguments.out_rows = RowStrides{x.size(1), dense.stride(0), dense.stride(1)};
  arguments.weight = gain.const_data_ptr();
  arguments.hidden_size = x.size(2);
  arguments.num_rows = x.size(0) * x.size(1);
  arguments.weight_rows = x.size(1);
  arguments.eps = static_cast<float>(eps);
  arguments.dtype = dtype_of(x.scalar_type());
  arguments.weight_dtype = dtype_of(weight.scalar_type());
  norm(arguments, c10::cuda::getCurrentCUDAStream(x.get_device()).stream());
  if (!dense.is_same(x)) x.copy_(dense);
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CUDA, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("head_rms_norm", &head_rms_norm);
}

}  // namespace depthprune::cuda
