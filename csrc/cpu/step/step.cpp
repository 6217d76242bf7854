#include "cpu/step/step.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <utility>

#include "cpu/pointwise/activation.h"
#include "cpu/pointwise/norm.h"
#include "cpu/pointwise/rotary.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"
#include "cpu/step/state.h"
#include "cpu/step/team.h"

namespace depthprune {

using attention::Plan;
using attention::Problem;
using attention::Scratch;

namespace {

template <typename X>
DEPTHPRUNE_INLINE void add_as(void* residual, const void* x, int64_t size) {
  auto* sum = static_cast<typename X::storage*>(residual);
  const auto* more = static_cast<const typename X::storage*>(x);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) sum[i] = X::narrow(X::widen(sum[i]) + X::widen(more[i]));
}

// residual += x, rounded. The dtype switch is inside the clones: a template cannot be cloned.
DEPTHPRUNE_CLONES void add_row(void* residual, const void* x, int64_t size, Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16: return add_as<BFloat16>(residual, x, size);
    case Dtype::float16: return add_as<Float16>(residual, x, size);
    default: return add_as<Float32>(residual, x, size);
  }
}

char* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }
const char* at(const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; }

}  // namespace

// One thread of a step.
class StepWorker {
 public:
  StepWorker(StepState& state, int index, int count) : state_(state), index_(index), count_(count) {
    for (const auto& [key, plan] : state.plans) {
      const int64_t padded_dim = (std::get<2>(key) + 15) / 16 * 16;
      scratch_.try_emplace(key, plan.most_rows, padded_dim, plan.panels);
    }
  }

  void run() {
    const DecoderWeights& weights = state_.weights;
    for (int64_t t = index_; t < tokens(); t += count_) {
      weights.embedding.row(state_.inputs.ids[t], at(state_.residual, t * hidden_bytes()));
    }
    wait();
    for (size_t i = 0; i < weights.layers.size(); ++i) {
      if (const auto* attention = std::get_if<AttentionLayer>(&weights.layers[i])) {
        attend(*attention, state_.next[i]);
      } else {
        feed_forward(std::get<FfnLayer>(weights.layers[i]));
      }
    }
    project(weights.lm_head, normed_input(weights.norm, weights.lm_head), state_.logits);
  }

 private:
  struct Range {
    int64_t begin, end;
  };

  int64_t tokens() const { return state_.inputs.tokens; }
  int64_t hidden_bytes() const { return state_.widths.hidden; }
  void wait() { state_.barrier.wait(count_); }

  // This thread's part of `size` in multiples of `unit`.
  Range part(int64_t size, int64_t unit) const {
    const int64_t units = (size + unit - 1) / unit;
    return {std::min(size, units * index_ / count_ * unit), std::min(size, units * (index_ + 1) / count_ * unit)};
  }

  // A single token is normalised and packed by every thread for itself, which is cheaper than to wait for another;
  // more are split, then waited for.
  bool alone() const { return tokens() == 1; }

  const void* normed_input(const void* gain, const Projection& projection) {
    const int64_t packed = projection.packed_token(state_.kernels);
    const Range mine = alone() ? Range{0, 1} : part(tokens(), 1);
    char* normed = state_.normed + (alone() ? index_ * hidden_bytes() : 0);
    char* to = state_.packed + (alone() ? index_ * state_.widths.packed : 0);
    Norm norm{};
    norm.x = state_.residual;
    norm.weight = gain;
    norm.out = normed;
    norm.x_rows.outer_stride = norm.out_rows.outer_stride = norm.hidden_size = state_.weights.hidden_size;
    norm.eps = state_.weights.eps;
    norm.dtype = norm.weight_dtype = state_.weights.dtype;
    norm_plain(norm, mine.begin, mine.end);
    if (packed > 0) pack(projection, normed, hidden_bytes(), to, mine);
    if (!alone()) wait();
    return packed > 0 ? to : normed;
  }

  const void* input(const Projection& projection, const char* x) {
    const int64_t packed = projection.packed_token(state_.kernels);
    if (packed == 0) return x;
    char* to = state_.packed + (alone() ? index_ * state_.widths.packed : 0);
    pack(
        projection, x, projection.in_features * size_of(projection.dtype), to,
        alone() ? Range{0, 1} : part(tokens(), 1));
    if (!alone()) wait();
    return to;
  }

