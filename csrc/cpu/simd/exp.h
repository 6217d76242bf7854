// exp of a float, inlined into loops that the compiler vectorises.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

namespace depthprune {

// e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor polynomial of degree 7. Below -87.33 the
// result is 0 (no subnormals), above 88.72 infinity.
DEPTHPRUNE_INLINE float fast_exp(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves round(x) in the low bits
  const float shifted = x * 0x1.715476p0f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0x1.62e400p-1f;  // ln(2) in two parts, the first short enough for an exact product
  r = r - n * 0x1.7f7d1cp-20f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  uint32_t bits = std::bit_cast<uint32_t>(sum) + (std::bit_cast<uint32_t>(shifted) << 23);
  bits = select(x < -87.33f, 0u, bits);
  bits = select(x > 88.72f, 0x7f800000u, bits);
  return std::bit_cast<float>(select(x != x, std::bit_cast<uint32_t>(x), bits));
}

}  // namespace depthprune
