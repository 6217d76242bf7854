#include "cpu/projection.h"

#include <cstring>

#include "cpu/simd.h"

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

}  // namespace

int64_t Projection::packed_token(const Kernels& kernels) const {
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

void Projection::row(int64_t index, void* out) const {
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