  void pack(const Projection& projection, const char* x, int64_t row_bytes, char* to, Range range) const {
    const int64_t packed = projection.packed_token(state_.kernels);
    for (int64_t t = range.begin; t < range.end; ++t) {
      projection.pack(state_.kernels, x + t * row_bytes, to + t * packed);
    }
  }

  Range project(const Projection& projection, const void* x, void* out) const {
    const Range mine = part(projection.out_features, projection.unit());
    projection.rows(state_.kernels, x, tokens(), out, mine.begin, mine.end);
    return mine;
  }

  // residual += projection of x; ends with a barrier.
  void project_and_add(const Projection& projection, const char* x) {
    const Range mine = project(projection, input(projection, x), state_.out);
    const int64_t element = size_of(projection.dtype);
    for (int64_t t = 0; t < tokens() && mine.begin < mine.end; ++t) {
      const int64_t offset = t * hidden_bytes() + mine.begin * element;
      add_row(state_.residual + offset, state_.out + offset, mine.end - mine.begin, projection.dtype);
    }
    wait();
  }

  void attend(const AttentionLayer& layer, std::atomic<int64_t>& next) {
    project(layer.qkv, normed_input(layer.norm, layer.qkv), state_.wide);
    wait();
    const Range groups = part(tokens() * layer.num_kv_heads, 1);
    for (int64_t i = groups.begin; i < groups.end; ++i) {
      place_group(layer, i / layer.num_kv_heads, i % layer.num_kv_heads);
    }
    wait();
    Problem problem = problem_of(layer, state_.weights.dtype);
    problem.q = state_.wide;
    problem.out = state_.inner;
    problem.q_strides[0] = layer.qkv.out_features;
    problem.out_strides[0] = layer.o.in_features;
    problem.q_strides[1] = problem.out_strides[1] = layer.head_dim;
    const Plan& plan = state_.plans.at(key_of(layer));
    Scratch& scratch = scratch_.at(key_of(layer));
    const auto count = static_cast<int64_t>(plan.tasks.size());
    for (int64_t i = next++; i < count; i = next++) {
      attend_(problem, plan.tasks[i], scratch, state_.partials.data());
    }
    wait();
    if (!plan.splits.empty()) {
      const Range splits = part(static_cast<int64_t>(plan.splits.size()), 1);
      for (int64_t i = splits.begin; i < splits.end; ++i) {
        attention::combine(problem, plan, plan.splits[i], state_.partials.data());
      }
      wait();
    }
    project_and_add(layer.o, state_.inner);
  }

  // A KV head of a token with its query heads: q/k-norm, rotary embedding, and into the cache.
  void place_group(const AttentionLayer& layer, int64_t token, int64_t kv_head) const {
    const int64_t element = size_of(state_.weights.dtype);
    const int64_t head_bytes = layer.head_dim * element;
    const int64_t group = layer.num_heads / layer.num_kv_heads;
    char* heads = state_.wide + token * layer.qkv.out_features * element;
    char* q = heads + kv_head * group * head_bytes;
    char* k = heads + (layer.num_heads + kv_head) * head_bytes;
    const char* v = heads + (layer.num_heads + layer.num_kv_heads + kv_head) * head_bytes;
    if (layer.q_norm != nullptr) {
      for (int64_t h = 0; h < group; ++h) {
        normalize_head(layer, q + h * head_bytes, at(layer.q_norm, (kv_head * group + h) * head_bytes));
      }
      normalize_head(layer, k, at(layer.k_norm, kv_head * head_bytes));
    }
    const Rotation rotation{
        {{q, 0, layer.head_dim, group}, {k, 0, layer.head_dim, 1}},
        state_.inputs.cos_sin[layer.rotary],
        state_.inputs.positions + token,
        layer.head_dim / 2,
        state_.weights.dtype};
    rotate(rotation, 0, 1);
    const int64_t slot = state_.inputs.slots[token];
    const auto store = [&](const attention::Source& cache, const char* vector) {
      const int64_t offset = slot / layer.kv_block_size * cache.block_stride +
                             slot % layer.kv_block_size * cache.token_stride + kv_head * cache.head_stride;
      std::memcpy(at(const_cast<void*>(cache.data), offset * element), vector, head_bytes);
    };
    store(layer.k_cache, k);
    store(layer.v_cache, v);
  }

