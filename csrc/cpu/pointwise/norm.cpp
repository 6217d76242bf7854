// RMSNorm, alone and fused with the residual add:
//   out_tc = x_tc * rsqrt(mean_c(x_tc^2) + eps) * w_c
// in float32, rounded once. Two sweeps over a row; the second finds it in L1. Contract: depthprune_runtime/ops/norm.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/dtype_of.h"
#include "common/norm_checks.h"
#include "common/row_strides_of.h"
#include "cpu/pointwise/norm.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

namespace depthprune {
namespace {

// Elements that are worth a second thread, as in torch's own pointwise ops; below, parallel_for runs inline.
constexpr int64_t kGrain = 32768;

// Squares are summed in blocks of this many: on 4-lane vectors one running sum over 16384 float32 channels, an outlier
// among them, erred by more than twice what plain torch errs.
constexpr int64_t kBlock = 512;

// Sum of squares of up to kBlock values. The simd reduction allows partial sums; without it the loop would wait for
// one addition after the other.
template <typename X>
DEPTHPRUNE_INLINE float square_sum(const typename X::storage* x, int64_t size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < size; ++c) {
    const float value = X::widen(x[c]);
    sum += value * value;
  }
  return sum;
}

// residual += x, and the sum of squares of the result as stored.
template <typename X>
DEPTHPRUNE_INLINE float add_square_sum(const typename X::storage* x, typename X::storage* residual, int64_t size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < size; ++c) {
    const auto rounded = X::narrow(X::widen(residual[c]) + X::widen(x[c]));
    residual[c] = rounded;
    const float value = X::widen(rounded);
    sum += value * value;
  }
  return sum;
}

template <typename X, typename W, bool add>
DEPTHPRUNE_INLINE void norm_rows(const Norm& norm, int64_t begin, int64_t end) {
  using T = typename X::storage;
  const auto* weight = static_cast<const typename W::storage*>(norm.weight);  // [C]
  const int64_t hidden_size = norm.hidden_size;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(norm.x) + norm.x_rows.offset(row);  // [C]
    T* out = static_cast<T*>(norm.out) + norm.out_rows.offset(row);        // [C]
    T* residual = nullptr;                                                 // [C]
    if constexpr (add) residual = static_cast<T*>(norm.residual) + norm.residual_rows.offset(row);
    float sum = 0.0f;
    for (int64_t c = 0; c < hidden_size; c += kBlock) {
      const int64_t size = std::min(kBlock, hidden_size - c);
      if constexpr (add) {
        sum += add_square_sum<X>(x + c, residual + c, size);
      } else {
        sum += square_sum<X>(x + c, size);
      }
    }
    const T* normed = add ? residual : x;  // [C]
    const float rstd = 1.0f / std::sqrt(sum / static_cast<float>(hidden_size) + norm.eps);
#pragma omp simd
    for (int64_t c = 0; c < hidden_size; ++c) {
      out[c] = X::narrow(X::widen(normed[c]) * rstd * W::widen(weight[c]));
    }
  }
}

template <typename X, bool add>
DEPTHPRUNE_INLINE void norm_rows_of(const Norm& norm, int64_t begin, int64_t end) {
  if (norm.weight_dtype == norm.dtype) {
    norm_rows<X, X, add>(norm, begin, end);
  } else {
    norm_rows<X, Float32, add>(norm, begin, end);
  }
}

template <bool add>
DEPTHPRUNE_INLINE void norm_any(const Norm& norm, int64_t begin, int64_t end) {
  if (norm.dtype == Dtype::bfloat16) {
    norm_rows_of<BFloat16, add>(norm, begin, end);
  } else if (norm.dtype == Dtype::float16) {
    norm_rows_of<Float16, add>(norm, begin, end);
  } else {
    norm_rows<Float32, Float32, add>(norm, begin, end);
  }
}

}  // namespace

// The dtype switch is inside the clones: a template cannot be cloned.
DEPTHPRUNE_CLONES void norm_plain(const Norm& norm, int64_t begin, int64_t end) { norm_any<false>(norm, begin, end); }
DEPTHPRUNE_CLONES void norm_add(const Norm& norm, int64_t begin, int64_t end) { norm_any<true>(norm, begin, end); }

namespace {

// `residual` may be undefined. The result has the strides that the reference gives it.
at::Tensor run(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  at::Tensor result = at::empty_like(residual.defined() ? residual : input);
  if (input.numel() == 0) return result;
  const at::Tensor x = with_row_strides(input);
  const at::Tensor gain = weight.contiguous();
  const at::Tensor sum = residual.defined() ? with_row_strides(residual) : residual;
  const at::Tensor out = row_strides_of(result) ? result : at::empty_like(x, at::MemoryFormat::Contiguous);
  Norm norm{};
  norm.x = x.const_data_ptr();
  norm.x_rows = *row_strides_of(x);
  norm.weight = gain.const_data_ptr();
  norm.out = out.mutable_data_ptr();
  norm.out_rows = *row_strides_of(out);
  norm.hidden_size = x.size(-1);
  norm.eps = static_cast<float>(eps);
  norm.dtype = dtype_of(x.scalar_type());
  norm.weight_dtype = dtype_of(weight.scalar_type());
  if (residual.defined()) {
    norm.residual = sum.mutable_data_ptr();
    norm.residual_rows = *row_strides_of(sum);
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / norm.hidden_size);
  at::parallel_for(0, x.numel() / norm.hidden_size, grain, [&](int64_t begin, int64_t end) {
    norm.residual == nullptr ? norm_plain(norm, begin, end) : norm_add(norm, begin, end);
  });
  if (!sum.is_same(residual)) residual.copy_(sum);
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
  const at::Tensor gain = weight.contiguous();
  const at::Tensor dense = x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous();
  const int64_t bytes = x.element_size();
  Norm norm{};
  norm.hidden_size = x.size(2);
  norm.x_rows.outer_stride = norm.out_rows.outer_stride = dense.stride(0);
  norm.eps = static_cast<float>(eps);
  norm.dtype = dtype_of(x.scalar_type());
  norm.weight_dtype = dtype_of(weight.scalar_type());
  for (int64_t h = 0; h < x.size(1); ++h) {  // a gain each
    norm.out = static_cast<char*>(dense.mutable_data_ptr()) + h * dense.stride(1) * bytes;
    norm.x = norm.out;
    norm.weight = static_cast<const char*>(gain.const_data_ptr()) + h * gain.stride(0) * gain.element_size();
    norm_plain(norm, 0, x.size(0));
  }
  if (!dense.is_same(x)) x.copy_(dense);
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) {
  m.impl("head_rms_norm", &head_rms_norm);
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
}

}  // namespace depthprune
