// linear in bfloat16 with vdpbf16ps: lane i adds w_2i x_2i and w_2i+1 x_2i+1. It reads subnormals as zero.
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

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace depthprune {
namespace {

#include "cpu/rows/loops.inc"
#include "cpu/rows/reduce512.inc"
#include "cpu/rows/store128.inc"

struct Pairs : Lanes16, Store4<BFloat16> {
  using Format = BFloat16;
  using Packed = uint16_t;
  static constexpr bool kAsStored = true;
  static constexpr bool kPaired = false;
  static constexpr int kStep = 32;
  static constexpr int kTokens = 6;  // 24 sums, 6 inputs and a weight of 32 registers
  static constexpr int kStreamed = 8;
  static constexpr int64_t kAhead = 2048;
  using Weight = __m512bh;
  using Input = __m512bh;
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Weight load(const uint16_t* weight) {
    return (__m512bh)_mm512_loadu_si512(weight);
  }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Input input(const uint16_t* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Sum add(Sum sum, Weight weight, Input input) {
    return _mm512_dpbf16_ps(sum, weight, input);
  }
};

}  // namespace

const LinearKernel kLinearAvx512Bf16 = kernel<Pairs>();

}  // namespace depthprune
#else
namespace depthprune {
const LinearKernel kLinearAvx512Bf16{};
}  // namespace depthprune
#endif
