// Several greedy decode steps after one another, without the caller between them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/step/step.h"

namespace depthprune {

struct AheadInputs {
  int64_t tokens;                     // T requests
  const int64_t* ids;                 // [T]
  const int64_t* positions;           // [T]
  const int64_t* block_tables;        // [T, M], with room for all steps
  int64_t table_width;                // M
  int64_t kv_block_size;              // 0: no attention
  std::vector<const float*> cos_sin;  // as in StepInputs
  const int64_t* stop_ids;            // [T, E], padded with -1
  int64_t stop_width;                 // E
  int64_t steps;                      // most steps
  double seconds;                     // no step begins later than this after the first
};

// found: [steps, T], the next tokens, -1 for logits that are not finite. Returns the steps that were made, at least
// one: the last is the one in which a request ended, by a stop id or such logits.
int64_t decode_ahead(DecodeStep& step, const AheadInputs& inputs, int threads, int64_t* found);

}  // namespace depthprune
