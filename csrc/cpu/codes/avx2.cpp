// quantized_linear with AVX2: products of bytes summed in pairs of 16 bits, which cannot overflow here.
#include "cpu/codes/codes.h"
#include "cpu/simd/level.h"

#if DEPTHPRUNE_HAS_LEVELS
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c")))

namespace depthprune {
namespace {

constexpr int64_t kPassBytes = 256 << 10;

#include "cpu/codes/loops.inc"
#include "cpu/simd/narrow256.inc"

struct Avx2 {
  static constexpr bool kNarrows = true;
  static constexpr int kRegisters = 2;
  static constexpr int kPanels = 1;
  static constexpr int kTokens = 4;  // 8 integer sums of 16 registers; the float ones wait in memory
  static constexpr int kStreamed = 2;
  template <int bits, int S>
  static constexpr bool kSecondLevel = false;
  template <int bits, int S>
  static constexpr int64_t kAhead = 1024;
  using Int = __m256i;
  using Float = __m256;
  struct Scales {
    __m256 low, high;
  };

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m256i broadcast(const char* inputs) {
    // GCC 12 loads an integer into a general register first.
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(inputs)));
  }

  // a: unsigned, b: signed bytes; both products of a pair fit 16 bits together.
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m256i dot(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
  }

  // Keeps GCC 12 from reading the inputs of all tokens first, which would not leave enough registers for sums.
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void one_by_one(Int (&sum)[2]) {
    asm volatile("" : "+x"(sum[0]), "+x"(sum[1]) : : "memory");
  }

  template <int bits>
  struct Codes;

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void zero(Float (&total)[2]) { total[0] = total[1] = _mm256_setzero_ps(); }

  template <int bits, bool symmetric>
  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void start(int32_t minus, const uint8_t* zeros, Int (&sum)[2]) {
    // 8-bit codes are multiplied as code - 128, see Codes<8>.
    constexpr int offset = bits == 8 ? 128 : 0;
    for (int i = 0; i < 2; ++i) {
      if constexpr (symmetric) {
        sum[i] = _mm256_set1_epi32((minus >> (bits - 1)) * ((1 << (bits - 1)) - offset));
      } else {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * i));
        const __m256i wide = _mm256_sub_epi32(_mm256_cvtepu8_epi32(eight), _mm256_set1_epi32(offset));
        sum[i] = _mm256_mullo_epi32(wide, _mm256_set1_epi32(minus));
      }
    }
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE __m256 widen(const uint16_t* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE Scales scales(const uint16_t* from) {
    return {widen(from), widen(from + 8)};
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_run(const Int (&sum)[2], float x_scale, Float (&group)[2]) {
    const __m256 scale = _mm256_set1_ps(x_scale);
    for (int i = 0; i < 2; ++i) group[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i]), scale, group[i]);
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_group(
      const Float (&group)[2], const Scales& scales, Float (&total)[2]) {
    total[0] = _mm256_fmadd_ps(group[0], scales.low, total[0]);
    total[1] = _mm256_fmadd_ps(group[1], scales.high, total[1]);
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_alone(
      const Int (&sum)[2], float x_scale, const Scales& scales, Float (&total)[2]) {
    const __m256 scale = _mm256_set1_ps(x_scale);
    total[0] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[0]), scale), scales.low, total[0]);
    total[1] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[1]), scale), scales.high, total[1]);
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store(const Float (&total)[2], float* rows) {
    _mm256_storeu_ps(rows, total[0]);
    _mm256_storeu_ps(rows + 8, total[1]);
  }

  static DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void narrow(const Float (&total)[2], uint16_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow16(total[0], total[1]));
  }
};

// code - 128 as its magnitude, at most 128, and its sign, which moves to the input: 2 * 128 * 127 fits 16 bits.
template <>
struct Avx2::Codes<8> {
  __m256i codes[2];
  DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void load(const uint8_t* from) {
    for (int i = 0; i < 2; ++i) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i);
      codes[i] = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(0x80)));
    }
  }
  DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add(const char* inputs, __m256i (&sum)[2]) const {
    const __m256i x = broadcast(inputs);
    for (int i = 0; i < 2; ++i) sum[i] = dot(sum[i], _mm256_abs_epi8(codes[i]), _mm256_sign_epi8(x, codes[i]));
    one_by_one(sum);
  }
};

template <>
struct Avx2::Codes<4> {
  __m256i low[2], high[2];
  DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void load(const uint8_t* from) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i);
      low[i] = _mm256_and_si256(pairs, mask);
      high[i] = _mm256_and_si256(_mm256_srli_epi32(pairs, 4), mask);
    }
  }
  DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add(const char* inputs, __m256i (&sum)[2]) const {
    const __m256i first = broadcast(inputs);
    const __m256i second = broadcast(inputs + 4);
    for (int i = 0; i < 2; ++i) {
      // Four products of 15 * 127 fit 16 bits.
      const __m256i pairs =
          _mm256_add_epi16(_mm256_maddubs_epi16(low[i], first), _mm256_maddubs_epi16(high[i], second));
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    one_by_one(sum);
  }
};

}  // namespace

void quantized_panels_avx2(const QuantizedLinear& linear, int64_t begin, int64_t end) {
  panels_any<Avx2>(linear, begin, end);
}

}  // namespace depthprune
#else
namespace depthprune {
void quantized_panels_avx2(const QuantizedLinear& linear, int64_t begin, int64_t end) {
  quantized_panels_generic(linear, begin, end);
}
}  // namespace depthprune
#endif
