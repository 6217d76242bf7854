// From tensors to the rows that the norm kernels of every device take.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/row_strides.h"

namespace depthprune {

// The rows of t, or nothing where its last dimension is strided or the others do not merge into two.
inline std::optional<RowStrides> row_strides_of(const at::Tensor& t) {
  if (t.size(-1) != 1 && t.stride(-1) != 1) return std::nullopt;
  int64_t sizes[2];
  int64_t strides[2];
  int count = 0;
  for (int64_t d = t.dim() - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (count > 0 && t.stride(d) == sizes[count - 1] * strides[count - 1]) {
      sizes[count - 1] *= t.size(d);
      continue;
    }
    if (count == 2) return std::nullopt;
    sizes[count] = t.size(d);
    strides[count] = t.stride(d);
    ++count;
  }
  if (count == 0) return RowStrides{};
  if (count == 1) return RowStrides{1, strides[0], 0};
  return RowStrides{sizes[0], strides[1], strides[0]};
}

// t, or a dense copy where its rows have no simple offsets (of a matrix: where a row is strided): slower, for callers
// that the engine does not have.
inline at::Tensor with_row_strides(const at::Tensor& t) { return row_strides_of(t) ? t : t.contiguous(); }

}  // namespace depthprune
