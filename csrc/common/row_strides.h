// Where the rows of a tensor lie in memory.
#pragma once

#include <cstdint>

namespace depthprune {

// Row r of a tensor starts at (r / inner) * outer_stride + (r % inner) * inner_stride: enough for [T, C], and for the
// heads [T, H, D] of a wider projection.
struct RowStrides {
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  int64_t offset(int64_t row) const {
    if (inner == 1) return row * outer_stride;
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

}  // namespace depthprune
