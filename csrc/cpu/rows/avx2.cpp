// linear with AVX2, FMA and F16C: weights widened to float32 in registers.
#include "cpu/rows/rows.h"
#include "cpu/simd/level.h"

#if DEPTHPRUNE_HAS_LEVELS
#include <immintrin.h>

#include <cstring>

#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c")))

namespace depthprune {
namespace {

#include "cpu/rows/loops.inc"
#include "cpu/rows/store128.inc"

struct Lanes8 {
  using Sum = __m256;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Sum zero() { return _mm256_setzero_ps(); }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m128 reduce(Sum a, Sum b, Sum c, Sum d) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
};

struct Two {
  __m256 first;
  __m256 second;
};

// Half formats: 16 elements a step in two registers.
struct Halves : Lanes8 {
  using Packed = float;
  static constexpr bool kAsStored = false;
  static constexpr int kStep = 16;
  static constexpr int kTokens = 2;  // 8 sums, 4 inputs and 2 weights of 16 registers
  static constexpr int kStreamed = 4;
  static constexpr int64_t kAhead = 2048;
  using Weight = Two;
  using Input = Two;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Input input(const float* x) {
    return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
  }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Sum add(Sum sum, Weight weight, Input input) {
    return _mm256_fmadd_ps(weight.second, input.second, _mm256_fmadd_ps(weight.first, input.first, sum));
  }
};

struct Bf16 : Halves, Store4<BFloat16> {
  using Format = BFloat16;
  static constexpr bool kPaired = true;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Weight load(const uint16_t* weight) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
    const __m256i odd = _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(odd)};
  }
};

struct Fp16 : Halves, Store4<Float16> {
  using Format = Float16;
  static constexpr bool kPaired = false;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Weight load(const uint16_t* weight) {
    const auto* halves = reinterpret_cast<const __m128i*>(weight);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
};

struct Fp32 : Lanes8, Store4<Float32> {
  using Format = Float32;
  using Packed = float;
  static constexpr bool kAsStored = true;
  static constexpr bool kPaired = false;
  static constexpr int kStep = 8;
  static constexpr int kTokens = 2;  // 8 sums, 2 inputs and a weight of 16 registers
  static constexpr int kStreamed = 4;
  static constexpr int64_t kAhead = 2048;
  using Weight = __m256;
  using Input = __m256;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Weight load(const float* weight) { return _mm256_loadu_ps(weight); }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Input input(const float* x) { return _mm256_loadu_ps(x); }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Sum add(Sum sum, Weight weight, Input input) {
    return _mm256_fmadd_ps(weight, input, sum);
  }
};

}  // namespace

const LinearKernel kLinearAvx2[3] = {kernel<Bf16>(), kernel<Fp16>(), kernel<Fp32>()};

}  // namespace depthprune
#else
namespace depthprune {
const LinearKernel kLinearAvx2[3]{};
}  // namespace depthprune
#endif
