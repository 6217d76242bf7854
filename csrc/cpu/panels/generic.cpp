// gemm in plain code: for levels that a test or a benchmark forces; models are laid out in panels only where better
// kernels are.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/panels/panels.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"
#include "cpu/simd/level.h"

namespace depthprune {
namespace {

DEPTHPRUNE_INLINE void sum_panel(const Gemm& gemm, const uint32_t* panel, const uint16_t* x, float* sums) {
  for (int r = 0; r < kGemmRows; ++r) sums[r] = 0.0f;
  for (int64_t k = 0; k < gemm.in_features; ++k) {
    const float input = BFloat16::widen(x[k]);
    const uint32_t* pairs = panel + k / 2 * kGemmRows;
    const int shift = k % 2 * 16;
#pragma omp simd
    for (int r = 0; r < kGemmRows; ++r) {
      sums[r] += BFloat16::widen(static_cast<uint16_t>(pairs[r] >> shift)) * input;
    }
  }
}

DEPTHPRUNE_CLONES void run(
    const Gemm& gemm, const uint32_t* panels, const uint32_t* ups, int64_t first, int64_t last, int64_t begin,
    int64_t end) {
  const int64_t words = gemm.panel_words();
  for (int64_t n = first; n < last; n += kGemmRows, panels += words, ups += gemm.gated ? words : 0) {
    const int64_t count = std::min(kGemmRows, last - n);
    for (int64_t t = begin; t < end; ++t) {
      const uint16_t* x = gemm.x + t * gemm.x_stride;
      float sums[kGemmRows], more[kGemmRows];
      sum_panel(gemm, panels, x, sums);
      if (gemm.gated) sum_panel(gemm, ups, x, more);
      for (int64_t r = 0; r < count; ++r) {
        float value = sums[r] + (gemm.bias == nullptr ? 0.0f : BFloat16::widen(gemm.bias[n + r]));
        if (gemm.gated) {
          const float up =
              more[r] + (gemm.bias == nullptr ? 0.0f : BFloat16::widen(gemm.bias[gemm.out_features + n + r]));
          value = value / (1.0f + std::exp(-value)) * up;
        }
        gemm.out[t * gemm.out_features + n + r] = BFloat16::narrow(value);
      }
    }
  }
}

}  // namespace

const GemmKernel kGemmGeneric{&run, kGemmRows, kGemmRows};

void pack_panel(const uint16_t* rows, int64_t stride, int64_t count, int64_t in_features, uint32_t* panel) {
  if (level() >= Level::avx512) return kGemmPackAvx512(rows, stride, count, in_features, panel);
  if (has_gemm()) return kGemmPackAvx2(rows, stride, count, in_features, panel);
  std::memset(panel, 0, (in_features + 31) / 32 * 16 * kGemmRows * sizeof(uint32_t));
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t k = 0; k < in_features; ++k) {
      panel[k / 2 * kGemmRows + r] |= static_cast<uint32_t>(rows[r * stride + k]) << (k % 2 * 16);
    }
  }
}

}  // namespace depthprune
