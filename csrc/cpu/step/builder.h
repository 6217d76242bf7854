// From tensors to the weights of a decode step: checks them once and keeps them alive.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/step/step.h"

namespace depthprune {

constexpr int64_t kMostSize = 1 << 30;  // of a dimension: products of two fit 64 bits

// How a weight lies in memory. The numbers are those of depthprune_runtime/weights/weight.py.
enum class Format : int64_t { rows, panels, codes };

// Weight [N, K] as [weight] or [panels], or as [codes, scales] or [codes, scales, zeros], with its sizes.
struct StepLinear {
  std::vector<at::Tensor> weight;
  std::optional<at::Tensor> bias;
  int64_t out_features;
  int64_t in_features;
  Format format;
  int64_t bits;  // of a code
  int64_t group_size;

  StepLinear(
      std::vector<at::Tensor> weight, std::optional<at::Tensor> bias, int64_t out_features, int64_t in_features,
      int64_t format, int64_t bits, int64_t group_size);
};

class StepBuilder {
 public:
  StepBuilder(at::ScalarType dtype, int64_t hidden_size, double eps);

  void add_attention(
      const at::Tensor& norm,                   // [C]
      const StepLinear& qkv,                    // [(H + 2K) D, C]
      const StepLinear& o,                      // [C, H D]
      const std::optional<at::Tensor>& q_norm,  // [H, D]
      const std::optional<at::Tensor>& k_norm,  // [K, D]
      int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, double scale, int64_t window, int64_t rotary,
      const at::Tensor& k_cache,   // [N, P, K, D]
      const at::Tensor& v_cache);  // [N, P, K, D]
  void add_ffn(const at::Tensor& norm, const StepLinear& gate_up, const StepLinear& down);
  void set_ends(const StepLinear& embedding, const at::Tensor& norm, const StepLinear& lm_head);

  const DecoderWeights& weights() const { return weights_; }
  const std::vector<at::Tensor>& tensors() const { return tensors_; }
  at::ScalarType dtype() const { return dtype_; }

 private:
  int64_t hidden() const { return weights_.hidden_size; }
  const void* part(const char* name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes);
  const void* plain(const char* name, const at::Tensor& t, at::IntArrayRef sizes);
  attention::Source cache(const char* name, const at::Tensor& t, at::IntArrayRef sizes);
  const uint32_t* panels(const char* name, const StepLinear& linear);
  QuantizedWeight codes(const char* name, const StepLinear& linear);
  Projection projection(const char* name, const StepLinear& linear, int64_t out_features, int64_t in_features);

  at::ScalarType dtype_;
  DecoderWeights weights_{};
  std::vector<at::Tensor> tensors_;
};

}  // namespace depthprune
