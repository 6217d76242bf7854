// quantized_linear in plain loops, and the rounding of inputs, which is the same for all levels.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "cpu/codes/codes.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

#define DEPTHPRUNE_TARGET

namespace depthprune {
namespace {

constexpr int64_t kPassBytes = 256 << 10;

#include "cpu/codes/loops.inc"

struct Plain {
  static constexpr bool kNarrows = false;
  static constexpr int kRegisters = 1;
  static constexpr int kPanels = 1;
  static constexpr int kTokens = 2;
  static constexpr int kStreamed = 1;
  template <int bits, int S>
  static constexpr bool kSecondLevel = false;
  template <int bits, int S>
  static constexpr int64_t kAhead = 256;
  struct Int {
    int32_t rows[kPanelRows];
  };
  struct Float {
    float rows[kPanelRows];
  };
  using Scales = Float;

  template <int bits>
  struct Codes {
    const uint8_t* codes;
    void load(const uint8_t* from) { codes = from; }
    void add(const char* inputs, Int (&sum)[1]) const {
      const auto* x = reinterpret_cast<const int8_t*>(inputs);
      for (int r = 0; r < kPanelRows; ++r) {
        for (int i = 0; i < 4; ++i) {
          const int code = codes[4 * r + i];
          sum[0].rows[r] += bits == 8 ? code * x[i] : (code & 15) * x[i] + (code >> 4) * x[4 + i];
        }
      }
    }
  };

  static void zero(Float (&total)[1]) { total[0] = {}; }

  template <int bits, bool symmetric>
  static void start(int32_t minus, const uint8_t* zeros, Int (&sum)[1]) {
    for (int r = 0; r < kPanelRows; ++r) sum[0].rows[r] = symmetric ? minus : minus * zeros[r];
  }

  static Scales scales(const uint16_t* from) {
    Scales found;
    for (int r = 0; r < kPanelRows; ++r) found.rows[r] = BFloat16::widen(from[r]);
    return found;
  }

  static void add_run(const Int (&sum)[1], float x_scale, Float (&group)[1]) {
    for (int r = 0; r < kPanelRows; ++r) group[0].rows[r] += static_cast<float>(sum[0].rows[r]) * x_scale;
  }

  static void add_group(const Float (&group)[1], const Scales& scales, Float (&total)[1]) {
    for (int r = 0; r < kPanelRows; ++r) total[0].rows[r] += group[0].rows[r] * scales.rows[r];
  }

  static void add_alone(const Int (&sum)[1], float x_scale, const Scales& scales, Float (&total)[1]) {
    for (int r = 0; r < kPanelRows; ++r) {
      total[0].rows[r] += static_cast<float>(sum[0].rows[r]) * x_scale * scales.rows[r];
    }
  }

  static void store(const Float (&total)[1], float* rows) { std::memcpy(rows, total[0].rows, sizeof(total[0].rows)); }
};

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, to nearest even

// One run: codes, scale and minus the sum of codes times `zero`. Inputs that are not finite make the scale NaN, and so
// the outputs.
template <typename X>
DEPTHPRUNE_INLINE void pack_run(
    const typename X::storage* x, int8_t* codes, float* scale, int32_t* minus, int32_t zero) {
  float wide[kRun];
  uint32_t largest = 0;
  for (int i = 0; i < kRun; ++i) wide[i] = X::widen(x[i]);
  for (int i = 0; i < kRun; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(wide[i]) & 0x7fffffffu);
  const float magnitude = std::bit_cast<float>(largest);
  const bool finite = largest < 0x7f800000u;
  const bool usable = finite && magnitude > 1e-35f;  // 127 / magnitude must be finite
  const float inverse = usable ? 127.0f / magnitude : 0.0f;
  int32_t sum = 0;
  if (usable) {
    for (int i = 0; i < kRun; ++i) {
      const int32_t code = std::bit_cast<int32_t>(wide[i] * inverse + kRounding) - std::bit_cast<int32_t>(kRounding);
      codes[i] = static_cast<int8_t>(code);
      sum += code;
    }
  } else {
    std::memset(codes, 0, kRun);
  }
  *scale = usable ? magnitude / 127.0f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  *minus = -sum * zero;
}

template <typename X>
DEPTHPRUNE_INLINE void pack_as(const void* row, const QuantizedWeight& weight, char* packed) {
  using T = typename X::storage;
  const T* x = static_cast<const T*>(row);
  auto* codes = reinterpret_cast<int8_t*>(packed);
  auto* scales = reinterpret_cast<float*>(packed + weight.padded());
  auto* minus = reinterpret_cast<int32_t*>(packed + weight.padded() + weight.runs() * 4);
  const int32_t zero = weight.zeros == nullptr ? 1 << (weight.bits - 1) : 1;
  const int64_t whole = weight.in_features / kRun;
  for (int64_t r = 0; r < whole; ++r) pack_run<X>(x + r * kRun, codes + r * kRun, scales + r, minus + r, zero);
  for (int64_t r = whole; r < weight.runs(); ++r) {
    T rest[kRun] = {};
    const int64_t left = weight.in_features - r * kRun;
    if (left > 0) std::memcpy(rest, x + r * kRun, left * sizeof(T));
    pack_run<X>(rest, codes + r * kRun, scales + r, minus + r, zero);
  }
}

}  // namespace

void quantized_panels_generic(const QuantizedLinear& linear, int64_t begin, int64_t end) {
  panels_any<Plain>(linear, begin, end);
}

// The dtype switch is inside the clones: a template cannot be cloned.
DEPTHPRUNE_CLONES void pack_quantized(const void* x, Dtype dtype, const QuantizedWeight& weight, char* packed) {
  switch (dtype) {
    case Dtype::bfloat16: return pack_as<BFloat16>(x, weight, packed);
    case Dtype::float16: return pack_as<Float16>(x, weight, packed);
    default: return pack_as<Float32>(x, weight, packed);
  }
}

}  // namespace depthprune
