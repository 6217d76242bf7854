// What the threads of one step share, and how it is sized and planned before they start.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <tuple>
#include <vector>

#include "cpu/attention/plan.h"
#include "cpu/step/step.h"
#include "cpu/step/team.h"

namespace depthprune {

constexpr int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Sizes in bytes of what one token needs between the phases.
struct Widths {
  int64_t hidden = 0;  // C
  int64_t wide = 0;    // of QKV or gate|up
  int64_t inner = 0;   // of the heads' outputs or the activations
  int64_t packed = 0;  // of any projection's input
};

Widths widths_of(const DecoderWeights& weights, const Kernels& kernels);

// The tasks of an attention sub-layer. Equal sub-layers share them.
using PlanKey = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
using Plans = std::map<PlanKey, attention::Plan>;

PlanKey key_of(const AttentionLayer& layer);
Plans plans_of(const DecoderWeights& weights, const StepInputs& inputs);

// Without queries and outputs.
attention::Problem problem_of(const AttentionLayer& layer, Dtype dtype);

// What the threads of one step share.
struct StepState {
  const DecoderWeights& weights;
  const StepInputs& inputs;
  void* logits;
  Kernels kernels;
  Widths widths;
  Plans plans;
  char* residual;  // [T, C]
  char* wide;      // [T, wide]
  char* inner;     // [T, inner]
  char* out;       // [T, C]
  char* normed;    // [T, C], or [threads, C] for one token
  char* packed;    // [T, packed], or [threads, packed] for one token
  std::vector<float> partials;
  std::deque<std::atomic<int64_t>> next;  // task to take, for each sub-layer
  Barrier barrier;
};

}  // namespace depthprune
