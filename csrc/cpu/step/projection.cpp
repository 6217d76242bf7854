#include "cpu/step/projection.h"

#include <algorithm>
#include <cstring>

#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"

namespace depthprune {
namespace {

template <typename X>
DEPTHPRUNE_INLINE void dequantize_as(const QuantizedWeight& weight, int64_t index, void* out) {
  auto* values = static_cast<typename X::storage*>(out);
  const int64_t panel = index / kPanelRows;
  const int64_t row = index % kPanelRows;
  const uint8_t* codes = weight.codes + panel * weight.padded() * kPanelRows * weight.bits / 8 + row * 4;
  const int64_t columns = 32 / weight.bits;  // of a tile [16, 4]
  for (int64_t k = 0; k < weight.in_features; ++k) {
    const int64_t at = (panel * weight.groups + k / weight.group_size) * kPanelRows + row;
    const int zero = weight.zeros == nullptr ? 1 << (weight.bits - 1) : weight.zeros[at];
    const int byte = codes[k / columns * 64 + k % 4];
    const int code = weight.bits == 8 ? byte : k % 8 < 4 ? byte & 15 : byte >> 4;
    values[k] = X::narrow(static_cast<float>(code - zero) * BFloat16::widen(weight.scales[at]));
  }
}

Gemm gemm_of(const Projection& projection, const void* x, int64_t tokens, void* out, bool gated) {
  Gemm job{};
  job.x = static_cast<const uint16_t*>(x);
  job.bias = static_cast<const uint16_t*>(projection.bias);
  job.out = static_cast<uint16_t*>(out);
  job.tokens = tokens;
  job.in_features = job.x_stride = projection.in_features;
  job.out_features = gated ? projection.out_features / 2 : projection.out_features;
  job.gated = gated;
  return job;
}

}  // namespace

int64_t Projection::packed_token(const Kernels& kernels) const {
  if (panels != nullptr) return 0;
  if (quantized()) return packed_bytes(codes);
  const LinearKernel& kernel = *kernels.dense;
  if (kernel.as_stored && in_features % kernel.step == 0) return 0;
  return (in_features + kernel.step - 1) / kernel.step * kernel.step * kernel.x_bytes;
}

void Projection::pack(const Kernels& kernels, const void* x, char* packed) const {
  if (quantized()) {
    pack_quantized(x, dtype, codes, packed);
  } else {
    kernels.dense->pack(x, packed, in_features);
  }
}

void Projection::rows(
    const Kernels& kernels, const void* x, int64_t tokens, void* out, int64_t begin, int64_t end) const {
  if (begin >= end) return;
  if (panels != nullptr) {
    const Gemm job = gemm_of(*this, x, tokens, out, false);
    gemm_kernel(tokens).run(job, panels + begin / kGemmRows * job.panel_words(), nullptr, begin, end, 0, tokens);
    return;
  }
  if (quantized()) {
    const QuantizedLinear job{codes, static_cast<const char*>(x), bias, out, tokens, out_features, dtype};
    kernels.quantized(job, begin / kPanelRows, (end + kPanelRows - 1) / kPanelRows);
    return;
  }
  const int64_t packed = packed_token(kernels);
  const int64_t stride = packed == 0 ? in_features : packed / kernels.dense->x_bytes;
  const Linear job{x, weight, bias, out, tokens, in_features, out_features, stride, in_features};
  kernels.dense->rows(job, begin, end);
}

void Projection::gated_rows(const void* x, int64_t tokens, void* out, int64_t begin, int64_t end) const {
  if (begin >= end) return;
  const Gemm job = gemm_of(*this, x, tokens, out, true);
  const uint32_t* gates = panels + begin / kGemmRows * job.panel_words();
  const uint32_t* ups = gates + job.out_features / kGemmRows * job.panel_words();
  gemm_kernel(tokens).run(job, gates, ups, begin, end, 0, tokens);
}

void Projection::row(int64_t index, void* out) const {
  if (panels != nullptr) {
    const int64_t words = (in_features + 31) / 32 * 16 * kGemmRows;
    const uint32_t* pairs = panels + index / kGemmRows * words + index % kGemmRows;
    for (int64_t k = 0; k < in_features; k += 2, pairs += kGemmRows) {
      std::memcpy(static_cast<uint16_t*>(out) + k, pairs, std::min<int64_t>(2, in_features - k) * sizeof(uint16_t));
    }
    return;
  }
  if (!quantized()) {
    const int64_t bytes = in_features * size_of(dtype);
    std::memcpy(out, static_cast<const char*>(weight) + index * bytes, bytes);
    return;
  }
  switch (dtype) {
    case Dtype::bfloat16: return dequantize_as<BFloat16>(codes, index, out);
    case Dtype::float16: return dequantize_as<Float16>(codes, index, out);
    default: return dequantize_as<Float32>(codes, index, out);
  }
}

}  // namespace depthprune