  void normalize_head(const AttentionLayer& layer, char* head, const void* gain) const {
    Norm norm{};
    norm.x = head;
    norm.weight = gain;
    norm.out = head;
    norm.hidden_size = layer.head_dim;
    norm.eps = state_.weights.eps;
    norm.dtype = norm.weight_dtype = state_.weights.dtype;
    norm_plain(norm, 0, 1);
  }

  void feed_forward(const FfnLayer& layer) {
    const void* x = normed_input(layer.norm, layer.gate_up);
    const int64_t channels = layer.down.in_features;
    const Projection& gate_up = layer.gate_up;
    if (gate_up.gates()) {
      const Range mine = part(channels, gate_up.unit());
      gate_up.gated_rows(x, tokens(), state_.inner, mine.begin, mine.end);
    } else if (channels % gate_up.unit() == 0) {
      // Gate and up of the same channels: their product needs no other thread.
      const Range mine = part(channels, gate_up.unit());
      gate_up.rows(state_.kernels, x, tokens(), state_.wide, mine.begin, mine.end);
      gate_up.rows(state_.kernels, x, tokens(), state_.wide, channels + mine.begin, channels + mine.end);
      activate(channels, mine);
    } else {
      project(gate_up, x, state_.wide);
      wait();
      activate(channels, part(channels, 1));
    }
    wait();
    project_and_add(layer.down, state_.inner);
  }

  void activate(int64_t channels, Range range) const {
    const int64_t element = size_of(state_.weights.dtype);
    for (int64_t t = 0; t < tokens() && range.begin < range.end; ++t) {
      const char* gate = state_.wide + (t * 2 * channels + range.begin) * element;
      char* out = state_.inner + (t * channels + range.begin) * element;
      silu_mul_row(gate, gate + channels * element, out, range.end - range.begin, state_.weights.dtype);
    }
  }

  StepState& state_;
  const int index_;
  const int count_;
  const attention::Attend attend_ = attention::best_attend();
  std::map<PlanKey, Scratch> scratch_;
};

DecodeStep::DecodeStep(DecoderWeights weights) : weights_(std::move(weights)) {}

int64_t DecodeStep::max_tokens() const {
  int64_t most = 1;
  while (most < 1024 && linear_kernel(weights_.dtype, 2 * most) != nullptr) most *= 2;
  return most;
}

void DecodeStep::run(const StepInputs& inputs, void* logits, int threads) {
  const std::lock_guard<std::mutex> lock(busy_);
  const Kernels kernels{linear_kernel(weights_.dtype, inputs.tokens), quantized_panels()};
  const Widths widths = widths_of(weights_, kernels);
  const int64_t tokens = inputs.tokens;
  const int64_t copies = std::max<int64_t>(tokens, threads);
  const int64_t sizes[] = {tokens * widths.hidden, tokens * widths.wide,   tokens * widths.inner,
                           tokens * widths.hidden, copies * widths.hidden, copies * widths.packed};
  int64_t total = 64;
  for (const int64_t size : sizes) total += round_up(size);
  if (static_cast<int64_t>(memory_.size()) < total) memory_.resize(total);
  char* free = memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64;
  char* places[6];
  for (int i = 0; i < 6; ++i) {
    places[i] = free;
    free += round_up(sizes[i]);
  }
  StepState state{weights_,  inputs,    logits,    kernels,   widths,    plans_of(weights_, inputs),
                  places[0], places[1], places[2], places[3], places[4], places[5],
                  {},        {},        {}};
  int64_t partials = 0;
  for (const auto& [key, plan] : state.plans) partials = std::max(partials, plan.partial_size);
  state.partials.resize(partials);
  for (size_t i = 0; i < weights_.layers.size(); ++i) state.next.emplace_back(0);
  run_team(threads, [&state](int index, int count) { StepWorker(state, index, count).run(); });
}

}  // namespace depthprune
