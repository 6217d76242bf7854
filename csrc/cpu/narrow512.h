// bfloat16 and float32 in AVX-512 registers, without its BF16; included inside a namespace, after DEPTHPRUNE_TARGET, like
// linear_kernel.h.

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m512 widen(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// To nearest even, as BFloat16::narrow; in the upper halves of the lanes.
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m512i narrow(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m256i narrow16(__m512 x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(narrow(x), 16));
}
