#include "cpu/step/ahead.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/pointwise/greedy.h"

namespace depthprune {

int64_t decode_ahead(DecodeStep& step, const AheadInputs& inputs, int threads, int64_t* found) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t tokens = inputs.tokens;
  const Dtype dtype = step.weights().dtype;
  const int64_t vocab = step.weights().lm_head.out_features;
  const int64_t row = vocab * size_of(dtype);
  std::vector<char> logits(tokens * row);
  std::vector<int64_t> ids(inputs.ids, inputs.ids + tokens);
  std::vector<int64_t> positions(inputs.positions, inputs.positions + tokens);
  std::vector<int64_t> slots(tokens), context_lens(tokens);
  const StepInputs now{tokens,
                       ids.data(),
                       positions.data(),
                       slots.data(),
                       inputs.block_tables,
                       inputs.table_width,
                       context_lens.data(),
                       inputs.cos_sin};
  for (int64_t i = 0; i < inputs.steps; ++i) {
    for (int64_t t = 0; t < tokens; ++t) {
      context_lens[t] = positions[t] + 1;
      const int64_t size = inputs.kv_block_size;
      if (size == 0) continue;
      const int64_t* table = inputs.block_tables + t * inputs.table_width;
      slots[t] = table[positions[t] / size] * size + positions[t] % size;
    }
    step.run(now, logits.data(), threads);
    int64_t* next = found + i * tokens;
    greedy_rows(logits.data(), row, tokens, vocab, dtype, next);
    bool ended = false;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t* stops = inputs.stop_ids + t * inputs.stop_width;
      ended |= next[t] < 0 || std::find(stops, stops + inputs.stop_width, next[t]) != stops + inputs.stop_width;
      ids[t] = next[t];
      ++positions[t];
    }
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    if (ended || passed.count() >= inputs.seconds) return i + 1;
  }
  return inputs.steps;
}

}  // namespace depthprune
