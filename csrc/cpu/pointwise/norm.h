// RMSNorm over rows in memory; see norm.cpp.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/row_strides.h"

namespace depthprune {

struct Norm {
  const void* x;       // [T, C]
  void* residual;      // [T, C], or null
  const void* weight;  // [C]
  void* out;           // [T, C]
  RowStrides x_rows;
  RowStrides residual_rows;
  RowStrides out_rows;
  int64_t hidden_size;
  float eps;
  Dtype dtype;
  Dtype weight_dtype;
};

// Rows [begin, end); norm_add first adds x to the residual. x and out may be the same.
void norm_plain(const Norm& norm, int64_t begin, int64_t end);
void norm_add(const Norm& norm, int64_t begin, int64_t end);

}  // namespace depthprune
