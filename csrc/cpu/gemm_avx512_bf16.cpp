// gemm with vdpbf16ps: lane i adds w_2k,i x_2k and w_2k+1,i x_2k+1. It reads subnormals as zero.
//
// 24 registers of sums: 8 tokens x 48 outputs, gated 6 tokens x (32 gates and ups). Measured on one core of a Zen 4 at
// SmolLM2's shapes and 512 tokens: 207-226 of the 233 GFLOP/s that the instruction can do; 12 x 32 gives 198-210.
#include "cpu/features.h"
#include "cpu/gemm.h"

#if DEPTHPRUNE_HAS_LEVELS
// GCC 12 reports its own headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "cpu/simd.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace depthprune {
namespace {

#include "cpu/transpose16.h"

#include "cpu/gemm_panel.h"

constexpr int kVectors = 3;
constexpr int kTokens = 8;
constexpr int kGatedVectors = 4;
constexpr int kGatedTokens = 6;

template <int V, int S>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_pair(
    const uint32_t* weights, const uint16_t* x, int64_t x_stride, __m512 (&sums)[S][V]) {
  __m512bh columns[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(weights + v * 16);
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    int32_t pair;
    std::memcpy(&pair, x + s * x_stride, sizeof(pair));
    const __m512bh input = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[s][v] = _mm512_dpbf16_ps(sums[s][v], columns[v], input);
  }
}

template <int V, bool gated, int S>
DEPTHPRUNE_TARGET void block(const Gemm& gemm, const uint32_t* panel, int64_t first, int64_t token) {
  const uint16_t* x = gemm.x + token * gemm.x_stride;
  __m512 sums[S][V];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[s][v] = _mm512_setzero_ps();
  }
  const int64_t whole = gemm.in_features / 2;
  for (int64_t k = 0; k < whole; ++k) add_pair<V, S>(panel + k * V * 16, x + 2 * k, gemm.x_stride, sums);
  if (gemm.in_features % 2 != 0) {
    uint16_t last[S][2];
    for (int s = 0; s < S; ++s) {
      last[s][0] = x[s * gemm.x_stride + 2 * whole];
      last[s][1] = 0;
    }
    add_pair<V, S>(panel + whole * V * 16, last[0], 2, sums);
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) finish<V, gated>(gemm, first, token + s, sums[s]);
}

template <int V, bool gated, int S>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void last_tokens(
    const Gemm& gemm, const uint32_t* panel, int64_t first, int64_t token, int64_t end) {
  if constexpr (S > 0) {
    if (end - token < S) return last_tokens<V, gated, S - 1>(gemm, panel, first, token, end);
    block<V, gated, S>(gemm, panel, first, token);
  }
}

template <int V, bool gated, int S>
DEPTHPRUNE_TARGET void blocks(const Gemm& gemm, const uint32_t* panel, int64_t first, int64_t begin, int64_t end) {
  for (; begin + S <= end; begin += S) block<V, gated, S>(gemm, panel, first, begin);
  last_tokens<V, gated, S - 1>(gemm, panel, first, begin, end);
}

void pack(const Gemm& gemm, int64_t first, uint32_t* panel) {
  gemm.gated ? pack_panel<kGatedVectors>(gemm, first, panel) : pack_panel<kVectors>(gemm, first, panel);
}

void run(const Gemm& gemm, const uint32_t* panel, int64_t first, int64_t begin, int64_t end) {
  if (gemm.gated) {
    blocks<kGatedVectors, true, kGatedTokens>(gemm, panel, first, begin, end);
  } else {
    blocks<kVectors, false, kTokens>(gemm, panel, first, begin, end);
  }
}

}  // namespace

const GemmKernel kGemmAvx512Bf16{kVectors * 16, kGatedVectors * 8, kGatedVectors * 64, &pack, &run};

}  // namespace depthprune
#else
namespace depthprune {
const GemmKernel kGemmAvx512Bf16{};
}  // namespace depthprune
#endif
