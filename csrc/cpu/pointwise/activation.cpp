// The gated activation of the FFN in one pass, silu computed in float32 and rounded to the dtype before the product,
// as torch rounds it: out_tf = silu(gate_tf) * up_tf. Contract: depthprune_runtime/ops/activation.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "common/dtype_of.h"
#include "cpu/pointwise/activation.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/formats.h"
#include "cpu/simd/level.h"

namespace depthprune {
namespace {

constexpr int64_t kGrain = 8192;  // elements that are worth a second thread

template <typename X>
DEPTHPRUNE_INLINE void silu_mul_as(const void* gates, const void* ups, void* outs, int64_t size) {
  using T = typename X::storage;
  const T* gate = static_cast<const T*>(gates);
  const T* up = static_cast<const T*>(ups);
  T* out = static_cast<T*>(outs);
#pragma omp simd
  for (int64_t f = 0; f < size; ++f) {
    const float x = X::widen(gate[f]);
    const float silu = X::widen(X::narrow(x / (1.0f + fast_exp(-x))));
    out[f] = X::narrow(silu * X::widen(up[f]));
  }
}

// The dtype switch is inside the clones: a template cannot be cloned.
DEPTHPRUNE_CLONES void silu_mul_any(const void* gate, const void* up, void* out, int64_t size, Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return silu_mul_as<BFloat16>(gate, up, out, size);
    case Dtype::float16: return silu_mul_as<Float16>(gate, up, out, size);
    default: return silu_mul_as<Float32>(gate, up, out, size);
  }
}

}  // namespace

void silu_mul_row(const void* gate, const void* up, void* out, int64_t size, Dtype dtype) {
  if (dtype == Dtype::bfloat16 && level() >= Level::avx512) return silu_mul_avx512(gate, up, out, size);
  silu_mul_any(gate, up, out, size, dtype);
}

at::Tensor silu_mul(const at::Tensor& gate_up) {  // [T, 2F] -> [T, F]
  const char* op = "silu_mul";
  DEPTHPRUNE_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, op, "gate_up", "shape [T, 2F]", gate_up.sizes());
  DEPTHPRUNE_CHECK(
      is_known(gate_up.scalar_type()), op, "gate_up", "dtype bfloat16, float16 or float32", gate_up.scalar_type());
  const at::Tensor x = gate_up.stride(1) == 1 ? gate_up : gate_up.contiguous();
  const int64_t size = x.size(1) / 2;
  at::Tensor out = at::empty({x.size(0), size}, x.options());
  if (out.numel() == 0) return out;
  const Dtype dtype = dtype_of(x.scalar_type());
  const auto* gate = static_cast<const char*>(x.const_data_ptr());  // [T, 2F]
  auto* to = static_cast<char*>(out.mutable_data_ptr());            // [T, F]
  const int64_t bytes = size * size_of(dtype);
  const int64_t stride = x.stride(0) * size_of(dtype);
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      silu_mul_row(gate + t * stride, gate + t * stride + bytes, to + t * bytes, size, dtype);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(depthprune, CPU, m) { m.impl("silu_mul", &silu_mul); }

}  // namespace depthprune
