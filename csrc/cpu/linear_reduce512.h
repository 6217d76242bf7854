// Sums of 16 lanes; included like linear_kernel.h.

struct Lanes16 {
  using Sum = __m512;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m256 halves(Sum sum) {
    return _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m128 reduce(Sum a, Sum b, Sum c, Sum d) {
    const __m256 ab = _mm256_hadd_ps(halves(a), halves(b));
    const __m256 cd = _mm256_hadd_ps(halves(c), halves(d));
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
};
