// Rotary embedding of heads in memory; see rotary.cpp.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace depthprune {

struct Heads {
  void* data;  // [T, H, D]
  int64_t token_stride;
  int64_t head_stride;
  int64_t count;
};

struct Rotation {
  Heads heads[2];
  const float* cos_sin;      // [S, 2, D/2]
  const int64_t* positions;  // [T]
  int64_t half;
  Dtype dtype;
};

// Tokens [begin, end), in place.
void rotate(const Rotation& rotation, int64_t begin, int64_t end);

}  // namespace depthprune
