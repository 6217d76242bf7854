// The gated activation of the FFN in one pass, silu computed in float32 and rounded to the dtype before the product,
// as torch rounds it: out_tf = silu(gate_tf) * up_tf. Contract: depthprune_runtime/ops/activation.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "check.h"
#include "cpu/exp.h"
#include "cpu/simd.h"

namespace depthprune {
namespace {

constexpr int64_t kGrain = 8192;  // elements that are worth a second thread

struct Gated {
  const void* gate_up;  // [T, 2F]
  void* out;            // [T, F]
  int64_t stride;       // of a row of gate_up
  int64_t size;         // F
  at::ScalarType dtype;
};

template <typename X>
DEPTHPRUNE_INLINE void silu_mul_rows(const Gated& gated, int64_t begin, int64_t end) {
  using T = typename X::storage;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(gated.gate_up) + row * gated.stride;  // [F]
    const T* up = gate + gated.size;                                            // [F]
    T* out = static_cast<T*>(gated.out) + row * gated.size;                     // [F]
#pragma omp simd
    for (int64_t f = 0; f < gated.size; ++f) {
      const float x = X::widen(gate[f]);
      const float silu = X::widen(X::narrow(x / (1.0f + fast_exp(-x))));
      out[f] = X::narrow(silu * X::widen(up[f]));
    }
  }
}

// The dtype switch is inside the clones: a template cannot be cloned.
DEPTHPRUNE_CLONES void silu_mul_any(const Gated& gated, int64_t begin, int64_t end) {
  if (gated.dtype == at::kBFloat16) {
    silu_mul_rows<BFloat16>(gated, begin, end);
  } else if (gated.dtype == at::kHalf) {
    silu_mul_rows<Float16>(gated, begin, end);
  } else {
    silu_mul_rows<Float32>(gated, begin, end);
  }
}

at::Tensor silu_mul(const at::Tensor& gate_up) {  // [T, 2F] -> [T, F]
  const char* op = "silu_mul";
  DEPTHPRUNE_CHECK(
      gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, op, "gate_up", "shape [T, 2F]", gate_up.sizes());
  DEPTHPRUNE_CHECK(
      gate_up.scalar_type() == at::kBFloat16 || gate_up.scalar_type() == at::kHalf ||
          gate_up.scalar_type() == at::kFloat,
      op, "gate_up", "dtype bfloat16, float16 or float32", gate_up.scalar_type());
  const at::Tensor x = gate_up.stride(1) == 1 ? gate_up : gate_up.contiguous();
  const int64_t size = x.size(1) / 2;
  at::Tensor out = at::empty({x.size(0), size}, x.options());
  if (out.numel() == 0) return out;
  const Gated gated{x.const_data_ptr(), out.mutable_data_ptr(), x.stride(0), size, x.scalar_type()};
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    silu_mul_any(gated, begin, end);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) { m.impl("silu_mul", &silu_mul); }

}  // namespace depthprune
