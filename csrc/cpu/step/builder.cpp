#include "cpu/step/builder.h"

#include <utility>

#include "common/check.h"
#include "common/dtype_of.h"

namespace depthprune {
namespace {

constexpr const char* kOp = "decode_step";

void check_size(const char* name, int64_t size) {
  DEPTHPRUNE_CHECK(size >= 1 && size <= kMostSize, kOp, name, c10::str("1 to ", kMostSize), size);
}

}  // namespace

StepLinear::StepLinear(
    std::vector<at::Tensor> weight, std::optional<at::Tensor> bias, int64_t out_features, int64_t in_features,
    int64_t format, int64_t bits, int64_t group_size)
    : weight(std::move(weight)),
      bias(std::move(bias)),
      out_features(out_features),
      in_features(in_features),
      format(static_cast<Format>(format)),
      bits(bits),
      group_size(group_size) {
  check_size("out_features", out_features);
  check_size("in_features", in_features);
  const auto count = static_cast<int64_t>(this->weight.size());
  DEPTHPRUNE_CHECK(format >= 0 && format <= 2, kOp, "format", "0 (rows), 1 (panels) or 2 (codes)", format);
  if (this->format != Format::codes) {
    DEPTHPRUNE_CHECK(count == 1, kOp, "weight", "one tensor", c10::str(count, " tensors"));
    return;
  }
  DEPTHPRUNE_CHECK(bits == 4 || bits == 8, kOp, "bits", "4 or 8", bits);
  DEPTHPRUNE_CHECK(
      count == 2 || count == 3, kOp, "weight", "two tensors, or three with zero points", c10::str(count, " tensors"));
  DEPTHPRUNE_CHECK(
      group_size == 32 || group_size == 64 || group_size == 128, kOp, "group_size", "32, 64 or 128", group_size);
}

StepBuilder::StepBuilder(at::ScalarType dtype, int64_t hidden_size, double eps) : dtype_(dtype) {
  DEPTHPRUNE_CHECK(is_known(dtype), kOp, "dtype", "bfloat16, float16 or float32", dtype);
  check_size("hidden_size", hidden_size);
  weights_.dtype = dtype_of(dtype);
  weights_.hidden_size = hidden_size;
  weights_.eps = static_cast<float>(eps);
}

void StepBuilder::add_attention(
    const at::Tensor& norm, const StepLinear& qkv, const StepLinear& o, const std::optional<at::Tensor>& q_norm,
    const std::optional<at::Tensor>& k_norm, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, double scale,
    int64_t window, int64_t rotary, const at::Tensor& k_cache, const at::Tensor& v_cache) {
  check_size("num_heads", num_heads);
  check_size("num_kv_heads", num_kv_heads);
  check_size("head_dim", head_dim);
  DEPTHPRUNE_CHECK(
      num_heads % num_kv_heads == 0 && head_dim % 2 == 0, kOp, "num_heads, num_kv_heads, head_dim",
      "whole groups and an even head_dim", c10::str(num_heads, ", ", num_kv_heads, ", ", head_dim));
  DEPTHPRUNE_CHECK(window >= 0, kOp, "window", "at least 0 (0: all tokens)", window);
  DEPTHPRUNE_CHECK(
      q_norm.has_value() == k_norm.has_value(), kOp, "q_norm and k_norm", "both or neither",
      q_norm ? "q_norm alone" : "k_norm alone");
  DEPTHPRUNE_CHECK(
      k_cache.dim() == 4 && k_cache.size(1) > 0, kOp, "k_cache", "shape [N, P, K, D], P at least 1", k_cache.sizes());
  AttentionLayer layer{};
  layer.norm = plain("norm", norm, {hidden()});
  layer.qkv = projection("qkv", qkv, (num_heads + 2 * num_kv_heads) * head_dim, hidden());
  layer.o = projection("o", o, hidden(), num_heads * head_dim);
  if (q_norm) layer.q_norm = plain("q_norm", *q_norm, {num_heads, head_dim});
  if (k_norm) layer.k_norm = plain("k_norm", *k_norm, {num_kv_heads, head_dim});
  layer.num_heads = num_heads;
  layer.num_kv_heads = num_kv_heads;
  layer.head_dim = head_dim;
  layer.scale = static_cast<float>(scale);
  layer.window = window;
  layer.rotary = rotary;
  layer.num_kv_blocks = k_cache.size(0);
  layer.kv_block_size = k_cache.size(1);
  layer.k_cache = cache("k_cache", k_cache, {layer.num_kv_blocks, layer.kv_block_size, num_kv_heads, head_dim});
  layer.v_cache = cache("v_cache", v_cache, {layer.num_kv_blocks, layer.kv_block_size, num_kv_heads, head_dim});
  weights_.layers.emplace_back(layer);
}

void StepBuilder::add_ffn(const at::Tensor& norm, const StepLinear& gate_up, const StepLinear& down) {
  FfnLayer layer{};
  layer.norm = plain("norm", norm, {hidden()});
  layer.gate_up = projection("gate_up", gate_up, 2 * down.in_features, hidden());
  layer.down = projection("down", down, hidden(), down.in_features);
  weights_.layers.emplace_back(layer);
}

void StepBuilder::set_ends(const StepLinear& embedding, const at::Tensor& norm, const StepLinear& lm_head) {
  // A token that is chosen is looked up in the next step.
  DEPTHPRUNE_CHECK(
      lm_head.out_features <= embedding.out_features, kOp, "lm_head",
      c10::str("at most ", embedding.out_features, " rows (those of the embedding)"), lm_head.out_features);
  weights_.embedding = projection("embedding", embedding, embedding.out_features, hidden());
  weights_.lm_head = projection("lm_head", lm_head, lm_head.out_features, hidden());
  weights_.norm = plain("norm", norm, {hidden()});
}

const void* StepBuilder::part(const char* name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
  DEPTHPRUNE_CHECK(
      t.sizes() == sizes && t.scalar_type() == dtype && t.is_cpu() && t.is_contiguous(), kOp, name,
      c10::str("shape ", sizes, ", dtype ", dtype, ", dense, device cpu"),
      c10::str(t.sizes(), " ", t.scalar_type(), " ", t.device()));
  tensors_.push_back(t);
  return t.const_data_ptr();
}

const void* StepBuilder::plain(const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  return part(name, t, dtype_, sizes);
}

attention::Source StepBuilder::cache(const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  return {part(name, t, dtype_, sizes), t.stride(0), t.stride(1), t.stride(2)};
}

const uint32_t* StepBuilder::panels(const char* name, const StepLinear& linear) {
  const int64_t count = (linear.out_features + kGemmRows - 1) / kGemmRows;
  DEPTHPRUNE_CHECK(dtype_ == at::kBFloat16, kOp, name, "a model in bfloat16, for panels", dtype_);
  return static_cast<const uint32_t*>(
      plain(name, linear.weight.at(0), {count, (linear.in_features + 31) / 32 * 16, kGemmRows, 2}));
}

QuantizedWeight StepBuilder::codes(const char* name, const StepLinear& linear) {
  QuantizedWeight found{};
  found.out_features = linear.out_features;
  found.in_features = linear.in_features;
  found.group_size = linear.group_size;
  found.groups = (linear.in_features + linear.group_size - 1) / linear.group_size;
  found.bits = static_cast<int>(linear.bits);
  const int64_t panels = found.panels();
  found.codes = static_cast<const uint8_t*>(
      part(name, linear.weight.at(0), at::kByte, {panels, found.padded() * linear.bits / 32, kPanelRows, 4}));
  found.scales =
      static_cast<const uint16_t*>(part(name, linear.weight.at(1), at::kBFloat16, {panels, found.groups, kPanelRows}));
  if (linear.weight.size() > 2) {
    found.zeros =
        static_cast<const uint8_t*>(part(name, linear.weight.at(2), at::kByte, {panels, found.groups, kPanelRows}));
  }
  return found;
}

Projection StepBuilder::projection(
    const char* name, const StepLinear& linear, int64_t out_features, int64_t in_features) {
  DEPTHPRUNE_CHECK(
      linear.out_features == out_features && linear.in_features == in_features, kOp, name,
      c10::str("shape [", out_features, ", ", in_features, "]"),
      c10::str("[", linear.out_features, ", ", linear.in_features, "]"));
  Projection found{};
  found.dtype = weights_.dtype;
  found.out_features = out_features;
  found.in_features = in_features;
  if (linear.bias) found.bias = plain(name, *linear.bias, {out_features});
  switch (linear.format) {
    case Format::rows: found.weight = plain(name, linear.weight.at(0), {out_features, in_features}); break;
    case Format::panels: found.panels = panels(name, linear); break;
    case Format::codes: found.codes = codes(name, linear); break;
  }
  return found;
}

}  // namespace depthprune
