// Matrix product:
//   out_tn = sum_k x_tk w_nk (+ bias_n)
// in float32, rounded once. With few tokens reading the weights once decides the time: a thread reads one contiguous
// band of weight rows, four rows at a time against all tokens (loops.inc). Many are the work of panels/, or of torch.
// Contract: depthprune_runtime/ops/linear.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "common/check.h"
#include "common/dtype_of.h"
#include "common/row_strides_of.h"
#include "cpu/panels/op.h"
#include "cpu/panels/panels.h"
#include "cpu/rows/op.h"
#include "cpu/rows/rows.h"
#include "cpu/simd/level.h"

namespace depthprune {
namespace {

// Products that are worth a second thread: about 10 us of one core.
constexpr int64_t kGrain = 1 << 17;

// Most tokens for our kernels, by Dtype; at::linear takes more, but see in_runs. Time of at::linear over ours at
// SmolLM2's shapes (2 threads of a Zen 4 with AVX-512 BF16; rows in benchmarks/results/linear_cpu.csv): bfloat16
// 2.0-3.6 at 1 token, 0.9-1.2 at 64; float32 1.9-2.3 and 1.2-1.7; float16 1.0-1.1 and 4.7-5.5. Where ours is the slower
// one it stays, as a token's result must not change with the number of tokens. The generic kernels keep up at a few
// tokens only.
constexpr int64_t kMostTokens[3] = {64, 256, 64};
constexpr int64_t kMostTokensGeneric = 4;

// Many float16 tokens, for which torch takes 4.5 to 5.2 times as long at 512 (two threads of a Zen 3), go in runs that
// the caches hold. (Where AMX is, torch may have float16 products: not measured.)
bool in_runs(Dtype dtype) { return dtype == Dtype::float16 && level() >= Level::avx2 && level() < Level::amx; }

}  // namespace

const LinearKernel* linear_kernel(Dtype dtype, int64_t tokens) {
  const int index = static_cast<int>(dtype);
  const Level use = level();
  if (tokens > (use == Level::generic ? kMostTokensGeneric : kMostTokens[index])) return nullptr;
  if (use >= Level::avx512_bf16 && dtype == Dtype::bfloat16) return &kLinearAvx512Bf16;
  if (use >= Level::avx512) return &kLinearAvx512[index];
  if (use == Level::avx2) return &kLinearAvx2[index];
  return kLinearGeneric[index].rows == nullptr ? nullptr : &kLinearGeneric[index];
}

void check_linear(
    const char* op, const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  DEPTHPRUNE_CHECK(x.dim() == 2, op, "x", "two dimensions [T, K]", x.sizes());
  DEPTHPRUNE_CHECK(is_known(x.scalar_type()), op, "x", "dtype bfloat16, float16 or float32", x.scalar_type());
  DEPTHPRUNE_CHECK(
      weight.dim() == 2 && weight.size(1) == x.size(1), op, "weight", c10::str("shape [N, ", x.size(1), "]"),
      weight.sizes());
  DEPTHPRUNE_CHECK(
      weight.scalar_type() == x.scalar_type() && weight.is_cpu(), op, "weight",
      c10::str("dtype ", x.scalar_type(), " (that of x), device cpu"),
      c10::str(weight.scalar_type(), " ", weight.device()));
  if (!bias) return;
  DEPTHPRUNE_CHECK(
      bias->dim() == 1 && bias->size(0) == weight.size(0), op, "bias", c10::str("shape [", weight.size(0), "]"),
      bias->sizes());
  DEPTHPRUNE_CHECK(
      bias->scalar_type() == x.scalar_type() && bias->is_cpu(), op, "bias",
      c10::str("dtype ", x.scalar_type(), " (that of x), device cpu"),
      c10::str(bias->scalar_type(), " ", bias->device()));
}

namespace {

// x in the format of `kernel`: itself where it already is, else a copy with rows padded with zeros, in `packed`.
void set_input(Linear& linear, const LinearKernel& kernel, const at::Tensor& x, at::Tensor& packed) {
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  if (kernel.as_stored && linear.in_features % kernel.step == 0) {
    linear.x = data;
    linear.x_stride = x.stride(0);
    return;
  }
  linear.x_stride = (linear.in_features + kernel.step - 1) / kernel.step * kernel.step;
  packed = at::empty({linear.tokens * linear.x_stride * kernel.x_bytes}, x.options().dtype(at::kByte));
  auto* out = static_cast<char*>(packed.mutable_data_ptr());
  for (int64_t t = 0; t < linear.tokens; ++t) {
    kernel.pack(
        data + t * x.stride(0) * x.element_size(), out + t * linear.x_stride * kernel.x_bytes, linear.in_features);
  }
  linear.x = out;
}

void few_tokens(
    const LinearKernel& kernel, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
    at::Tensor& out) {
  Linear job{};
  job.weight = weight.const_data_ptr();
  job.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  job.out = out.mutable_data_ptr();
  job.tokens = x.size(0);
  job.in_features = x.size(1);
  job.out_features = weight.size(0);
  job.weight_stride = weight.stride(0);
  at::Tensor packed;
  set_input(job, kernel, x, packed);
  const int64_t per_group = std::max<int64_t>(1, job.tokens * job.in_features * kLinearRows);
  const int64_t groups = (job.out_features + kLinearRows - 1) / kLinearRows;
  at::parallel_for(0, groups, std::max<int64_t>(1, kGrain / per_group), [&](int64_t begin, int64_t end) {
    kernel.rows(job, begin * kLinearRows, std::min(end * kLinearRows, job.out_features));
  });
}

}  // namespace

std::optional<at::Tensor> many_tokens(
    const at::Tensor& x,                    // [T, K]
    const at::Tensor& weight,               // [N, K], gated [2F, K]
    const std::optional<at::Tensor>& bias,  // [N], gated [2F]
    bool gated) {                           // -> [T, N], gated [T, F]
  if (x.size(0) <= kMostStepTokens || x.scalar_type() != at::kBFloat16 || !has_gemm()) return std::nullopt;
  at::Tensor out = at::empty({x.size(0), weight.size(0) / (gated ? 2 : 1)}, x.options());
  if (out.numel() == 0) return out;
  const at::Tensor inputs = with_row_strides(x);
  const at::Tensor weights = with_row_strides(weight);
  const at::Tensor offsets = bias ? bias->contiguous() : at::Tensor();
  run_gemm(
      gemm_job(inputs, offsets, out, gated),
      GemmRows{static_cast<const uint16_t*>(weights.const_data_ptr()), weights.stride(0)});
  return out;
}

at::Tensor linear(
    const at::Tensor& x,                      // [T, K]
    const at::Tensor& weight,                 // [N, K]
    const std::optional<at::Tensor>& bias) {  // [N] -> [T, N]
  check_linear("linear", x, weight, bias);
  if (std::optional<at::Tensor> out = many_tokens(x, weight, bias, false)) return *out;
  const Dtype dtype = dtype_of(x.scalar_type());
  const int64_t most = kMostTokens[static_cast<int>(dtype)];
  const int64_t run = in_runs(dtype) ? std::min(x.size(0), most) : x.size(0);
  const LinearKernel* kernel = linear_kernel(dtype, run);
  // Dense: with AMX, torch 2.13 multiplies what lies beside a bfloat16 row by zero, which is NaN where that is.
  if (kernel == nullptr) return at::linear(x.contiguous(), weight.contiguous(), bias);
  at::Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  if (out.numel() == 0) return out;
  const at::Tensor inputs = with_row_strides(x);
  const at::Tensor weights = with_row_strides(weight);
  const at::Tensor offsets = bias ? bias->contiguous() : at::Tensor();
  for (int64_t t = 0; t < x.size(0); t += run) {
    at::Tensor to = out.narrow(0, t, std::min(run, x.size(0) - t));
    few_tokens(*kernel, inputs.narrow(0, t, to.size(0)), weights, offsets, to);
  }
  return out;
}

TORCH_LIBRARY_IMPL(depthprune, CPU, m) { m.impl("linear", &linear); }

}  // namespace depthprune
