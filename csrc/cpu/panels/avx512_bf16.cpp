// gemm with vdpbf16ps: lane i adds w_2k,i x_2k and w_2k+1,i x_2k+1. It reads subnormals as zero.
//
// Up to 16 tokens take one panel at a time (gated: one of gates, one of ups), which is one stretch of memory. More
// share 24 registers of sums: 8 tokens x 48 outputs, gated 6 tokens x 32 gates and ups. Two threads of a Zen 4 read
// weights in slow memory at 106 % of a plain read for 1 token and at 93 % for 8, where the kernels of rows/ reach 95 %
// and 55 %; at 512 tokens they do 1.05 times what torch does (medians of nine projections in
// benchmarks/results/linear_cpu.csv).
#include "cpu/panels/panels.h"
#include "cpu/simd/level.h"

#if DEPTHPRUNE_HAS_LEVELS
// GCC 12 reports its own headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/simd/clones.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace depthprune {
namespace {

#include "cpu/panels/epilogue.inc"

constexpr int kStreamedTokens = 16;
constexpr int64_t kPage = 4096, kLine = 64;  // bytes: of all sets of a first-level cache, of a line
constexpr int64_t kLines = 8;                // of a set
// Bytes from a streamed register to what is asked for, and into which level of caches: by measurement.
constexpr int64_t ahead_of(int tokens) { return tokens == 1 ? 2048 : 4096; }
constexpr auto level_of(int tokens) { return tokens == 1 || tokens > 4 ? _MM_HINT_T1 : _MM_HINT_T0; }
constexpr int kVectors = 3;
constexpr int kTokens = 8;
constexpr int kGatedVectors = 4;
constexpr int kGatedTokens = 6;

struct Place {
  const uint32_t* panels;  // of the first output
  const uint32_t* ups;
  int64_t words;  // of a panel
};

template <int V, int S, bool stream>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_pair(
    const uint32_t* const (&panels)[V], int64_t k, const uint16_t* x, int64_t x_stride, __m512 (&sums)[S][V]) {
  __m512bh columns[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const uint32_t* from = panels[v] + k * kGemmRows;
    if constexpr (stream) _mm_prefetch(reinterpret_cast<const char*>(from) + ahead_of(S), level_of(S));
    columns[v] = (__m512bh)_mm512_loadu_si512(from);
  }
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s) {
    int32_t pair;
    std::memcpy(&pair, x + s * x_stride, sizeof(pair));
    const __m512bh input = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[s][v] = _mm512_dpbf16_ps(sums[s][v], columns[v], input);
  }
}

template <int V, bool gated, int S, bool stream>
DEPTHPRUNE_TARGET void block(const Gemm& gemm, const Place& place, int64_t first, int64_t last, int64_t token) {
  const uint16_t* x = gemm.x + token * gemm.x_stride;
  const uint32_t* panels[V];
  __m512 sums[S][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    constexpr int half = V / 2;
    panels[v] = gated && v >= half ? place.ups + (v - half) * place.words : place.panels + v * place.words;
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) sums[s][v] = _mm512_setzero_ps();
  }
  const int64_t whole = gemm.in_features / 2;
  for (int64_t k = 0; k < whole; ++k) add_pair<V, S, stream>(panels, k, x + 2 * k, gemm.x_stride, sums);
  if (gemm.in_features % 2 != 0) {
    uint16_t last[S][2];
    for (int s = 0; s < S; ++s) {
      last[s][0] = x[s * gemm.x_stride + 2 * whole];
      last[s][1] = 0;
    }
    add_pair<V, S, stream>(panels, whole, last[0], 2, sums);
  }
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s) finish<V, gated>(gemm, first, last, token + s, sums[s]);
}

template <int V, bool gated, int S, bool stream>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void last_tokens(
    const Gemm& gemm, const Place& place, int64_t first, int64_t last, int64_t token, int64_t end) {
  if constexpr (S > 0) {
    if (end - token < S) return last_tokens<V, gated, S - 1, stream>(gemm, place, first, last, token, end);
    block<V, gated, S, stream>(gemm, place, first, last, token);
  }
}

// V panels (gated: V / 2 of either kind) against all tokens.
template <int V, bool gated, int S, bool stream>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void all_tokens(
    const Gemm& gemm, const Place& place, int64_t first, int64_t last, int64_t begin, int64_t end) {
  for (; begin + S <= end; begin += S) block<V, gated, S, stream>(gemm, place, first, last, begin);
  last_tokens<V, gated, S - 1, stream>(gemm, place, first, last, begin, end);
}

// Outputs [first, last), as many panels at a time as `V` says, then one by one.
template <int V, bool gated, int S, bool stream>
DEPTHPRUNE_TARGET void outputs(const Gemm& gemm, Place place, int64_t first, int64_t last, int64_t begin, int64_t end) {
  constexpr int one = gated ? 2 : 1;
  constexpr int64_t step = V / one * kGemmRows;
  const auto advance = [&](int64_t panels) {
    place.panels += panels * place.words;
    if (gated) place.ups += panels * place.words;
  };
  for (; last - first > step - kGemmRows; first += step, advance(V / one)) {
    all_tokens<V, gated, S, stream>(gemm, place, first, last, begin, end);
  }
  if constexpr (V > one) {
    for (; first < last; first += kGemmRows, advance(1)) {
      all_tokens<one, gated, S, stream>(gemm, place, first, last, begin, end);
    }
  }
}

// More tokens than a cache set has lines, a multiple of a page apart: none of them would stay in the first level.
bool collides(const Gemm& gemm) { return gemm.tokens > kLines && gemm.x_stride * 2 % kPage == 0; }

void run(
    const Gemm& gemm, const uint32_t* panels, const uint32_t* ups, int64_t first, int64_t last, int64_t begin,
    int64_t end);

// All tokens with their inputs copied, each a cache line further from the one before.
void run_apart(Gemm gemm, const uint32_t* panels, const uint32_t* ups, int64_t first, int64_t last) {
  thread_local std::vector<uint16_t> apart;
  const int64_t stride = gemm.in_features + kLine / 2;
  apart.resize(std::max<size_t>(apart.size(), gemm.tokens * stride));
  for (int64_t t = 0; t < gemm.tokens; ++t) {
    std::memcpy(apart.data() + t * stride, gemm.x + t * gemm.x_stride, gemm.in_features * 2);
  }
  gemm.x = apart.data();
  gemm.x_stride = stride;
  run(gemm, panels, ups, first, last, 0, gemm.tokens);
}

void run(
    const Gemm& gemm, const uint32_t* panels, const uint32_t* ups, int64_t first, int64_t last, int64_t begin,
    int64_t end) {
  const Place place{panels, ups, gemm.panel_words()};
  if (end - begin <= kStreamedTokens) {
    if (gemm.tokens == end - begin && !gemm.gated && collides(gemm)) return run_apart(gemm, panels, ups, first, last);
    gemm.gated ? outputs<2, true, kStreamedTokens / 2, true>(gemm, place, first, last, begin, end)
               : outputs<1, false, kStreamedTokens, true>(gemm, place, first, last, begin, end);
  } else {
    gemm.gated ? outputs<kGatedVectors, true, kGatedTokens, false>(gemm, place, first, last, begin, end)
               : outputs<kVectors, false, kTokens, false>(gemm, place, first, last, begin, end);
  }
}

}  // namespace

const GemmKernel kGemmAvx512Bf16{&run, kVectors * kGemmRows, kGatedVectors / 2 * kGemmRows};

}  // namespace depthprune
#else
namespace depthprune {
const GemmKernel kGemmAvx512Bf16{};
}  // namespace depthprune
#endif
