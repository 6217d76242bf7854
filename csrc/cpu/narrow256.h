// Rounding to bfloat16 in AVX2 registers, to nearest even, as BFloat16::narrow; included inside a namespace, after
// DEPTHPRUNE_TARGET, like linear_kernel.h.

// In the lower halves of the lanes.
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m256i narrow8(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
}

// Sixteen values in order.
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m256i narrow16(__m256 first, __m256 second) {
  const __m256i packed = _mm256_packus_epi32(narrow8(first), narrow8(second));  // halves of 128 bits apart
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
