// gemm with AVX2 and FMA: weights are widened to float32 in registers, inputs beforehand. torch has no blocked bfloat16
// product for processors without AVX-512: at 512 tokens it takes 5.6 to 6.8 times as long (two threads of a Zen 3, rows
// in benchmarks/results/linear_cpu.csv).
//
// A panel of 16 outputs meets 6 tokens at a time: 12 registers of sums, 2 of weights, 1 of inputs and the mask.
#include "cpu/panels/panels.h"
#include "cpu/simd/level.h"

#if DEPTHPRUNE_HAS_LEVELS
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "cpu/simd/clones.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/formats.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c")))

namespace depthprune {
namespace {

#include "cpu/simd/narrow256.inc"

constexpr int kTokens = 6;

#include "cpu/panels/widened.inc"

template <int S>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_column(
    __m256i low, __m256i high, const float* x, int64_t x_stride, __m256 (&sums)[S][2]) {
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    const __m256 input = _mm256_broadcast_ss(x + s * x_stride);
    sums[s][0] = _mm256_fmadd_ps(_mm256_castsi256_ps(low), input, sums[s][0]);
    sums[s][1] = _mm256_fmadd_ps(_mm256_castsi256_ps(high), input, sums[s][1]);
    // Token by token: GCC 12 would read all inputs first and move sums to memory for them.
    asm volatile("" : "+x"(sums[s][0]), "+x"(sums[s][1]) : : "memory");
  }
}

template <int S>
DEPTHPRUNE_TARGET void block(
    const uint32_t* panel, int64_t in_features, const float* x, int64_t x_stride, const Ahead& ahead,
    float (*out)[kGemmRows]) {
  __m256 sums[S][2];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) sums[s][0] = sums[s][1] = _mm256_setzero_ps();
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t k = 0; k < in_features; k += 2, panel += kGemmRows) {
    ahead.ask(k / 2);
    const auto* pairs = reinterpret_cast<const __m256i*>(panel);
    add_column<S>(
        _mm256_slli_epi32(_mm256_loadu_si256(pairs), 16), _mm256_slli_epi32(_mm256_loadu_si256(pairs + 1), 16), x + k,
        x_stride, sums);
    asm volatile("" : "+r"(pairs));  // read them again: two registers less
    add_column<S>(
        _mm256_and_si256(_mm256_loadu_si256(pairs), mask), _mm256_and_si256(_mm256_loadu_si256(pairs + 1), mask),
        x + k + 1, x_stride, sums);
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    _mm256_storeu_ps(out[s], sums[s][0]);
    _mm256_storeu_ps(out[s] + 8, sums[s][1]);
  }
}

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m256i rounded16(const float (&sums)[kGemmRows]) {
  return narrow16(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8));
}

// out[k][row] = in[row][k] of 8 x 8 words.
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void transpose8(const __m256i (&in)[8], uint32_t* out, int64_t stride) {
  __m256i two[8], four[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    two[2 * i] = _mm256_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    two[2 * i + 1] = _mm256_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    four[4 * i] = _mm256_unpacklo_epi64(two[4 * i], two[4 * i + 2]);
    four[4 * i + 1] = _mm256_unpackhi_epi64(two[4 * i], two[4 * i + 2]);
    four[4 * i + 2] = _mm256_unpacklo_epi64(two[4 * i + 1], two[4 * i + 3]);
    four[4 * i + 3] = _mm256_unpackhi_epi64(two[4 * i + 1], two[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    auto* low = reinterpret_cast<__m256i*>(out + i * stride);
    auto* high = reinterpret_cast<__m256i*>(out + (i + 4) * stride);
    _mm256_storeu_si256(low, _mm256_permute2x128_si256(four[i], four[i + 4], 0x20));
    _mm256_storeu_si256(high, _mm256_permute2x128_si256(four[i], four[i + 4], 0x31));
  }
}

DEPTHPRUNE_TARGET void pack(const uint16_t* rows, int64_t stride, int64_t count, int64_t in_features, uint32_t* panel) {
  constexpr int64_t kStep = 16;  // columns: 8 words of each row
  const int64_t filled = (in_features + 31) / 32 * 32;
  for (int64_t k = 0; k < filled; k += kStep) {
    const int64_t width = std::clamp<int64_t>(in_features - k, 0, kStep);
    for (int64_t half = 0; half < kGemmRows; half += 8) {
      __m256i in[8];
      for (int64_t i = 0; i < 8; ++i) {
        const uint16_t* row = rows + (half + i) * stride + k;
        if (half + i >= count || width == 0) {
          in[i] = _mm256_setzero_si256();
        } else if (width == kStep) {
          in[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
        } else {
          uint16_t rest[kStep] = {};
          std::copy_n(row, width, rest);
          in[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rest));
        }
      }
      transpose8(in, panel + k / 2 * kGemmRows + half, kGemmRows);
    }
  }
}

}  // namespace

const GemmKernel kGemmAvx2{&run, kOutputs, kOutputs / 2};
const GemmPack kGemmPackAvx2 = &pack;

}  // namespace depthprune
#else
namespace depthprune {
const GemmKernel kGemmAvx2{};
const GemmPack kGemmPackAvx2 = nullptr;
}  // namespace depthprune
#endif
