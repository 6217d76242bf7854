// The most likely token of each row, in one call. Contract: depthprune_runtime/ops/greedy.py.
#include "cpu/pointwise/greedy.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "common/check.h"
#include "common/dtype_of.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

namespace depthprune {
namespace {

constexpr int64_t kGrain = 1 << 18;  // logits that are worth a second thread
constexpr int64_t kBlock = 1024;

template <typename X>
DEPTHPRUNE_INLINE int64_t greedy_as(const void* row, int64_t size) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const auto* logits = static_cast<const typename X::storage*>(row);
  float largest = -infinity;
  int64_t found = -1;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    float most = -infinity;
    uint32_t bad = 0;
#pragma omp simd reduction(max : most) reduction(| : bad)
    for (int64_t i = begin; i < end; ++i) {
      const float value = X::widen(logits[i]);
      most = value > most ? value : most;
      bad |= static_cast<uint32_t>(!(value < infinity));  // infinity and NaN
    }
    if (bad != 0) return -1;
    if (most > largest) {
      largest = most;
      found = begin;
      while (X::widen(logits[found]) != most) ++found;
    }
  }
  return found;
}

// The dtype switch is inside the clones: a template cannot be cloned.
DEPTHPRUNE_CLONES int64_t greedy_row(const void* row, int64_t size, Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return greedy_as<BFloat16>(row, size);
    case Dtype::float16: return greedy_as<Float16>(row, size);
    default: return greedy_as<Float32>(row, size);
  }
}

}  // namespace

void greedy_rows(const void* logits, int64_t stride, int64_t rows, int64_t size, Dtype dtype, int64_t* tokens) {
  const auto* data = static_cast<const char*>(logits);
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) tokens[b] = greedy_row(data + b * stride, size, dtype);
  });
}

namespace {

at::Tensor greedy(const at::Tensor& logits) {  // [B, V] -> [B]
  constexpr const char* op = "greedy";
  DEPTHPRUNE_CHECK(logits.dim() == 2 && logits.size(1) > 0, op, "logits", "shape [B, V]", logits.sizes());
  DEPTHPRUNE_CHECK(
      is_known(logits.scalar_type()), op, "logits", "dtype bfloat16, float16 or float32", logits.scalar_type());
  const at::Tensor rows = logits.stride(1) == 1 ? logits : logits.contiguous();
  at::Tensor out = at::empty({rows.size(0)}, rows.options().dtype(at::kLong));
  const Dtype dtype = dtype_of(rows.scalar_type());
  const int64_t stride = rows.stride(0) * size_of(dtype);
  greedy_rows(rows.const_data_ptr(), stride, rows.size(0), rows.size(1), dtype, out.mutable_data_ptr<int64_t>());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) { m.impl("greedy", &greedy); }

}  // namespace depthprune
