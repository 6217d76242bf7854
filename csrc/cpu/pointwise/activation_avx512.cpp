// silu_mul in bfloat16 with AVX-512; the roundings of activation.cpp.
#include "cpu/pointwise/activation.h"
#include "cpu/simd/level.h"

#if DEPTHPRUNE_HAS_LEVELS
// GCC 12 reports its own headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/simd/clones.h"

#define DEPTHPRUNE_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))

namespace depthprune {
namespace {

#include "cpu/simd/narrow512.inc"
#include "cpu/simd/silu16.inc"

DEPTHPRUNE_TARGET void silu_mul(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const auto lanes = static_cast<__mmask16>(size - i >= 16 ? 0xffffu : (1u << (size - i)) - 1u);
    const __m512 silu = silu16(widen(_mm256_maskz_loadu_epi16(lanes, gate + i)));
    const __m512i kept = _mm512_and_si512(narrow(silu), _mm512_set1_epi32(-65536));
    const __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(kept), widen(_mm256_maskz_loadu_epi16(lanes, up + i)));
    _mm256_mask_storeu_epi16(out + i, lanes, narrow16(product));
  }
}

}  // namespace

void silu_mul_avx512(const void* gate, const void* up, void* out, int64_t size) {
  silu_mul(static_cast<const uint16_t*>(gate), static_cast<const uint16_t*>(up), static_cast<uint16_t*>(out), size);
}

}  // namespace depthprune
#else
#include <cassert>

namespace depthprune {
void silu_mul_avx512(const void*, const void*, void*, int64_t) { assert(false); }
}  // namespace depthprune
#endif
