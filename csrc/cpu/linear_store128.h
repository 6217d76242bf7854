// Four outputs at once: bias, rounding and the store; included like linear_kernel.h.

template <typename Format>
struct Store4;

template <>
struct Store4<BFloat16> {
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store4(__m128 totals, const uint16_t* bias, uint16_t* out) {
    if (bias != nullptr) {
      const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bias));
      totals = _mm_add_ps(totals, _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16)));
    }
    // To nearest even, as BFloat16::narrow.
    const __m128i bits = _mm_castps_si128(totals);
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd), 16);
    const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(totals, totals));
    const __m128i chosen = _mm_blendv_epi8(rounded, _mm_set1_epi32(0x7fc0), nan);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(chosen, chosen));
  }
};

template <>
struct Store4<Float16> {
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store4(__m128 totals, const uint16_t* bias, uint16_t* out) {
    if (bias != nullptr) {
      totals = _mm_add_ps(totals, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bias))));
    }
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_cvtps_ph(totals, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
struct Store4<Float32> {
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store4(__m128 totals, const float* bias, float* out) {
    if (bias != nullptr) totals = _mm_add_ps(totals, _mm_loadu_ps(bias));
    _mm_storeu_ps(out, totals);
  }
};
