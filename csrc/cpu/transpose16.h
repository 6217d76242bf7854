// Transposing 16 x 16 words in AVX-512 registers; included inside a namespace, after DEPTHPRUNE_TARGET, like
// linear_kernel.h.

// out[k][row] = in[row][k] of 16 x 16 words.
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void transpose16(__m512i (&in)[16], uint32_t* out, int64_t stride) {
  __m512i two[16], four[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    two[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    two[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    four[4 * i] = _mm512_unpacklo_epi64(two[4 * i], two[4 * i + 2]);
    four[4 * i + 1] = _mm512_unpackhi_epi64(two[4 * i], two[4 * i + 2]);
    four[4 * i + 2] = _mm512_unpacklo_epi64(two[4 * i + 1], two[4 * i + 3]);
    four[4 * i + 3] = _mm512_unpackhi_epi64(two[4 * i + 1], two[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(four[i], four[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(four[i], four[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(four[i + 8], four[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(four[i + 8], four[i + 12], 0xdd);
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}
