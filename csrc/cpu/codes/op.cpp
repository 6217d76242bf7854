// Matrix product with a weight of 8 or 4 bits; contract: depthprune_runtime/ops/quantized_linear.py. A thread reads
// one contiguous band of panels.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/dtype_of.h"
#include "cpu/codes/codes.h"
#include "cpu/pointwise/activation.h"
#include "cpu/simd/level.h"

namespace depthprune {

QuantizedPanels quantized_panels() {
  if (level() >= Level::avx512 && has_vnni()) return &quantized_panels_avx512_vnni;
  if (level() >= Level::avx2) return &quantized_panels_avx2;
  return &quantized_panels_generic;
}

namespace {

constexpr const char* kOp = "quantized_linear";
constexpr int64_t kGrain = 1 << 18;    // products that are worth a second thread
constexpr int64_t kGatedPanels = 4;    // of gates and of ups at a time, for
constexpr int64_t kGatedTokens = 256;  // so many tokens: their outputs stay in the second-level cache

const void* part(const char* name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
  DEPTHPRUNE_CHECK(
      t.sizes() == sizes && t.scalar_type() == dtype && t.is_cpu() && t.is_contiguous(), kOp, name,
      c10::str("shape ", sizes, ", dtype ", dtype, ", dense, device cpu"),
      c10::str(t.sizes(), " ", t.scalar_type(), " ", t.device()));
  return t.const_data_ptr();
}

QuantizedWeight weight_of(
    const at::Tensor& codes, const at::Tensor& scales, const std::optional<at::Tensor>& zeros, int64_t out_features,
    int64_t in_features, int64_t bits, int64_t group_size) {
  DEPTHPRUNE_CHECK(bits == 8 || bits == 4, kOp, "bits", "8 or 4", bits);
  DEPTHPRUNE_CHECK(
      group_size == 32 || group_size == 64 || group_size == 128, kOp, "group_size", "32, 64 or 128", group_size);
  DEPTHPRUNE_CHECK(out_features > 0, kOp, "out_features", "at least 1", out_features);
  QuantizedWeight weight{};
  weight.out_features = out_features;
  weight.in_features = in_features;
  weight.group_size = group_size;
  weight.groups = (in_features + group_size - 1) / group_size;
  weight.bits = static_cast<int>(bits);
  const int64_t panels = weight.panels();
  weight.codes = static_cast<const uint8_t*>(
      part("codes", codes, at::kByte, {panels, weight.padded() * bits / 32, kPanelRows, 4}));
  weight.scales =
      static_cast<const uint16_t*>(part("scales", scales, at::kBFloat16, {panels, weight.groups, kPanelRows}));
  if (zeros) {
    weight.zeros = static_cast<const uint8_t*>(part("zeros", *zeros, at::kByte, {panels, weight.groups, kPanelRows}));
  }
  return weight;
}

// Activations of panels [begin, end) of gates: out [T, F] = silu(x . gates) * (x . ups). Gates and ups of many tokens
// are wider than any cache of a core, so they are joined a few panels and tokens at a time.
void gated_panels(const QuantizedLinear& job, int64_t begin, int64_t end) {
  const QuantizedPanels panels = quantized_panels();
  const int64_t half = job.weight.panels() / 2;
  const int64_t element = size_of(job.dtype);
  std::vector<char> scratch(std::min(job.tokens, kGatedTokens) * 2 * kGatedPanels * kPanelRows * element);
  for (int64_t panel = begin; panel < end; panel += kGatedPanels) {
    const int64_t last = std::min(end, panel + kGatedPanels);
    const int64_t channels = (last - panel) * kPanelRows;
    for (int64_t token = 0; token < job.tokens; token += kGatedTokens) {
      const int64_t tokens = std::min(kGatedTokens, job.tokens - token);
      for (const int64_t shift : {int64_t{0}, half}) {
        const int64_t row = (shift + panel) * kPanelRows;
        const char* bias = job.bias == nullptr ? nullptr : static_cast<const char*>(job.bias) + row * element;
        const QuantizedLinear part{
            job.weight.slice(shift + panel, shift + last),
            job.x + token * packed_bytes(job.weight),
            bias,
            scratch.data() + (shift == 0 ? 0 : channels * element),
            tokens,
            2 * channels,
            job.dtype};
        panels(part, 0, last - panel);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        const char* gate = scratch.data() + t * 2 * channels * element;
        char* out = static_cast<char*>(job.out) + ((token + t) * job.out_stride + panel * kPanelRows) * element;
        silu_mul_row(gate, gate + channels * element, out, channels, job.dtype);
      }
    }
  }
}

at::Tensor quantized_linear(
    const at::Tensor& x,                                                   // [T, K]
    const at::Tensor& codes,                                               // [P, K' bits / 32, 16, 4]
    const at::Tensor& scales,                                              // [P, groups, 16]
    const std::optional<at::Tensor>& zeros,                                // [P, groups, 16]
    const std::optional<at::Tensor>& bias,                                 // [N]
    int64_t out_features, int64_t bits, int64_t group_size, bool gated) {  // -> [T, N], gated [T, N / 2]
  DEPTHPRUNE_CHECK(x.dim() == 2, kOp, "x", "two dimensions [T, K]", x.sizes());
  DEPTHPRUNE_CHECK(is_known(x.scalar_type()), kOp, "x", "dtype bfloat16, float16 or float32", x.scalar_type());
  QuantizedLinear job{};
  job.weight = weight_of(codes, scales, zeros, out_features, x.size(1), bits, group_size);
  if (bias) job.bias = part("bias", *bias, x.scalar_type(), {out_features});
  if (gated) {
    DEPTHPRUNE_CHECK(out_features % 2 == 0, kOp, "out_features", "an even number, gated", out_features);
    if (out_features % (2 * kPanelRows) != 0 || x.size(1) == 0) {
      return silu_mul(quantized_linear(x, codes, scales, zeros, bias, out_features, bits, group_size, false));
    }
  }
  const int64_t width = gated ? out_features / 2 : out_features;
  job.dtype = dtype_of(x.scalar_type());
  job.tokens = x.size(0);
  at::Tensor out = at::empty({x.size(0), width}, x.options());
  if (out.numel() == 0) return out;
  if (x.size(1) == 0) return bias ? out.copy_(*bias) : out.zero_();
  job.out = out.mutable_data_ptr();
  job.out_stride = width;
  const at::Tensor inputs = x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
  const int64_t bytes = packed_bytes(job.weight);
  at::Tensor packed = at::empty({job.tokens, bytes}, x.options().dtype(at::kByte));
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  const char* from = static_cast<const char*>(inputs.const_data_ptr());
  at::parallel_for(0, job.tokens, std::max<int64_t>(1, 65536 / x.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      pack_quantized(from + t * inputs.stride(0) * x.element_size(), job.dtype, job.weight, to + t * bytes);
    }
  });
  job.x = to;
  const QuantizedPanels panels = quantized_panels();
  const int64_t per_panel = job.tokens * job.weight.padded() * kPanelRows * (gated ? 2 : 1);
  at::parallel_for(
      0, job.weight.panels() / (gated ? 2 : 1), std::max<int64_t>(1, kGrain / per_panel),
      [&](int64_t begin, int64_t end) { gated ? gated_panels(job, begin, end) : panels(job, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) { m.impl("quantized_linear", &quantized_linear); }

}  // namespace depthprune
