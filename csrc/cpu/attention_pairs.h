// Products of attention in bfloat16 pairs (AVX-512 BF16): lane i adds a_2i b_2i + a_2i+1 b_2i+1 to a float32 sum, twice
// the products of a float32 instruction. Included by attention_tile.h where the target has them.
//
// Queries and keys are multiplied as they are, exactly; the weights of the softmax are rounded to bfloat16, as torch
// rounds them, while their sum l is not. Subnormal bfloat16 values count as zero.
#pragma once

#ifdef DEPTHPRUNE_BF16_PAIRS

#include <cstdint>
#include <cstring>

#include "cpu/attention_task.h"
#include "cpu/simd.h"
#include "cpu/vec.h"

namespace depthprune::attention {

using Pair = uint32_t __attribute__((may_alias));  // two neighbours, the first in the low half; kept in float scratch

// out_{d j} = pair d of key j: [D / 2, kKeys]
DEPTHPRUNE_INLINE void pair_keys(const uint16_t* const* rows, int64_t count, int64_t head_dim, Pair* out) {
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t d = 0; d < head_dim / 2; ++d) {
      uint32_t pair;
      std::memcpy(&pair, rows[j] + 2 * d, sizeof(pair));
      out[d * kKeys + j] = pair;
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

// Weights [rows, kKeys] in place: float32 to bfloat16 in the first half of each row.
DEPTHPRUNE_INLINE void narrow_weights(int64_t rows, int64_t columns, float* weights) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = weights + r * kKeys;
    for (int64_t j = 0; j < columns; j += 32) {  // reads 64 of kKeys at most; what is behind `columns` is not used
      const __m512 low = _mm512_loadu_ps(row + j);
      const __m512 high = _mm512_loadu_ps(row + j + 16);
      _mm512_storeu_si512(reinterpret_cast<char*>(row) + 2 * j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
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
  for (; j < columns; j += 16) {
    multiply_pairs_block<rows, 1>(a, a_stride, b + j, b_stride, depth, c + j, c_stride, keep, scale);
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
