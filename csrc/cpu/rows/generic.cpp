// linear in vectors of four floats, which every 64-bit x86 and ARM has; the compiler's own vector types, no intrinsics.
#include <cstring>

#include "cpu/rows/rows.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define DEPTHPRUNE_TARGET

namespace depthprune {
namespace {

#include "cpu/rows/loops.inc"

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));  // NOLINT

template <typename Vector>
DEPTHPRUNE_INLINE Vector read(const void* address) {
  Vector out;
  std::memcpy(&out, address, sizeof(out));
  return out;
}

struct Lanes4 {
  using Sum = Floats;
  static constexpr int kTokens = 2;  // half formats: 8 sums, 4 inputs and 2 weights of 16 registers
  static constexpr int kStreamed = 4;
  static constexpr int64_t kAhead = 2048;
  static DEPTHPRUNE_INLINE Sum zero() { return Sum{}; }
  static DEPTHPRUNE_INLINE float total(Sum sum) { return (sum[0] + sum[2]) + (sum[1] + sum[3]); }
  static DEPTHPRUNE_INLINE Floats reduce(Sum a, Sum b, Sum c, Sum d) {
    return Floats{total(a), total(b), total(c), total(d)};
  }
};

template <typename Format>
struct Store4 {
  using T = typename Format::storage;
  static DEPTHPRUNE_INLINE void store4(Floats totals, const T* bias, T* out) {
    for (int i = 0; i < 4; ++i) {
      out[i] = Format::narrow(bias == nullptr ? totals[i] : totals[i] + Format::widen(bias[i]));
    }
  }
};

struct Two {
  Floats first;
  Floats second;
};

// Half formats: a 32-bit lane holds an even element and, above it, an odd one.
struct Halves : Lanes4 {
  using Packed = float;
  static constexpr bool kAsStored = false;
  static constexpr bool kPaired = true;
  static constexpr int kStep = 8;
  using Weight = Two;
  using Input = Two;
  static DEPTHPRUNE_INLINE Input input(const float* x) { return {read<Floats>(x), read<Floats>(x + 4)}; }
  static DEPTHPRUNE_INLINE Sum add(Sum sum, Weight weight, Input input) {
    sum += weight.first * input.first;
    return sum + weight.second * input.second;
  }
};

struct Bf16 : Halves, Store4<BFloat16> {
  using Format = BFloat16;
  static DEPTHPRUNE_INLINE Weight load(const uint16_t* weight) {
    const Ints pairs = read<Ints>(weight);
    return {(Floats)(pairs << 16), (Floats)(pairs & ~0xffff)};
  }
};

struct Fp16 : Halves, Store4<Float16> {
  using Format = Float16;
  // Float16::widen of the low half of every lane.
  static DEPTHPRUNE_INLINE Floats widen(Ints half) {
    const Ints magnitude = (half & 0x7fff) << 13;
    const Ints finite = (Ints)((Floats)magnitude * 0x1p112f);
    const Ints special = magnitude > 0x0f7fffff;
    return (Floats)((half & 0x8000) << 16 | (special & (magnitude | 0x7f800000)) | (~special & finite));
  }
  static DEPTHPRUNE_INLINE Weight load(const uint16_t* weight) {
    const Ints pairs = read<Ints>(weight);
    return {widen(pairs), widen(pairs >> 16)};
  }
};

struct Fp32 : Lanes4, Store4<Float32> {
  using Format = Float32;
  using Packed = float;
  static constexpr bool kAsStored = true;
  static constexpr bool kPaired = false;
  static constexpr int kStep = 4;
  using Weight = Floats;
  using Input = Floats;
  static DEPTHPRUNE_INLINE Weight load(const float* weight) { return read<Floats>(weight); }
  static DEPTHPRUNE_INLINE Input input(const float* x) { return read<Floats>(x); }
  static DEPTHPRUNE_INLINE Sum add(Sum sum, Weight weight, Input input) { return sum + weight * input; }
};

}  // namespace

const LinearKernel kLinearGeneric[3] = {kernel<Bf16>(), kernel<Fp16>(), kernel<Fp32>()};

}  // namespace depthprune
#else
namespace depthprune {
const LinearKernel kLinearGeneric[3]{};
}  // namespace depthprune
#endif
