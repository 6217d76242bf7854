// What op.cpp (arguments, threads) and the kernels of each instruction level (<level>.cpp) agree on.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace depthprune {

struct Linear {
  const void* x;          // [T, K], as LinearKernel::pack left it
  const void* weight;     // [N, K]
  const void* bias;       // [N], or null
  void* out;              // [T, N], dense
  int64_t tokens;         // T
  int64_t in_features;    // K
  int64_t out_features;   // N
  int64_t x_stride;       // elements from row to row
  int64_t weight_stride;  // elements from row to row
};

struct LinearKernel {
  int64_t step;     // pack fills rows with zeros to a multiple of this many elements
  int64_t x_bytes;  // of a packed element
  bool as_stored;   // packed elements are those of x: whole rows need no packing
  // One row of x [K] into the format that `rows` reads.
  void (*pack)(const void* x, void* packed, int64_t in_features);
  // Outputs [begin, end) of all tokens.
  void (*rows)(const Linear& linear, int64_t begin, int64_t end);
};

// Kernels by Dtype; all null where the compiler or the processor family lacks the level.
extern const LinearKernel kLinearGeneric[3];
extern const LinearKernel kLinearAvx2[3];
extern const LinearKernel kLinearAvx512[3];
extern const LinearKernel kLinearAvx512Bf16;  // bfloat16 only

// The kernel of the level in force for this many tokens, or null where at::linear is the better one.
const LinearKernel* linear_kernel(Dtype dtype, int64_t tokens);

// Weight rows that one pass over the inputs shares; threads get multiples of it.
constexpr int64_t kLinearRows = 4;

}  // namespace depthprune
