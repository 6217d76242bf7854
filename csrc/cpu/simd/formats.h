// Element formats: how a stored value becomes a float and back, rounded to nearest even as torch rounds. Stored as
// plain integers: GCC 12 does not vectorise loops that store c10's structs.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/simd/clones.h"

namespace depthprune {

// condition ? a : b without a branch: GCC 12 threads the jumps of a ternary through the loop, which then stays scalar.
DEPTHPRUNE_INLINE uint32_t select(bool condition, uint32_t a, uint32_t b) {
  return b ^ ((a ^ b) & -static_cast<uint32_t>(condition));
}

// x > y for bit patterns below 2^31: signed, since SSE and AVX2 have no unsigned comparison.
DEPTHPRUNE_INLINE bool above(uint32_t x, uint32_t y) { return static_cast<int32_t>(x) > static_cast<int32_t>(y); }

struct Float32 {
  using storage = float;
  static DEPTHPRUNE_INLINE float widen(float x) { return x; }
  static DEPTHPRUNE_INLINE float narrow(float x) { return x; }
};

struct BFloat16 {
  using storage = uint16_t;
  static DEPTHPRUNE_INLINE float widen(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }
  static DEPTHPRUNE_INLINE uint16_t narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(select(above(bits & 0x7fffffffu, 0x7f800000u), 0x7fc0u, rounded));
  }
};

struct Float16 {
  using storage = uint16_t;
  static DEPTHPRUNE_INLINE float widen(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
    const float rebiased = std::bit_cast<float>(magnitude) * 0x1p112f;  // exact, subnormals included
    const uint32_t finite = std::bit_cast<uint32_t>(rebiased);
    return std::bit_cast<float>(sign | select(above(magnitude, 0x0f7fffffu), magnitude | 0x7f800000u, finite));
  }
  static DEPTHPRUNE_INLINE uint16_t narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // 0xc8000000 moves the exponent bias from 127 to 15.
    const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 the sum with 0.5 has its last bit at 2^-24, where fp16 has its own.
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = select(above(0x38800000u, magnitude), subnormal, normal);
    half = select(above(magnitude, 0x477fefffu), 0x7c00u, half);  // 65520 and more round to infinity
    half = select(above(magnitude, 0x7f800000u), 0x7e00u, half);
    return static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
  }
};

}  // namespace depthprune
