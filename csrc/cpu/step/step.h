// One decode step of a whole decoder: a token for each of a few requests, through all sub-layers, in one call.
// It does what the ops do one by one, with the same roundings: the results are equal bit for bit.
#pragma once

#include <cstdint>
#include <mutex>
#include <variant>
#include <vector>

#include "common/dtype.h"
#include "cpu/attention/task.h"
#include "cpu/step/projection.h"

namespace depthprune {

struct AttentionLayer {
  const void* norm;    // [C]
  Projection qkv;      // [(H + 2K) D, C]
  Projection o;        // [C, H D]
  const void* q_norm;  // [H, D], or null
  const void* k_norm;  // [K, D], or null
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  float scale;
  int64_t window;             // 0: none
  int64_t rotary;             // which of StepInputs::cos_sin
  attention::Source k_cache;  // [N, P, K, D]
  attention::Source v_cache;
  int64_t num_kv_blocks;  // N
  int64_t kv_block_size;  // P
};

struct FfnLayer {
  const void* norm;    // [C]
  Projection gate_up;  // [2F, C]
  Projection down;     // [C, F]
};

struct DecoderWeights {
  Dtype dtype;
  int64_t hidden_size;  // C
  float eps;
  std::vector<std::variant<AttentionLayer, FfnLayer>> layers;
  Projection embedding;  // [V, C]
  const void* norm;      // [C]
  Projection lm_head;    // [V, C]
};

// T requests with one new token each.
struct StepInputs {
  int64_t tokens;                     // T
  const int64_t* ids;                 // [T]
  const int64_t* positions;           // [T]
  const int64_t* slots;               // [T]: where in the KV cache the token goes
  const int64_t* block_tables;        // [T, M]
  int64_t table_width;                // M
  const int64_t* context_lens;        // [T], the new token included
  std::vector<const float*> cos_sin;  // [S, 2, D/2] each
};

class DecodeStep {
 public:
  explicit DecodeStep(DecoderWeights weights);

  // Most tokens of a step with the kernels in force.
  int64_t max_tokens() const;

  // logits: [T, V]. Calls from several threads wait for each other.
  void run(const StepInputs& inputs, void* logits, int threads);

  const DecoderWeights& weights() const { return weights_; }

 private:
  friend class StepWorker;

  DecoderWeights weights_;
  std::mutex busy_;
  std::vector<char> memory_;  // of a step, kept for the next
};

}  // namespace depthprune
