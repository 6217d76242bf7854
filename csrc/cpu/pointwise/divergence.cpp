// How far two distributions over the vocabulary are apart, by their logits. Contract: ops/divergence.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/dtype_of.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/formats.h"

namespace depthprune {
namespace {

constexpr int64_t kBlock = 1024;  // values summed in float before they join a double

// log(1 + t) for t in [0, 1]: 2 atanh(z), z = t / (2 + t) <= 1/3.
DEPTHPRUNE_INLINE float log1p_of_unit(float t) {
  const float z = t / (2.0f + t);
  const float s = z * z;
  float sum = 1.0f / 15;
  sum = sum * s + 1.0f / 13;
  sum = sum * s + 1.0f / 11;
  sum = sum * s + 1.0f / 9;
  sum = sum * s + 1.0f / 7;
  sum = sum * s + 1.0f / 5;
  sum = sum * s + 1.0f / 3;
  sum = sum * s + 1.0f;
  return 2.0f * z * sum;
}

// log cosh(h) for h >= 0. Near 0 the terms of h + log1p(e^-2h) - log 2 would cancel; there its Taylor series.
DEPTHPRUNE_INLINE float log_cosh(float h) {
  const float s = h * h;
  float series = 31.0f / 14175;
  series = series * s - 17.0f / 2520;
  series = series * s + 1.0f / 45;
  series = series * s - 1.0f / 12;
  series = series * s + 0.5f;
  series = series * s;
  const float exact = h + log1p_of_unit(fast_exp(-2.0f * h)) - 0x1.62e43p-1f;
  return std::bit_cast<float>(select(h < 0.35f, std::bit_cast<uint32_t>(series), std::bit_cast<uint32_t>(exact)));
}

template <typename X>
DEPTHPRUNE_INLINE float log_sum_exp(const typename X::storage* logits, int64_t size) {
  float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < size; ++i) {
    const float value = X::widen(logits[i]);
    most = value > most ? value : most;
  }
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += fast_exp(X::widen(logits[i]) - most);
    total += sum;
  }
  return most + static_cast<float>(std::log(total));
}

template <typename X>
DEPTHPRUNE_INLINE float js_reverse_as(const void* dense_row, const void* pruned_row, int64_t size) {
  const auto* dense = static_cast<const typename X::storage*>(dense_row);
  const auto* pruned = static_cast<const typename X::storage*>(pruned_row);
  const float dense_scale = log_sum_exp<X>(dense, size);
  const float pruned_scale = log_sum_exp<X>(pruned, size);
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) {
      const float p = X::widen(dense[i]) - dense_scale;
      const float q = X::widen(pruned[i]) - pruned_scale;
      sum += (fast_exp(p) + fast_exp(q)) * log_cosh(0.5f * std::fabs(p - q));
    }
    total += sum;
  }
  return static_cast<float>(0.5 * total);
}

// The dtype switch is inside the clones: a template cannot be cloned.
DEPTHPRUNE_CLONES float js_reverse_row(const void* dense, const void* pruned, int64_t size, Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return js_reverse_as<BFloat16>(dense, pruned, size);
    case Dtype::float16: return js_reverse_as<Float16>(dense, pruned, size);
    default: return js_reverse_as<Float32>(dense, pruned, size);
  }
}

at::Tensor js_reverse(
    const at::Tensor& dense,     // [R, V]
    const at::Tensor& pruned) {  // [R, V]
  constexpr const char* op = "js_reverse";
  DEPTHPRUNE_CHECK(dense.dim() == 2, op, "dense", "shape [R, V]", dense.sizes());
  DEPTHPRUNE_CHECK(
      is_known(dense.scalar_type()), op, "dense", "dtype bfloat16, float16 or float32", dense.scalar_type());
  DEPTHPRUNE_CHECK(
      pruned.sizes() == dense.sizes() && pruned.scalar_type() == dense.scalar_type() && pruned.is_cpu(), op, "pruned",
      c10::str("shape ", dense.sizes(), " in ", dense.scalar_type(), " (that of dense)"),
      c10::str(pruned.sizes(), " in ", pruned.scalar_type()));
  const at::Tensor x = dense.contiguous();
  const at::Tensor y = pruned.contiguous();
  at::Tensor out = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  const Dtype dtype = dtype_of(x.scalar_type());
  const int64_t stride = x.size(1) * size_of(dtype);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  const auto* to = static_cast<const char*>(y.const_data_ptr());
  auto* found = out.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      found[r] = js_reverse_row(from + r * stride, to + r * stride, x.size(1), dtype);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) { m.impl("js_reverse", &js_reverse); }

}  // namespace depthprune
