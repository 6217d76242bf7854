// Rotary position embedding in place, one pass over q and k:  a' = a cos - b sin,  b' = b cos + a sin
// in float32 with every product rounded, as plain torch computes it: the results are equal bit for bit.
// Contract: depthprune_runtime/ops/rotary.py.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "common/dtype_of.h"
#include "cpu/pointwise/rotary.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

namespace depthprune {
namespace {

constexpr int64_t kGrain = 32768;  // elements that are worth a second thread

template <typename X>
DEPTHPRUNE_INLINE void rotate_tokens(const Rotation& rotation, int64_t begin, int64_t end) {
  using T = typename X::storage;
  const int64_t half = rotation.half;
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = rotation.cos_sin + rotation.positions[token] * 2 * half;  // [D/2]
    const float* sin = cos + half;                                               // [D/2]
    for (const Heads& heads : rotation.heads) {
      for (int64_t h = 0; h < heads.count; ++h) {
        T* a = static_cast<T*>(heads.data) + token * heads.token_stride + h * heads.head_stride;  // [D/2]
        T* b = a + half;                                                                          // [D/2]
#pragma omp simd
        for (int64_t d = 0; d < half; ++d) {
          const float x = X::widen(a[d]);
          const float y = X::widen(b[d]);
          a[d] = X::narrow(x * cos[d] - y * sin[d]);
          b[d] = X::narrow(y * cos[d] + x * sin[d]);
        }
      }
    }
  }
}

}  // namespace

// The dtype switch is inside the clones: a template cannot be cloned.
DEPTHPRUNE_CLONES void rotate(const Rotation& rotation, int64_t begin, int64_t end) {
  if (rotation.dtype == Dtype::bfloat16) {
    rotate_tokens<BFloat16>(rotation, begin, end);
  } else if (rotation.dtype == Dtype::float16) {
    rotate_tokens<Float16>(rotation, begin, end);
  } else {
    rotate_tokens<Float32>(rotation, begin, end);
  }
}

namespace {

Heads heads_of(const at::Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.size(1)}; }

void rotary(
    at::Tensor& q,                  // [T, H, D], rotated in place
    at::Tensor& k,                  // [T, K, D], rotated in place
    const at::Tensor& cos_sin,      // [S, 2, D/2] float32
    const at::Tensor& positions) {  // [T]
  const char* op = "rotary";
  DEPTHPRUNE_CHECK(q.dim() == 3 && q.size(2) % 2 == 0, op, "q", "shape [T, H, D] with an even D", q.sizes());
  const int64_t tokens = q.size(0);
  const int64_t half = q.size(2) / 2;
  DEPTHPRUNE_CHECK(
      k.dim() == 3 && k.size(0) == tokens && k.size(2) == 2 * half, op, "k",
      c10::str("shape [", tokens, ", K, ", 2 * half, "]"), k.sizes());
  DEPTHPRUNE_CHECK(is_known(q.scalar_type()), op, "q", "dtype bfloat16, float16 or float32", q.scalar_type());
  DEPTHPRUNE_CHECK(
      k.scalar_type() == q.scalar_type(), op, "k", c10::str("dtype ", q.scalar_type(), " (that of q)"),
      k.scalar_type());
  DEPTHPRUNE_CHECK(
      cos_sin.dim() == 3 && cos_sin.size(1) == 2 && cos_sin.size(2) == half, op, "cos_sin",
      c10::str("shape [S, 2, ", half, "]"), cos_sin.sizes());
  DEPTHPRUNE_CHECK(cos_sin.scalar_type() == at::kFloat, op, "cos_sin", "dtype Float", cos_sin.scalar_type());
  DEPTHPRUNE_CHECK(
      positions.dim() == 1 && positions.size(0) == tokens, op, "positions", c10::str("shape [", tokens, "]"),
      positions.sizes());
  DEPTHPRUNE_CHECK(
      positions.scalar_type() == at::kLong || positions.scalar_type() == at::kInt, op, "positions",
      "dtype int64 or int32", positions.scalar_type());
  for (const at::Tensor* t : {const_cast<const at::Tensor*>(&k), &cos_sin, &positions}) {
    DEPTHPRUNE_CHECK(t->is_cpu(), op, "k, cos_sin and positions", "device cpu", t->device());
  }
  const at::Tensor table = cos_sin.contiguous();
  const at::Tensor rows = positions.to(at::kLong).contiguous();
  const int64_t* position = rows.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    DEPTHPRUNE_CHECK(
        position[t] >= 0 && position[t] < table.size(0), op, "positions",
        c10::str("values from 0 to ", table.size(0) - 1), c10::str(position[t], " at index ", t));
  }
  if (q.numel() == 0 && k.numel() == 0) return;
  // Copies only where the last dimension is strided, which the engine never has.
  const at::Tensor dense_q = q.stride(2) == 1 ? q : q.contiguous();
  const at::Tensor dense_k = k.stride(2) == 1 ? k : k.contiguous();
  const Rotation rotation{
      {heads_of(dense_q), heads_of(dense_k)}, table.const_data_ptr<float>(), position, half, dtype_of(q.scalar_type())};
  const int64_t token_size = (q.size(1) + k.size(1)) * 2 * half;
  at::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / token_size), [&](int64_t begin, int64_t end) {
    rotate(rotation, begin, end);
  });
  if (!dense_q.is_same(q)) q.copy_(dense_q);
  if (!dense_k.is_same(k)) k.copy_(dense_k);
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) { m.impl("rotary", &rotary); }

}  // namespace depthprune
