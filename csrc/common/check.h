// Argument errors of the ops: which argument, what was expected, what came. They reach Python as ValueError.
#pragma once

#include <c10/util/Exception.h>

// DEPTHPRUNE_CHECK(weight.dim() == 1, "rms_norm", "weight", "shape [576]", weight.sizes())
//   -> ValueError: rms_norm: expected weight of shape [576], got [64, 9]
#define DEPTHPRUNE_CHECK(condition, op, argument, expected, got) \
  TORCH_CHECK_VALUE(condition, op, ": expected ", argument, " of ", expected, ", got ", got)
