// gemm in AMX tiles: 32 tokens x 32 outputs, four tiles of sums (gated: 16 gates and their ups). Subnormals count as
// zero.
#include "cpu/panels/panels.h"
#include "cpu/simd/level.h"

#if DEPTHPRUNE_HAS_LEVELS
// GCC 12 reports its own headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "cpu/simd/amx.h"
#include "cpu/simd/clones.h"

#define DEPTHPRUNE_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))

namespace depthprune {
namespace {

#include "cpu/panels/epilogue.inc"

constexpr int kVectors = 2;
constexpr int kStep = 32;  // elements of K a tile

// Two panels: of neighbouring outputs, or of gates and their ups.
struct Panels {
  const uint32_t* left;
  const uint32_t* right;
};

// Tiles: 0 1 2 3 sums, 4 5 tokens, 6 7 weights.
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_step(const uint16_t* x, int64_t x_bytes, const Panels& panels, int64_t k) {
  _tile_loadd(6, panels.left + k / 2 * kGemmRows, 64);
  _tile_loadd(4, x, x_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, panels.right + k / 2 * kGemmRows, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, reinterpret_cast<const char*>(x) + 16 * x_bytes, x_bytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

template <bool gated>
DEPTHPRUNE_TARGET void block(const Gemm& gemm, const Panels& panels, int64_t first, int64_t last, int64_t token) {
  const uint16_t* x = gemm.x + token * gemm.x_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t whole = gemm.in_features / kStep * kStep;
  for (int64_t k = 0; k < whole; k += kStep) add_step(x + k, gemm.x_stride * 2, panels, k);
  if (whole < gemm.in_features) {
    uint16_t rest[kGemmTokens][kStep] = {};
    for (int64_t t = 0; t < kGemmTokens; ++t) {
      std::memcpy(rest[t], x + t * gemm.x_stride + whole, (gemm.in_features - whole) * sizeof(uint16_t));
    }
    amx::settle();
    add_step(rest[0], kStep * 2, panels, whole);
    amx::settle();
  }
  alignas(64) float sums[kGemmTokens][kVectors * 16];
  constexpr int64_t row_bytes = kVectors * 64;
  _tile_stored(0, &sums[0][0], row_bytes);
  _tile_stored(1, &sums[0][16], row_bytes);
  _tile_stored(2, &sums[16][0], row_bytes);
  _tile_stored(3, &sums[16][16], row_bytes);
  amx::settle();
  for (int64_t t = 0; t < kGemmTokens; ++t) {
    const __m512 both[kVectors] = {_mm512_load_ps(&sums[t][0]), _mm512_load_ps(&sums[t][16])};
    finish<kVectors, gated>(gemm, first, last, token + t, both);
  }
}

template <bool gated>
DEPTHPRUNE_TARGET void blocks(
    const Gemm& gemm, const uint32_t* panels, const uint32_t* ups, int64_t first, int64_t last, int64_t begin,
    int64_t end) {
  const int64_t words = gemm.panel_words();
  constexpr int64_t step = (gated ? 1 : 2) * kGemmRows;
  amx::configure();
  for (; first < last; first += step, panels += step / kGemmRows * words, ups += gated ? words : 0) {
    // A last panel without a neighbour is its own; what it gives a second time is not stored.
    const Panels both{panels, gated ? ups : last - first > kGemmRows ? panels + words : panels};
    int64_t token = begin;
    for (; token + kGemmTokens <= end; token += kGemmTokens) block<gated>(gemm, both, first, last, token);
    // The last tokens together with some before them, which get the same values again.
    if (token < end) block<gated>(gemm, both, first, last, end - kGemmTokens);
  }
  _tile_release();
}

void run(
    const Gemm& gemm, const uint32_t* panels, const uint32_t* ups, int64_t first, int64_t last, int64_t begin,
    int64_t end) {
  gemm.gated ? blocks<true>(gemm, panels, ups, first, last, begin, end)
             : blocks<false>(gemm, panels, ups, first, last, begin, end);
}

}  // namespace

const GemmKernel kGemmAmx{&run, 2 * kGemmRows, kGemmRows};

}  // namespace depthprune
#else
namespace depthprune {
const GemmKernel kGemmAmx{};
}  // namespace depthprune
#endif
