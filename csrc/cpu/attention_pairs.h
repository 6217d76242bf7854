// Products of attention in bfloat16 pairs (AVX-512 BF16): lane i adds a_2i b_2i + a_2i+1 b_2i+1 to a float32 sum, twice
// the products of a float32 instruction. Included by attention_tile.h where the target has them.
//
// Queries and keys are multiplied as they are, exactly; the weights of the softmax are rounded to bfloat16, as torch
// rounds them, while their sum l is not. Subnormal bfloat16 values count as zero.
#pragma once

#ifdef DEPTHPRUNE_BF16_PAIRS

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/attention_task.h"
#include "cpu/exp.h"
#include "cpu/simd.h"
#include "cpu/vec.h"

namespace depthprune::attention {

using Pair = uint32_t __attribute__((may_alias));  // two neighbours, the first in the low half; kept in float scratch

#include "cpu/transpose16.h"

// out_{d j} = pair d of key j: [D / 2 rounded up to 16, kKeys]; nothing has a meaning behind `count`.
DEPTHPRUNE_INLINE void pair_keys(const uint16_t* const* rows, int64_t count, int64_t head_dim, Pair* out) {
  for (int64_t j = 0; j < count; j += 16) {
    for (int64_t d = 0; d < head_dim / 2; d += 16) {
      const int64_t width = head_dim / 2 - d;
      const auto mask = static_cast<__mmask16>(width >= 16 ? 0xffffu : (1u << width) - 1u);
      __m512i in[16];
      DEPTHPRUNE_UNROLL
      for (int i = 0; i < 16; ++i) {
        in[i] = _mm512_maskz_loadu_epi32(mask, rows[std::min(j + i, count - 1)] + 2 * d);
      }
      transpose16(in, out + d * kKeys + j, kKeys);
    }
  }
}

// out_{j d} = values 2j and 2j + 1 at d: [kKeys / 2, padded_dim]. Rows are repeated behind an odd last one.
DEPTHPRUNE_INLINE void pair_values(
    const uint16_t* const* rows, int64_t count, int64_t head_dim, int64_t padded_dim, Pair* out) {
  for (int64_t j = 0; j < count; j += 2) {
    const uint16_t* first = rows[j];
    const uint16_t* second = rows[j + 1];
    Pair* pairs = out + j / 2 * padded_dim;
    for (int64_t d = 0; d < head_dim; ++d) pairs[d] = first[d] | static_cast<uint32_t>(second[d]) << 16;
    for (int64_t d = head_dim; d < padded_dim; ++d) pairs[d] = 0;
  }
}

// e^(x - base) = 2^n p(r), |r| <= 1/2, p the polynomial of degree 5 that fits 2^r best: an error of 1.7e-7 at most,
// far below the rounding to bfloat16 that follows.
DEPTHPRUNE_INLINE __m512 weights16(__mmask16 visible, __m512 scores, __m512 minus_base) {
  // The second operand where it is NaN; minus infinity would become one.
  const __m512 x = _mm512_max_ps(
      _mm512_set1_ps(-200.0f), _mm512_fmadd_ps(scores, _mm512_set1_ps(0x1.715476p0f), minus_base));
  const __m512 n = _mm512_roundscale_ps(x, 0);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 sum = _mm512_set1_ps(0x1.5bba14p-10f);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0x1.3cea88p-7f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0x1.c6b752p-5f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0x1.ebf9bcp-3f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0x1.62e42ap-1f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(visible, sum, n);
}

// The low `count` bits, 0 <= count <= 64.
DEPTHPRUNE_INLINE uint64_t low_bits(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// One row of scores over kKeys keys, of which begin .. end are visible, becomes weights
// e^(score - m) in bfloat16, in its first half; m and l move on. Returns what the sums so far are to be multiplied with.
DEPTHPRUNE_INLINE float softmax_pairs(float* scores, int64_t begin, int64_t end, float& m, float& l) {
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  constexpr int kVectors = kKeys / 16;
  const uint64_t visible = low_bits(end) & ~low_bits(begin);
  __m512 values[kVectors];
  __m512 top = _mm512_set1_ps(kMinusInf);
  DEPTHPRUNE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    values[i] = _mm512_loadu_ps(scores + i * 16);
    // The second operand where the first is NaN.
    top = _mm512_mask_max_ps(top, static_cast<__mmask16>(visible >> (16 * i)), values[i], top);
  }
  const float largest = _mm512_reduce_max_ps(top);
  const float next = largest > m ? largest : m;
  const float base = next == kMinusInf ? 0.0f : next;  // nothing visible so far
  const __m512 minus_base = _mm512_set1_ps(-base * 0x1.715476p0f);
  __m512 sum = _mm512_setzero_ps();
  DEPTHPRUNE_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    values[i] = weights16(static_cast<__mmask16>(visible >> (16 * i)), values[i], minus_base);
    sum = _mm512_add_ps(sum, values[i]);
  }
  DEPTHPRUNE_UNROLL
  for (int i = 0; i < kVectors; i += 2) {
    _mm512_storeu_si512(scores + i * 8, (__m512i)_mm512_cvtne2ps_pbh(values[i + 1], values[i]));
  }
  const float keep = fast_exp(m - base);
  l = l * keep + _mm512_reduce_add_ps(sum);
  m = next;
  return keep;
}

