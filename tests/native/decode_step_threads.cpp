// DecodeStep under ThreadSanitizer: steps on several threads give the bits of one thread, and touch nothing unguarded.
// Built and run by `make sanitize` (build.py), with plain threads instead of OpenMP's.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/step/step.h"

using namespace depthprune;

namespace {

constexpr int64_t kHidden = 64, kHeads = 6, kKvHeads = 3, kHeadDim = 16, kChannels = 48, kVocabulary = 80;
constexpr int64_t kBlocks = 64, kBlockSize = 4, kLayers = 3, kMostTokens = 5;

std::mt19937 generator(0);

std::vector<float> random_floats(int64_t size, float scale) {
  std::normal_distribution<float> draw(0.0f, scale);
  std::vector<float> values(size);
  for (float& value : values) value = draw(generator);
  return values;
}

// Owns what a model points to. Vectors must not move once they are pointed to, so they are never copied.
struct Model {
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<std::vector<uint16_t>> halves;
  std::vector<std::vector<float>> caches;

  const void* tensor(int64_t size, float scale) {
    floats.push_back(random_floats(size, scale));
    return floats.back().data();
  }

  Projection projection(int64_t rows, int64_t columns, int bits) {
    Projection found{};
    found.dtype = Dtype::float32;
    found.out_features = rows;
    found.in_features = columns;
    if (bits == 0) {
      found.weight = tensor(rows * columns, 0.1f);
      return found;
    }
    QuantizedWeight& codes = found.codes;
    codes.out_features = rows;
    codes.in_features = columns;
    codes.group_size = 32;
    codes.groups = (columns + 31) / 32;
    codes.bits = bits;
    bytes.emplace_back(codes.panels() * codes.padded() * kPanelRows * bits / 8);
    for (uint8_t& byte : bytes.back()) byte = static_cast<uint8_t>(generator());
    halves.emplace_back(codes.panels() * codes.groups * kPanelRows, 0x3a80);  // bfloat16 of 1 / 1024
    codes.codes = bytes.back().data();
    codes.scales = halves.back().data();
    return found;
  }

  attention::Source cache() {
    caches.push_back(random_floats(kBlocks * kBlockSize * kKvHeads * kHeadDim, 1.0f));
    return {caches.back().data(), kBlockSize * kKvHeads * kHeadDim, kKvHeads * kHeadDim, kHeadDim};
  }

  DecoderWeights weights(int bits) {
    DecoderWeights found{};
    found.dtype = Dtype::float32;
    found.hidden_size = kHidden;
    found.eps = 1e-5f;
    for (int64_t i = 0; i < kLayers; ++i) {
      AttentionLayer attention{};
      attention.norm = tensor(kHidden, 1.0f);
      attention.qkv = projection((kHeads + 2 * kKvHeads) * kHeadDim, kHidden, bits);
      attention.o = projection(kHidden, kHeads * kHeadDim, bits);
      attention.num_heads = kHeads;
      attention.num_kv_heads = kKvHeads;
      attention.head_dim = kHeadDim;
      attention.scale = 0.25f;
      attention.k_cache = cache();
      attention.v_cache = cache();
      attention.num_kv_blocks = kBlocks;
      attention.kv_block_size = kBlockSize;
      found.layers.emplace_back(attention);
      FfnLayer ffn{};
      ffn.norm = tensor(kHidden, 1.0f);
      ffn.gate_up = projection(2 * kChannels, kHidden, bits);
      ffn.down = projection(kHidden, kChannels, bits);
      found.layers.emplace_back(ffn);
    }
    found.embedding = projection(kVocabulary, kHidden, bits);
    found.norm = tensor(kHidden, 1.0f);
    found.lm_head = projection(kVocabulary, kHidden, bits);
    return found;
  }
};

// Logits of a few steps for `tokens` requests whose contexts start at `context`.
std::vector<float> decode(int bits, int64_t tokens, int64_t context, int threads) {
  generator.seed(7);
  Model model;
  model.floats.reserve(1000);
  model.bytes.reserve(1000);
  model.halves.reserve(1000);
  model.caches.reserve(1000);
  DecodeStep step(model.weights(bits));
  const std::vector<float> cos_sin = random_floats(kBlocks * kBlockSize * kHeadDim, 0.7f);
  const int64_t width = kBlocks / tokens;
  std::vector<int64_t> tables(tokens * width);
  for (int64_t i = 0; i < tokens * width; ++i) tables[i] = i * 7 % (tokens * width);
  std::vector<float> all;
  for (int64_t i = 0; i < 4; ++i) {
    std::vector<int64_t> ids(tokens), positions(tokens), slots(tokens), lengths(tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      ids[t] = (17 * t + 5 * i) % kVocabulary;
      positions[t] = context + i;
      slots[t] = tables[t * width + positions[t] / kBlockSize] * kBlockSize + positions[t] % kBlockSize;
      lengths[t] = positions[t] + 1;
    }
    const StepInputs inputs{tokens,        ids.data(), positions.data(), slots.data(),
                            tables.data(), width,      lengths.data(),   {cos_sin.data()}};
    std::vector<float> logits(tokens * kVocabulary);
    step.run(inputs, logits.data(), threads);
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

}  // namespace

int main() {
  int failures = 0;
  for (const int bits : {0, 8, 4}) {
    for (const int64_t tokens : {1, 2, 5}) {
      for (const int64_t context : {3, 40}) {
        const std::vector<float> expected = decode(bits, tokens, context, 1);
        for (const int threads : {2, 3, 4}) {
          const std::vector<float> found = decode(bits, tokens, context, threads);
          if (std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0) continue;
          std::printf("%d bits, %d tokens, %d threads: other logits\n", bits, static_cast<int>(tokens), threads);
          ++failures;
        }
      }
    }
  }
  // A context long enough for its keys to be split over tasks: 1 request, 250 to 254 tokens.
  if (decode(0, 1, 250, 1) != decode(0, 1, 250, 3)) ++failures;
  std::printf(failures == 0 ? "decode_step: the same logits on any number of threads\n" : "decode_step: failed\n");
  return failures == 0 ? 0 : 1;
}
