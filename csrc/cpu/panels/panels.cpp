#include "cpu/panels/panels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#include "cpu/simd/level.h"

namespace depthprune {
namespace {

constexpr int64_t kGrain = 1 << 17;  // products that are worth a second thread: about 10 us of one core

// A thread's panels, kept from call to call.
class PanelMemory {
 public:
  uint32_t* at_least(int64_t words) {
    if (words > words_) {
      memory_.reset(static_cast<uint32_t*>(::operator new(words * sizeof(uint32_t), kAlignment)));
      words_ = words;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(uint32_t* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<uint32_t, Free> memory_;
  int64_t words_ = 0;
};

// Work is cut into `outputs` outputs times `tokens` tokens; pieces of the same outputs follow each other.
struct Pieces {
  int64_t outputs;
  int64_t tokens;
  int64_t output_pieces;
  int64_t token_pieces;

  Pieces(const Gemm& gemm, const GemmKernel& kernel, int64_t threads) {
    const bool many = gemm.tokens > kMostStepTokens;
    outputs = !many ? kGemmRows : gemm.gated ? kernel.gated_outputs : kernel.outputs;
    output_pieces = (gemm.out_features + outputs - 1) / outputs;
    // All tokens, unless the panels are too few to keep the threads equally busy.
    int64_t wanted = 1;
    if (many && threads > 1) {
      wanted = std::clamp<int64_t>((8 * threads + output_pieces - 1) / output_pieces, 1, gemm.tokens / 64);
    }
    tokens = (gemm.tokens + wanted - 1) / wanted;
    if (wanted > 1) tokens = (tokens + kGemmTokens - 1) / kGemmTokens * kGemmTokens;
    // A last piece of fewer than kGemmTokens joins the one before.
    token_pieces = wanted == 1 ? 1 : std::max<int64_t>(1, (gemm.tokens + tokens - kGemmTokens) / tokens);
  }
};

// panels(first, last) -> where those of outputs [first, last) are; ups likewise.
template <typename Panels>
void run_pieces(const Gemm& gemm, const Panels& panels) {
  const GemmKernel& kernel = gemm_kernel(gemm.tokens);
  const Pieces pieces(gemm, kernel, at::get_num_threads());
  const int64_t products = pieces.outputs * pieces.tokens * gemm.in_features * (gemm.gated ? 2 : 1);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, products));
  at::parallel_for(0, pieces.output_pieces * pieces.token_pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t piece = i / pieces.token_pieces;
      const int64_t first = piece * pieces.outputs;
      // Where tokens are not cut, neighbouring outputs of this thread in one call.
      const int64_t more = pieces.token_pieces == 1 ? panels.at_once(end - i) : 1;
      const int64_t last = std::min(gemm.out_features, first + more * pieces.outputs);
      const auto [left, right] = panels.get(first, last);
      const int64_t stop = std::min(end, (piece + more) * pieces.token_pieces);
      const int64_t from = i % pieces.token_pieces * pieces.tokens;
      const bool ends = stop % pieces.token_pieces == 0;
      const int64_t to = ends ? gemm.tokens : ((stop - 1) % pieces.token_pieces + 1) * pieces.tokens;
      kernel.run(gemm, left, right, first, last, from, to);
      i = stop;
    }
  });
}

struct StoredPanels {
  const Gemm& gemm;
  const uint32_t* panels;

  int64_t at_once(int64_t pieces) const { return pieces; }

  std::pair<const uint32_t*, const uint32_t*> get(int64_t first, int64_t) const {
    const int64_t words = gemm.panel_words();
    const uint32_t* left = panels + first / kGemmRows * words;
    return {left, gemm.gated ? left + gemm.out_features / kGemmRows * words : nullptr};
  }
};

struct PackedPanels {
  const Gemm& gemm;
  const GemmRows& rows;

  int64_t at_once(int64_t) const { return 1; }

  std::pair<const uint32_t*, const uint32_t*> get(int64_t first, int64_t last) const {
    thread_local PanelMemory memory;
    const int64_t words = gemm.panel_words();
    const int64_t count = (last - first + kGemmRows - 1) / kGemmRows;
    uint32_t* left = memory.at_least(2 * count * words);
    uint32_t* right = left + count * words;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i * kGemmRows;
      const int64_t filled = std::min(kGemmRows, last - row);
      pack_panel(rows.data + row * rows.stride, rows.stride, filled, gemm.in_features, left + i * words);
      if (!gemm.gated) continue;
      const uint16_t* up = rows.data + (gemm.out_features + row) * rows.stride;
      pack_panel(up, rows.stride, filled, gemm.in_features, right + i * words);
    }
    return {left, gemm.gated ? right : nullptr};
  }
};

}  // namespace

bool has_gemm() { return level() >= Level::avx2; }

const GemmKernel& gemm_kernel(int64_t tokens) {
  if (level() >= Level::amx && tokens > kMostStepTokens) return kGemmAmx;
  if (level() >= Level::avx512_bf16) return kGemmAvx512Bf16;
  if (level() >= Level::avx512) return kGemmAvx512;
  return has_gemm() ? kGemmAvx2 : kGemmGeneric;
}

void run_gemm(const Gemm& gemm, const uint32_t* panels) { run_pieces(gemm, StoredPanels{gemm, panels}); }

void run_gemm(const Gemm& gemm, const GemmRows& rows) { run_pieces(gemm, PackedPanels{gemm, rows}); }

}  // namespace depthprune