// c_rj = keep_r c_rj + sum_d a_rd b_dj over pairs d, without `keep` scale * the sum.
template <int rows, int vecs>
DEPTHPRUNE_INLINE void multiply_pairs_block(
    const Pair* a, int64_t a_stride, const Pair* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
    const float* keep, float scale) {
  __m512 sums[rows][vecs];
  DEPTHPRUNE_UNROLL
  for (int r = 0; r < rows; ++r) {
    DEPTHPRUNE_UNROLL
    for (int i = 0; i < vecs; ++i) {
      sums[r][i] = _mm512_setzero_ps();
      if (keep != nullptr) {
        sums[r][i] = _mm512_mul_ps(_mm512_loadu_ps(c + r * c_stride + i * 16), _mm512_set1_ps(keep[r]));
      }
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    __m512bh values[vecs];
    DEPTHPRUNE_UNROLL
    for (int i = 0; i < vecs; ++i) values[i] = (__m512bh)_mm512_loadu_si512(b + d * b_stride + i * 16);
    DEPTHPRUNE_UNROLL
    for (int r = 0; r < rows; ++r) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * a_stride + d]));
      DEPTHPRUNE_UNROLL
      for (int i = 0; i < vecs; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], values[i], factor);
    }
  }
  DEPTHPRUNE_UNROLL
  for (int r = 0; r < rows; ++r) {
    DEPTHPRUNE_UNROLL
    for (int i = 0; i < vecs; ++i) {
      const __m512 sum = keep != nullptr ? sums[r][i] : _mm512_mul_ps(sums[r][i], _mm512_set1_ps(scale));
      _mm512_storeu_ps(c + r * c_stride + i * 16, sum);
    }
  }
}

template <int rows>
DEPTHPRUNE_INLINE void multiply_pairs_rows(
    const Pair* a, int64_t a_stride, const Pair* b, int64_t b_stride, int64_t depth, int64_t columns, float* c,
    int64_t c_stride, const float* keep, float scale) {
  int64_t j = 0;
  for (; j + 64 <= columns; j += 64) {
    multiply_pairs_block<rows, 4>(a, a_stride, b + j, b_stride, depth, c + j, c_stride, keep, scale);
  }
  switch ((columns - j) / 16) {
    case 3: return multiply_pairs_block<rows, 3>(a, a_stride, b + j, b_stride, depth, c + j, c_stride, keep, scale);
    case 2: return multiply_pairs_block<rows, 2>(a, a_stride, b + j, b_stride, depth, c + j, c_stride, keep, scale);
    case 1: return multiply_pairs_block<rows, 1>(a, a_stride, b + j, b_stride, depth, c + j, c_stride, keep, scale);
    default: return;
  }
}

// Up to kRows rows; `columns` is a multiple of 16.
DEPTHPRUNE_INLINE void multiply_pairs(
    int64_t rows, const Pair* a, int64_t a_stride, const Pair* b, int64_t b_stride, int64_t depth, int64_t columns,
    float* c, int64_t c_stride, const float* keep, float scale) {
  switch (rows) {
    case 6: return multiply_pairs_rows<6>(a, a_stride, b, b_stride, depth, columns, c, c_stride, keep, scale);
    case 5: return multiply_pairs_rows<5>(a, a_stride, b, b_stride, depth, columns, c, c_stride, keep, scale);
    case 4: return multiply_pairs_rows<4>(a, a_stride, b, b_stride, depth, columns, c, c_stride, keep, scale);
    case 3: return multiply_pairs_rows<3>(a, a_stride, b, b_stride, depth, columns, c, c_stride, keep, scale);
    case 2: return multiply_pairs_rows<2>(a, a_stride, b, b_stride, depth, columns, c, c_stride, keep, scale);
    default: return multiply_pairs_rows<1>(a, a_stride, b, b_stride, depth, columns, c, c_stride, keep, scale);
  }
}

}  // namespace depthprune::attention

#endif
