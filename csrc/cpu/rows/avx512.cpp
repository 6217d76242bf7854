// linear with AVX-512: weights widened to float32 in registers.
#include "cpu/rows/rows.h"
#include "cpu/simd/level.h"

#if DEPTHPRUNE_HAS_LEVELS
// GCC 12 reports its own headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))

namespace depthprune {
namespace {

#include "cpu/rows/loops.inc"
#include "cpu/rows/reduce512.inc"
#include "cpu/rows/store128.inc"

struct Two {
  __m512 first;
  __m512 second;
};

// Half formats: 32 elements a step in two registers.
struct Halves : Lanes16 {
  using Packed = float;
  static constexpr bool kAsStored = false;
  static constexpr int kStep = 32;
  static constexpr int kTokens = 4;  // 16 sums, 8 inputs and 2 weights of 32 registers
  static constexpr int kStreamed = 4;
  static constexpr int64_t kAhead = 2048;
  using Weight = Two;
  using Input = Two;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Input input(const float* x) {
    return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
  }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Sum add(Sum sum, Weight weight, Input input) {
    return _mm512_fmadd_ps(weight.second, input.second, _mm512_fmadd_ps(weight.first, input.first, sum));
  }
};

struct Bf16 : Halves, Store4<BFloat16> {
  using Format = BFloat16;
  static constexpr bool kPaired = true;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Weight load(const uint16_t* weight) {
    const __m512i pairs = _mm512_loadu_si512(weight);
    const __m512i odd = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(odd)};
  }
};

struct Fp16 : Halves, Store4<Float16> {
  using Format = Float16;
  static constexpr bool kPaired = false;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Weight load(const uint16_t* weight) {
    const auto* halves = reinterpret_cast<const __m256i*>(weight);
    return {_mm512_cvtph_ps(_mm256_loadu_si256(halves)), _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1))};
  }
};

struct Fp32 : Lanes16, Store4<Float32> {
  using Format = Float32;
  using Packed = float;
  static constexpr bool kAsStored = true;
  static constexpr bool kPaired = false;
  static constexpr int kStep = 16;
  static constexpr int kTokens = 6;  // 24 sums, 6 inputs and a weight of 32 registers
  static constexpr int kStreamed = 4;
  static constexpr int64_t kAhead = 2048;
  using Weight = __m512;
  using Input = __m512;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Weight load(const float* weight) { return _mm512_loadu_ps(weight); }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Input input(const float* x) { return _mm512_loadu_ps(x); }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Sum add(Sum sum, Weight weight, Input input) {
    return _mm512_fmadd_ps(weight, input, sum);
  }
};

}  // namespace

const LinearKernel kLinearAvx512[3] = {kernel<Bf16>(), kernel<Fp16>(), kernel<Fp32>()};

}  // namespace depthprune
#else
namespace depthprune {
const LinearKernel kLinearAvx512[3]{};
}  // namespace depthprune
#endif
