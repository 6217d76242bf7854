// The most likely token of each row of logits.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace depthprune {

// tokens[b]: index of the largest value of row b, the first among equals; -1 where one is infinite or not a number.
// stride: bytes from row to row.
void greedy_rows(const void* logits, int64_t stride, int64_t rows, int64_t size, Dtype dtype, int64_t* tokens);

}  // namespace depthprune
