// What follows the sums of a product; included by gemm_<level>.cpp inside a namespace of its own, after DEPTHPRUNE_TARGET,
// like linear_kernel.h. V: registers of 16 outputs of a token; gated, the first half of them are gates.

#include "cpu/silu16.h"

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u);
}

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m512 add_bias(__m512 sums, const uint16_t* bias, __mmask16 lanes) {
  const __m256i halves = _mm256_maskz_loadu_epi16(lanes, bias);
  return _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
}

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store_outputs(uint16_t* out, __m512 values, __mmask16 lanes) {
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh(values);
  if (lanes == 0xffff) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
  } else {
    _mm256_mask_storeu_epi16(out, lanes, halves);
  }
}

// One token's sums, to its outputs [first, last).
template <int V, bool gated>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void finish(
    const Gemm& gemm, int64_t first, int64_t last, int64_t token, const __m512 (&sums)[V]) {
  constexpr int outputs = gated ? V / 2 : V;
  uint16_t* out = gemm.out + token * gemm.out_features + first;
#pragma GCC unroll 4
  for (int v = 0; v < outputs; ++v) {
    const __mmask16 lanes = first_lanes(last - first - v * 16);
    __m512 value = sums[v];
    if (gemm.bias != nullptr) value = add_bias(value, gemm.bias + first + v * 16, lanes);
    if constexpr (gated) {
      __m512 up = sums[outputs + v];
      if (gemm.bias != nullptr) up = add_bias(up, gemm.bias + gemm.out_features + first + v * 16, lanes);
      value = _mm512_mul_ps(silu16(value), up);
    }
    store_outputs(out + v * 16, value, lanes);
  }
}
