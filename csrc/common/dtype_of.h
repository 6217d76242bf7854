// From tensors to what the kernels take.
#pragma once

#include <c10/core/ScalarType.h>

#include "common/dtype.h"

namespace depthprune {

inline bool is_known(c10::ScalarType dtype) {
  return dtype == c10::kBFloat16 || dtype == c10::kHalf || dtype == c10::kFloat;
}

inline Dtype dtype_of(c10::ScalarType dtype) {
  if (dtype == c10::kBFloat16) return Dtype::bfloat16;
  return dtype == c10::kHalf ? Dtype::float16 : Dtype::float32;
}

}  // namespace depthprune
