// Panels of weights, and what follows a sum of products; included by gemm_<level>.cpp inside a namespace of its own, after
// DEPTHPRUNE_TARGET, like linear_kernel.h. V: vectors of 16 outputs in a panel; gated, the first half of them are gates.

// The weight row of the first output of vector v.
template <int V>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE int64_t weight_row(const Gemm& gemm, int64_t first, int v) {
  if (!gemm.gated) return first + v * 16;
  return v < V / 2 ? first + v * 16 : gemm.out_features + first + (v - V / 2) * 16;
}

// Outputs of vector v that there are.
template <int V>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE int64_t count_of(const Gemm& gemm, int64_t first, int v) {
  const int64_t left = gemm.out_features - first - (gemm.gated && v >= V / 2 ? v - V / 2 : v) * 16;
  return left < 0 ? 0 : left > 16 ? 16 : left;
}

// [pairs, V * 16] words; what there is not is zero.
template <int V>
DEPTHPRUNE_TARGET void pack_panel(const Gemm& gemm, int64_t first, uint32_t* panel) {
  for (int v = 0; v < V; ++v) {
    const int64_t count = count_of<V>(gemm, first, v);
    const uint16_t* rows = gemm.weight + weight_row<V>(gemm, first, v) * gemm.weight_stride;
    for (int64_t k = 0; k < gemm.in_features; k += 32) {
      const int64_t width = gemm.in_features - k;
      const __mmask32 mask = width >= 32 ? 0xffffffffu : (1u << width) - 1u;
      __m512i in[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        in[i] = i < count ? _mm512_maskz_loadu_epi16(mask, rows + i * gemm.weight_stride + k) : _mm512_setzero_si512();
      }
      transpose16(in, panel + k / 2 * V * 16 + v * 16, V * 16);
    }
  }
}

// e^x: 2^n p(r), |r| <= ln(2) / 2, its Taylor polynomial of degree 7 as in exp.h; infinite and zero beyond the range.
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m512 exp16(__m512 x) {
  // Both operations give their second operand where it is NaN.
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), _mm512_min_ps(_mm512_set1_ps(200.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p0f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e400p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 720));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 120));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 24));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 6));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.5f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, n);
}

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m512 silu16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

template <int V>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m512 add_bias(const Gemm& gemm, int64_t first, int v, __m512 sum) {
  if (gemm.bias == nullptr) return sum;
  const __mmask16 mask = static_cast<__mmask16>((1u << count_of<V>(gemm, first, v)) - 1u);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, gemm.bias + weight_row<V>(gemm, first, v));
  return _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
}

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store_outputs(uint16_t* out, __m512 values, int64_t count) {
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh(values);
  if (count == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
  } else {
    _mm256_mask_storeu_epi16(out, static_cast<__mmask16>((1u << count) - 1u), halves);
  }
}

// One token's sums over a panel, to its outputs.
template <int V, bool gated>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void finish(const Gemm& gemm, int64_t first, int64_t token, const __m512 (&sums)[V]) {
  uint16_t* out = gemm.out + token * gemm.out_features + first;
  if constexpr (gated) {
    constexpr int half = V / 2;
#pragma GCC unroll 4
    for (int v = 0; v < half; ++v) {
      const __m512 gate = silu16(add_bias<V>(gemm, first, v, sums[v]));
      const __m512 up = add_bias<V>(gemm, first, half + v, sums[half + v]);
      store_outputs(out + v * 16, _mm512_mul_ps(gate, up), count_of<V>(gemm, first, v));
    }
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store_outputs(out + v * 16, add_bias<V>(gemm, first, v, sums[v]), count_of<V>(gemm, first, v));
    }
  }
}
