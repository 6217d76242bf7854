// What op.cpp (arguments, threads) and the kernels of each instruction level (<level>.cpp) agree on. Layout of the
// codes: depthprune_runtime/quantized.py. Inputs are rounded to 8 bits in runs of kRun by a scale of their own.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace depthprune {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kRun = 32;  // inputs that share a scale; groups are multiples of it

struct QuantizedWeight {
  const uint8_t* codes;    // [P, K' bits / 32, 16, 4]
  const uint16_t* scales;  // [P, groups, 16] bfloat16
  const uint8_t* zeros;    // [P, groups, 16], or null: 2^(bits - 1)
  int64_t out_features;    // N
  int64_t in_features;     // K
  int64_t groups;
  int64_t group_size;
  int bits;  // 8 or 4

  int64_t panels() const { return (out_features + kPanelRows - 1) / kPanelRows; }
  int64_t padded() const { return groups * group_size; }  // K'
  int64_t runs() const { return padded() / kRun; }

  // Panels [begin, end) as a weight of their own; all of them have 16 rows.
  QuantizedWeight slice(int64_t begin, int64_t end) const {
    QuantizedWeight part = *this;
    part.codes += begin * padded() * kPanelRows * bits / 8;
    part.scales += begin * groups * kPanelRows;
    if (zeros != nullptr) part.zeros += begin * groups * kPanelRows;
    part.out_features = (end - begin) * kPanelRows;
    return part;
  }
};

// A packed token: K' codes, then a scale (float) and minus the sum of codes (int32) for each run; where all zero points
// are 2^(bits - 1), times that.
inline int64_t packed_bytes(const QuantizedWeight& weight) { return weight.padded() + weight.runs() * 8; }

struct QuantizedLinear {
  QuantizedWeight weight;
  const char* x;     // [T, packed_bytes]
  const void* bias;  // [N] of dtype, or null
  void* out;         // [T, out_stride] of dtype
  int64_t tokens;    // T
  int64_t out_stride;
  Dtype dtype;
};

// Outputs of panels [begin, end) for all tokens.
using QuantizedPanels = void (*)(const QuantizedLinear& linear, int64_t begin, int64_t end);

void quantized_panels_generic(const QuantizedLinear& linear, int64_t begin, int64_t end);
void quantized_panels_avx2(const QuantizedLinear& linear, int64_t begin, int64_t end);
void quantized_panels_avx512_vnni(const QuantizedLinear& linear, int64_t begin, int64_t end);

// The kernel of the level in force.
QuantizedPanels quantized_panels();

// One token [K] of dtype into the packed form.
void pack_quantized(const void* x, Dtype dtype, const QuantizedWeight& weight, char* packed);

}  // namespace depthprune
