// What op.cpp and the decode step hand to the code that does the sums: the tensors, and the tasks they are cut into.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "cpu/simd/clones.h"

namespace depthprune::attention {

constexpr int64_t kKeys = 64;     // keys of a tile
constexpr int kRows = 6;          // rows of queries that one product takes
constexpr int64_t kFewRows = 16;  // up to this many rows, keys are read in place; above, they are transposed first

// How a tile of keys is read: in place; widened to float32 once for all rows, padded; that with keys transposed; or in
// pairs of bfloat16, keys transposed.
enum class Read { kInPlace, kWidened, kTransposed, kPairs };

// Keys or values of all requests: [N, P, K, D] in kv_blocks, or [T, K, D].
struct Source {
  const void* data;
  int64_t block_stride;
  int64_t token_stride;
  int64_t head_stride;
};

struct Problem {
  const void* q;  // [T, H, D]
  void* out;      // [T, H, D]
  int64_t q_strides[2];
  int64_t out_strides[2];
  Source k;
  Source v;
  int64_t block_size;  // 0: not paged
  int64_t head_dim;
  int64_t group;   // query heads of a KV head
  int64_t window;  // 0: none
  float scale;
  Dtype dtype;

  int64_t padded_dim() const { return (head_dim + 15) / 16 * 16; }

  // Few rows may read keys in place: whole vectors must not reach over the end of a row, and widening float16 takes
  // several instructions, so is done once a key rather than once a row.
  bool in_place() const { return head_dim % 16 == 0 && dtype != Dtype::float16; }
};

// Queries first_query .. + num_queries, at positions position .., against the keys at positions first_key .. end_key.
struct Task {
  int64_t first_query;
  int64_t num_queries;
  int64_t position;
  int64_t first_key;
  int64_t end_key;
  int64_t kv_head;
  const int64_t* table;  // [M] kv_blocks of the request; null: not paged
  int64_t first_token;   // of the sequence, where not paged
  bool few_rows;
  int64_t partial;  // offset in floats of m [R], l [R], o [R, padded_dim]; -1: the task writes the output
};

// Memory of one thread.
struct Scratch {
  std::vector<float> floats;
  float* q;       // [R, padded_dim], scaled
  float* k;       // [padded_dim, kKeys], or [kKeys, padded_dim]
  float* v;       // [kKeys, padded_dim]
  float* scores;  // [kRows, kKeys]
  float* sums;    // m [R], l [R], o [R, padded_dim]

  Scratch(int64_t rows, int64_t padded_dim, bool panels) {
    const int64_t panel = panels ? kKeys * padded_dim : 0;
    floats.resize(rows * (2 * padded_dim + 2) + 2 * panel + kRows * kKeys);
    q = floats.data();
    k = q + rows * padded_dim;
    v = k + panel;
    scores = v + panel;
    sums = scores + kRows * kKeys;
  }
};

// Does one task. One build of tile.inc for each instruction set; the caller picks by cpuid.
using Attend = void (*)(const Problem&, const Task&, Scratch&, float* partials);
#if DEPTHPRUNE_HAS_CLONES
void attend_avx512_bf16(const Problem& problem, const Task& task, Scratch& scratch, float* partials);
void attend_avx512(const Problem& problem, const Task& task, Scratch& scratch, float* partials);
void attend_avx2(const Problem& problem, const Task& task, Scratch& scratch, float* partials);
#endif
void attend_generic(const Problem& problem, const Task& task, Scratch& scratch, float* partials);

}  // namespace depthprune::attention
