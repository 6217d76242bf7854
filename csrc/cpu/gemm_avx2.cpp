// gemm with AVX2 and FMA: weights are widened to float32 in registers, inputs beforehand. torch has no blocked bfloat16
// product for processors without AVX-512: at 512 tokens it takes 5.6 to 6.8 times as long (two threads of a Zen 3, rows in
// benchmarks/results/linear_cpu.csv).
//
// A panel of 16 outputs meets 6 tokens at a time: 12 registers of sums, 2 of weights, 1 of inputs and the mask.
#include "cpu/features.h"
#include "cpu/gemm.h"

#if DEPTHPRUNE_HAS_LEVELS
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "cpu/exp.h"
#include "cpu/linear.h"
#include "cpu/simd.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c")))

namespace depthprune {
namespace {

#include "cpu/narrow256.h"

constexpr int kTokens = 6;
constexpr int64_t kAhead = 4096;          // bytes from a streamed register to what is asked for
constexpr int64_t kMostShares = 4;        // of a panel that is asked for by the blocks before it
constexpr int64_t kInputBytes = 1 << 20;  // of widened inputs at a time, for the second-level cache
constexpr int64_t kOutputs = 96;          // that share them where panels are packed as they are needed

// Widened inputs; a row is a line longer than a multiple of 32 elements: rows a page apart would meet in the same sets.
struct Inputs {
  const float* rows;
  int64_t stride;
};

DEPTHPRUNE_TARGET Inputs widened(const Gemm& gemm, int64_t begin, int64_t end) {
  thread_local std::vector<float> memory;
  const int64_t stride = (gemm.in_features + 31) / 32 * 32 + 16;
  memory.resize(std::max<size_t>(memory.size(), (end - begin) * stride));
  for (int64_t t = begin; t < end; ++t) {
    const uint16_t* x = gemm.x + t * gemm.x_stride;
    float* to = memory.data() + (t - begin) * stride;
    int64_t k = 0;
    for (; k + 8 <= gemm.in_features; k += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k));
      _mm256_storeu_ps(to + k, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
    }
    for (; k < gemm.in_features; ++k) to[k] = BFloat16::widen(x[k]);
    to[k] = 0.0f;  // an odd one's neighbour
  }
  return {memory.data(), stride};
}

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

// What a block asks memory for while it multiplies: a line from `first` on with every 2^shift lines of its panel.
struct Ahead {
  const char* first;
  int shift;
  DEPTHPRUNE_INLINE void ask(int64_t line) const { DEPTHPRUNE_PREFETCH_L2(first + (line >> shift) * 64); }
};

// sums_sr = sum_k w_rk x_sk of S tokens and the 16 rows of a panel.
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

template <int S = kTokens>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void any_block(
    int64_t tokens, const uint32_t* panel, int64_t in_features, const float* x, int64_t x_stride, const Ahead& ahead,
    float (*out)[kGemmRows]) {
  if constexpr (S > 1) {
    if (tokens < S) return any_block<S - 1>(tokens, panel, in_features, x, x_stride, ahead, out);
  }
  block<S>(panel, in_features, x, x_stride, ahead, out);
}

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_bias(float (&sums)[kGemmRows], const uint16_t* bias, int64_t count) {
  for (int64_t r = 0; r < count; ++r) sums[r] += BFloat16::widen(bias[r]);
}

// What follows a token's sums, to its outputs [n, n + count).
template <bool gated>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void finish(
    const Gemm& gemm, int64_t token, int64_t n, int64_t count, float (&sums)[kGemmRows], float (&ups)[kGemmRows]) {
  if (gemm.bias != nullptr) {
    add_bias(sums, gemm.bias + n, count);
    if constexpr (gated) add_bias(ups, gemm.bias + gemm.out_features + n, count);
  }
  if constexpr (gated) {
#pragma omp simd
    for (int r = 0; r < kGemmRows; ++r) sums[r] = sums[r] / (1.0f + fast_exp(-sums[r])) * ups[r];
  }
  const __m256i rounded = narrow16(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8));
  uint16_t* out = gemm.out + token * gemm.out_features + n;
  if (count == kGemmRows) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded);
    return;
  }
  uint16_t some[kGemmRows];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(some), rounded);
  std::copy_n(some, count, out);
}

// Outputs [first, last) of tokens [begin, end).
template <bool gated>
DEPTHPRUNE_TARGET void run_tokens(
    const Gemm& gemm, const uint32_t* panels, const uint32_t* ups, int64_t first, int64_t last, int64_t begin,
    int64_t end) {
  const Inputs x = widened(gemm, begin, end);
  const int64_t words = gemm.panel_words(), features = gemm.in_features;
  const int64_t blocks = (end - begin + kTokens - 1) / kTokens;
  const int shift = blocks == 1 ? 0 : blocks == 2 ? 1 : 2;
  // One block runs along a stream; of several, each asks for a share of the next panel.
  const auto ahead = [&](const uint32_t* panel, int64_t i) {
    const char* from = reinterpret_cast<const char*>(panel);
    if (blocks == 1) return Ahead{from + kAhead, shift};
    const int64_t bytes = words * 4;
    return Ahead{from + bytes + (bytes >> shift) * std::min(i, kMostShares - 1), shift};
  };
  for (int64_t n = first; n < last; n += kGemmRows, panels += words, ups += gated ? words : 0) {
    const int64_t count = std::min(kGemmRows, last - n);
    int64_t t = begin;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t tokens = (end - t + blocks - i - 1) / (blocks - i);  // of equal sizes
      const float* rows = x.rows + (t - begin) * x.stride;
      float sums[kTokens][kGemmRows], more[kTokens][kGemmRows];
      any_block(tokens, panels, features, rows, x.stride, ahead(panels, i), sums);
      if constexpr (gated) any_block(tokens, ups, features, rows, x.stride, ahead(ups, i), more);
      for (int64_t s = 0; s < tokens; ++s) finish<gated>(gemm, t + s, n, count, sums[s], more[s]);
      t += tokens;
    }
  }
}

void run(
    const Gemm& gemm, const uint32_t* panels, const uint32_t* ups, int64_t first, int64_t last, int64_t begin,
    int64_t end) {
  const int64_t row_bytes = (gemm.in_features + 48) * static_cast<int64_t>(sizeof(float));
  const int64_t most = std::max<int64_t>(2, kInputBytes / row_bytes / kTokens) * kTokens;
  const auto tokens = gemm.gated ? &run_tokens<true> : &run_tokens<false>;
  for (; begin < end; begin += most) tokens(gemm, panels, ups, first, last, begin, std::min(end, begin + most));
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

DEPTHPRUNE_TARGET void pack(
    const uint16_t* rows, int64_t stride, int64_t count, int64_t in_features, uint32_t* panel) {
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
