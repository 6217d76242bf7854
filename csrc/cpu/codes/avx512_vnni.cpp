// quantized_linear with AVX-512 VNNI: a lane is a row, vpdpbusd adds four products to it.
#include "cpu/codes/codes.h"
#include "cpu/simd/level.h"

#if DEPTHPRUNE_HAS_LEVELS
// GCC 12 reports its own headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace depthprune {
namespace {

constexpr int64_t kPassBytes = 512 << 10;

#include "cpu/codes/loops.inc"
#include "cpu/simd/narrow512.inc"

struct Vnni {
  static constexpr bool kNarrows = true;
  static constexpr int kRegisters = 1;
  static constexpr int kPanels = 2;
  static constexpr int kTokens = 6;  // 12 integer and 12 float sums of 32 registers
  static constexpr int kStreamed = 8;
  // A core has few first-level misses to wait for memory with, which 8-bit weights and several tokens run out of.
  template <int bits, int S>
  static constexpr bool kSecondLevel = bits == 8 || S > 4;
  template <int bits, int S>
  static constexpr int64_t kAhead = bits == 8 && S <= 2 ? 2048 : 4096;
  using Int = __m512i;
  using Float = __m512;
  using Scales = __m512;

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m512i broadcast(const char* inputs) {
    int32_t four;
    std::memcpy(&four, inputs, 4);
    return _mm512_set1_epi32(four);
  }

  template <int bits>
  struct Codes;

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void zero(Float (&total)[1]) { total[0] = _mm512_setzero_ps(); }

  template <int bits, bool symmetric>
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void start(int32_t minus, const uint8_t* zeros, Int (&sum)[1]) {
    if constexpr (symmetric) {
      sum[0] = _mm512_set1_epi32(minus);
    } else {
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
      sum[0] = _mm512_mullo_epi32(wide, _mm512_set1_epi32(minus));
    }
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Scales scales(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_run(const Int (&sum)[1], float x_scale, Float (&group)[1]) {
    group[0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[0]), _mm512_set1_ps(x_scale), group[0]);
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_group(const Float (&group)[1], Scales scales, Float (&total)[1]) {
    total[0] = _mm512_fmadd_ps(group[0], scales, total[0]);
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_alone(
      const Int (&sum)[1], float x_scale, Scales scales, Float (&total)[1]) {
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[0]), _mm512_set1_ps(x_scale));
    total[0] = _mm512_fmadd_ps(scaled, scales, total[0]);
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store(const Float (&total)[1], float* rows) {
    _mm512_store_ps(rows, total[0]);
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void narrow(const Float (&total)[1], uint16_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow16(total[0]));
  }
};

template <>
struct Vnni::Codes<8> {
  __m512i codes;
  DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void load(const uint8_t* from) { codes = _mm512_loadu_si512(from); }
  DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add(const char* inputs, __m512i (&sum)[1]) const {
    sum[0] = _mm512_dpbusd_epi32(sum[0], codes, broadcast(inputs));
  }
};

template <>
struct Vnni::Codes<4> {
  __m512i low, high;
  DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void load(const uint8_t* from) {
    const __m512i pairs = _mm512_loadu_si512(from);
    const __m512i mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(pairs, mask);
    high = _mm512_and_si512(_mm512_srli_epi32(pairs, 4), mask);
  }
  DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add(const char* inputs, __m512i (&sum)[1]) const {
    sum[0] = _mm512_dpbusd_epi32(sum[0], low, broadcast(inputs));
    sum[0] = _mm512_dpbusd_epi32(sum[0], high, broadcast(inputs + 4));
  }
};

}  // namespace

void quantized_panels_avx512_vnni(const QuantizedLinear& linear, int64_t begin, int64_t end) {
  panels_any<Vnni>(linear, begin, end);
}

}  // namespace depthprune
#else
namespace depthprune {
void quantized_panels_avx512_vnni(const QuantizedLinear& linear, int64_t begin, int64_t end) {
  quantized_panels_generic(linear, begin, end);
}
}  // namespace depthprune
#endif
