// gemm in AMX tiles: 32 tokens x 32 outputs, four tiles of sums (gated: 16 gates and their ups). Subnormals count as zero.
#include "cpu/features.h"
#include "cpu/gemm.h"

#if DEPTHPRUNE_HAS_LEVELS
// GCC 12 reports its own headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "cpu/amx.h"
#include "cpu/simd.h"

#define DEPTHPRUNE_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))

namespace depthprune {
namespace {

#include "cpu/transpose16.h"

#include "cpu/gemm_panel.h"

constexpr int kVectors = 2;
constexpr int kStep = 32;  // elements of K a tile

// Tiles: 0 1 2 3 sums, 4 5 tokens, 6 7 weights.
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_step(const uint16_t* x, int64_t x_bytes, const uint32_t* panel) {
  constexpr int64_t panel_bytes = kVectors * 64;
  _tile_loadd(6, panel, panel_bytes);
  _tile_loadd(4, x, x_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, panel + 16, panel_bytes);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, reinterpret_cast<const char*>(x) + 16 * x_bytes, x_bytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

template <bool gated>
DEPTHPRUNE_TARGET void block(const Gemm& gemm, const uint32_t* panel, int64_t first, int64_t token) {
  const uint16_t* x = gemm.x + token * gemm.x_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t whole = gemm.in_features / kStep * kStep;
  for (int64_t k = 0; k < whole; k += kStep) add_step(x + k, gemm.x_stride * 2, panel + k / 2 * kVectors * 16);
  if (whole < gemm.in_features) {
    uint16_t rest[kGemmTokens][kStep] = {};
    for (int64_t t = 0; t < kGemmTokens; ++t) {
      std::memcpy(rest[t], x + t * gemm.x_stride + whole, (gemm.in_features - whole) * sizeof(uint16_t));
    }
    amx::settle();
    add_step(rest[0], kStep * 2, panel + whole / 2 * kVectors * 16);
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
    finish<kVectors, gated>(gemm, first, token + t, both);
  }
}

template <bool gated>
DEPTHPRUNE_TARGET void blocks(const Gemm& gemm, const uint32_t* panel, int64_t first, int64_t begin, int64_t end) {
  amx::configure();
  for (; begin + kGemmTokens <= end; begin += kGemmTokens) block<gated>(gemm, panel, first, begin);
  // The last tokens together with some before them, which get the same values again.
  if (begin < end) block<gated>(gemm, panel, first, end - kGemmTokens);
  _tile_release();
}

void pack(const Gemm& gemm, int64_t first, uint32_t* panel) { pack_panel<kVectors>(gemm, first, panel); }

void run(const Gemm& gemm, const uint32_t* panel, int64_t first, int64_t begin, int64_t end) {
  gemm.gated ? blocks<true>(gemm, panel, first, begin, end) : blocks<false>(gemm, panel, first, begin, end);
}

}  // namespace

const GemmKernel kGemmAmx{kVectors * 16, kVectors * 8, kVectors * 64, &pack, &run};

}  // namespace depthprune
#else
namespace depthprune {
const GemmKernel kGemmAmx{};
}  // namespace depthprune
#endif
