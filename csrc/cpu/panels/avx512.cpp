// gemm with AVX-512 but without its BF16 (widened.inc), and panels packed. A panel of 16 outputs meets 12 tokens at a
// time: 24 registers of sums, those of even and of odd columns apart, or one token would be a chain of additions that
// memory outruns. torch, held to the same instructions, takes 2.6 to 2.8 times as long for 512 tokens and 1.14 to 2.4
// times for 1 (two threads of a Zen 4, rows in benchmarks/results/linear_cpu.csv).
#include "cpu/panels/panels.h"
#include "cpu/simd/level.h"

#if DEPTHPRUNE_HAS_LEVELS
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 reports its own headers (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "cpu/simd/clones.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/formats.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))

namespace depthprune {
namespace {

#include "cpu/simd/narrow512.inc"
#include "cpu/simd/transpose16.inc"

constexpr int kTokens = 12;

#include "cpu/panels/widened.inc"

template <int S>
DEPTHPRUNE_TARGET void block(
    const uint32_t* panel, int64_t in_features, const float* x, int64_t x_stride, const Ahead& ahead,
    float (*out)[kGemmRows]) {
  __m512 even[S], odd[S];
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s) even[s] = odd[s] = _mm512_setzero_ps();
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t k = 0; k < in_features; k += 2, panel += kGemmRows) {
    ahead.ask(k / 2);
    const __m512i pairs = _mm512_loadu_si512(panel);
    const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(pairs, mask));
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
      const float* input = x + s * x_stride + k;
      even[s] = _mm512_fmadd_ps(low, _mm512_set1_ps(input[0]), even[s]);
      odd[s] = _mm512_fmadd_ps(high, _mm512_set1_ps(input[1]), odd[s]);
    }
  }
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s) _mm512_storeu_ps(out[s], _mm512_add_ps(even[s], odd[s]));
}

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m256i rounded16(const float (&sums)[kGemmRows]) {
  return narrow16(_mm512_loadu_ps(sums));
}

DEPTHPRUNE_TARGET void pack(const uint16_t* rows, int64_t stride, int64_t count, int64_t in_features, uint32_t* panel) {
  for (int64_t k = 0; k < in_features; k += 32) {
    const int64_t width = in_features - k;
    const __mmask32 mask = width >= 32 ? 0xffffffffu : (1u << width) - 1u;
    __m512i in[kGemmRows];
#pragma GCC unroll 16
    for (int i = 0; i < kGemmRows; ++i) {
      in[i] = i < count ? _mm512_maskz_loadu_epi16(mask, rows + i * stride + k) : _mm512_setzero_si512();
    }
    transpose16(in, panel + k / 2 * kGemmRows, kGemmRows);
  }
}

}  // namespace

const GemmKernel kGemmAvx512{&run, kOutputs, kOutputs / 2};
const GemmPack kGemmPackAvx512 = &pack;

}  // namespace depthprune
#else
namespace depthprune {
const GemmKernel kGemmAvx512{};
const GemmPack kGemmPackAvx512 = nullptr;
}  // namespace depthprune
#endif
