#include "cpu/step/state.h"

#include <algorithm>

namespace depthprune {

using attention::Problem;

Widths widths_of(const DecoderWeights& weights, const Kernels& kernels) {
  const int64_t element = size_of(weights.dtype);
  Widths widths;
  widths.hidden = weights.hidden_size * element;
  widths.packed = weights.lm_head.packed_token(kernels);
  const auto add = [&](const Projection& wide, const Projection& narrow) {
    widths.wide = std::max(widths.wide, wide.out_features * element);
    widths.inner = std::max(widths.inner, narrow.in_features * element);
    widths.packed = std::max({widths.packed, wide.packed_token(kernels), narrow.packed_token(kernels)});
  };
  for (const auto& layer : weights.layers) {
    if (const auto* attention = std::get_if<AttentionLayer>(&layer)) {
      add(attention->qkv, attention->o);
    } else {
      const auto& ffn = std::get<FfnLayer>(layer);
      add(ffn.gate_up, ffn.down);
    }
  }
  widths.packed = round_up(widths.packed);
  return widths;
}

Problem problem_of(const AttentionLayer& layer, Dtype dtype) {
  Problem problem{};
  problem.block_size = layer.kv_block_size;
  problem.head_dim = layer.head_dim;
  problem.group = layer.num_heads / layer.num_kv_heads;
  problem.window = layer.window;
  problem.scale = layer.scale;
  problem.dtype = dtype;
  problem.k = layer.k_cache;
  problem.v = layer.v_cache;
  return problem;
}

PlanKey key_of(const AttentionLayer& layer) {
  return {layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.window, layer.kv_block_size};
}

Plans plans_of(const DecoderWeights& weights, const StepInputs& inputs) {
  Plans plans;
  for (const auto& layer : weights.layers) {
    const auto* attention = std::get_if<AttentionLayer>(&layer);
    if (attention == nullptr) continue;
    const auto [found, is_new] = plans.try_emplace(key_of(*attention));
    if (!is_new) continue;
    const Problem problem = problem_of(*attention, weights.dtype);
    for (int64_t t = 0; t < inputs.tokens; ++t) {
      const attention::Request request{t, 1, inputs.context_lens[t], inputs.block_tables + t * inputs.table_width, 0};
      attention::add_tasks(problem, attention->num_kv_heads, request, found->second);
    }
  }
  return plans;
}

}  // namespace depthprune
