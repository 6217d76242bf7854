// RMSNorm over rows in device memory; see norm.cu.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/row_strides.h"

struct CUstream_st;  // cudaStream_t without the toolkit's headers

namespace depthprune::cuda {

struct Norm {
  const void* x;       // [T, C]
  void* residual;      // [T, C], or null
  const void* weight;  // [weight_rows, C], dense; row r of x takes row r % weight_rows
  void* out;           // [T, C], may be x
  RowStrides x_rows;
  RowStrides residual_rows;
  RowStrides out_rows;
  int64_t num_rows;
  int64_t hidden_size;
  int64_t weight_rows;
  float eps;
  Dtype dtype;
  Dtype weight_dtype;  // dtype or float32
};

// Queues the norm of all rows; with a residual, x is first added to it. Throws if the launch fails.
void norm(const Norm& norm, CUstream_st* stream);

}  // namespace depthprune::cuda
