// RMSNorm over rows in memory; see norm.cpp.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace depthprune {

// Row r of a tensor starts at (r / inner) * outer_stride + (r % inner) * inner_stride: enough for [T, C], and for the
// heads [T, H, D] of a wider projection.
struct Rows {
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  int64_t offset(int64_t row) const {
    if (inner == 1) return row * outer_stride;
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

struct Norm {
  const void* x;       // [T, C]
  void* residual;      // [T, C], or null
  const void* weight;  // [C]
  void* out;           // [T, C]
  Rows x_rows;
  Rows residual_rows;
  Rows out_rows;
  int64_t hidden_size;
  float eps;
  Dtype dtype;
  Dtype weight_dtype;
};

// Rows [begin, end); norm_add first adds x to the residual. x and out may be the same.
void norm_plain(const Norm& norm, int64_t begin, int64_t end);
void norm_add(const Norm& norm, int64_t begin, int64_t end);

}  // namespace depthprune
