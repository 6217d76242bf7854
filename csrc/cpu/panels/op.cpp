// panel_linear and pack_panels: products by bfloat16 weights in panels, and how weights get there. Contract:
// depthprune_runtime/ops/panel_linear.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "common/check.h"
#include "common/row_strides_of.h"
#include "cpu/panels/op.h"
#include "cpu/panels/panels.h"

namespace depthprune {

Gemm gemm_job(const at::Tensor& x, const at::Tensor& bias, at::Tensor& out, bool gated) {
  Gemm job{};
  job.x = static_cast<const uint16_t*>(x.const_data_ptr());
  job.bias = bias.defined() ? static_cast<const uint16_t*>(bias.const_data_ptr()) : nullptr;
  job.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  job.tokens = x.size(0);
  job.in_features = x.size(1);
  job.out_features = out.size(1);
  job.x_stride = x.stride(0);
  job.gated = gated;
  return job;
}

namespace {

constexpr int64_t kPackGrain = 1 << 16;  // elements that are worth a second thread

void check_panels(const char* op, const at::Tensor& panels, int64_t out_features, int64_t in_features) {
  const int64_t count = (out_features + kGemmRows - 1) / kGemmRows;
  const int64_t pairs = (in_features + 31) / 32 * 16;
  DEPTHPRUNE_CHECK(
      panels.sizes() == at::IntArrayRef({count, pairs, kGemmRows, 2}) && panels.scalar_type() == at::kBFloat16 &&
          panels.is_contiguous() && panels.is_cpu(),
      op, "panels", c10::str("shape [", count, ", ", pairs, ", 16, 2], dtype BFloat16, dense, device cpu"),
      c10::str(panels.sizes(), " ", panels.scalar_type(), " ", panels.device()));
}

at::Tensor panel_linear(
    const at::Tensor& x,                    // [T, K]
    const at::Tensor& panels,               // [P, K' / 2, 16, 2]
    const std::optional<at::Tensor>& bias,  // [N], gated [2F]
    int64_t out_features, bool gated) {     // -> [T, N], gated [T, F]
  constexpr const char* op = "panel_linear";
  DEPTHPRUNE_CHECK(x.dim() == 2, op, "x", "two dimensions [T, K]", x.sizes());
  DEPTHPRUNE_CHECK(x.scalar_type() == at::kBFloat16, op, "x", "dtype bfloat16", x.scalar_type());
  DEPTHPRUNE_CHECK(out_features >= 0, op, "out_features", "at least 0", out_features);
  check_panels(op, panels, out_features, x.size(1));
  DEPTHPRUNE_CHECK(
      !gated || out_features % (2 * kGemmRows) == 0, op, "out_features", "a multiple of 32, gated", out_features);
  if (bias) {
    DEPTHPRUNE_CHECK(
        bias->sizes() == at::IntArrayRef({out_features}) && bias->scalar_type() == at::kBFloat16 && bias->is_cpu(), op,
        "bias", c10::str("shape [", out_features, "], dtype BFloat16, device cpu"),
        c10::str(bias->sizes(), " ", bias->scalar_type(), " ", bias->device()));
  }
  at::Tensor out = at::empty({x.size(0), gated ? out_features / 2 : out_features}, x.options());
  if (out.numel() == 0) return out;
  const at::Tensor inputs = with_row_strides(x);
  const at::Tensor offsets = bias ? bias->contiguous() : at::Tensor();
  run_gemm(gemm_job(inputs, offsets, out, gated), static_cast<const uint32_t*>(panels.const_data_ptr()));
  return out;
}

void pack_panels(const at::Tensor& weight, at::Tensor& panels) {  // [N, K], [P, K' / 2, 16, 2]
  constexpr const char* op = "pack_panels";
  DEPTHPRUNE_CHECK(
      weight.dim() == 2 && weight.scalar_type() == at::kBFloat16 && weight.is_cpu(), op, "weight",
      "shape [N, K] in bfloat16, device cpu",
      c10::str(weight.sizes(), " ", weight.scalar_type(), " ", weight.device()));
  check_panels(op, panels, weight.size(0), weight.size(1));
  const at::Tensor rows = with_row_strides(weight);
  const auto* from = static_cast<const uint16_t*>(rows.const_data_ptr());
  auto* to = static_cast<uint32_t*>(panels.mutable_data_ptr());
  const int64_t count = rows.size(0), in_features = rows.size(1), stride = rows.stride(0);
  const int64_t words = panels.size(1) * kGemmRows;
  const int64_t grain = std::max<int64_t>(1, kPackGrain / std::max<int64_t>(1, 2 * words));
  at::parallel_for(0, panels.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * kGemmRows;
      pack_panel(from + first * stride, stride, std::min(kGemmRows, count - first), in_features, to + p * words);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) {
  m.impl("panel_linear", &panel_linear);
  m.impl("pack_panels", &pack_panels);
}

}  // namespace depthprune
