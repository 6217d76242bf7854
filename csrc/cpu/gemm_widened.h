// gemm by widening bfloat16 to float32, weights in registers and inputs beforehand; included by gemm_<level>.cpp inside a
// namespace of its own, after DEPTHPRUNE_TARGET, like linear_kernel.h. Before it: kTokens, the most tokens that a panel
// meets at a time. After it:
//   template <int S> block(...)   the sums of S tokens
//   rounded16(sums)               16 of them in bfloat16
// and run(), which they serve.

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
    float (*out)[kGemmRows]);

DEPTHPRUNE_TARGET __m256i rounded16(const float (&sums)[kGemmRows]);

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
  const __m256i rounded = rounded16(sums);
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
