// Rotary embedding of heads in device memory, with the steps around it; see rotary.cu.
#pragma once

#include <cstdint>

#include "common/dtype.h"

struct CUstream_st;  // cudaStream_t without the toolkit's headers

namespace depthprune::cuda {

// Strides count elements; the last dimension is dense.
struct Heads {
  void* data;  // [T, H, D]
  int64_t token_stride;
  int64_t head_stride;
  int64_t count;     // H, or 0: no such heads
  const void* gain;  // [H, D] dense, or null: no norm
  Dtype gain_dtype;  // that of the heads or float32
};

struct Cache {
  void* data;  // [N, P, K, D]
  int64_t block_stride;
  int64_t slot_stride;
  int64_t head_stride;
};

struct Rotation {
  Heads q;  // normalised and rotated in place
  Heads k;  // normalised and rotated in place, then stored
  Heads v;  // stored as they are
  Cache k_cache;
  Cache v_cache;
  const float* cos_sin;         // [S, 2, D/2]
  const int64_t* positions;     // [T]
  const int64_t* slot_mapping;  // [T], negative: store nothing; null: there is no cache
  int64_t num_tokens;
  int64_t num_positions;  // S
  int64_t num_slots;      // N P
  int64_t block_size;     // P
  int64_t half;           // D/2
  float eps;
  Dtype dtype;
};

// Queues the work of a batch in one launch; throws if the launch fails. A position or slot beyond its range stops the
// kernel with an error, as torch's index operators do.
void rotate(const char* op, const Rotation& rotation, CUstream_st* stream);

}  // namespace depthprune::cuda
