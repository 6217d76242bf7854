// Element types of weights and activations, for code that knows pointers only.
#pragma once

#include <cstdint>

namespace depthprune {

enum class Dtype { bfloat16, float16, float32 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace depthprune
