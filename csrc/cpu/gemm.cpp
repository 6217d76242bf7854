#include "cpu/gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <new>

#include "cpu/features.h"

namespace depthprune {
namespace {

// A thread's panel, kept from call to call.
class PanelMemory {
 public:
  uint32_t* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<uint32_t*>(::operator new(bytes, kAlignment)));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(uint32_t* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<uint32_t, Free> memory_;
  int64_t size_ = 0;
};

// Tokens of a piece of work: all of them unless the panels are too few to keep the threads equally busy.
int64_t piece_tokens(int64_t tokens, int64_t panels, int64_t threads) {
  if (threads == 1) return tokens;
  const int64_t pieces = std::clamp<int64_t>((8 * threads + panels - 1) / panels, 1, std::max<int64_t>(1, tokens / 64));
  const int64_t size = (tokens + pieces - 1) / pieces;
  return (size + kGemmTokens - 1) / kGemmTokens * kGemmTokens;
}

}  // namespace

const GemmKernel* gemm_kernel(int64_t tokens) {
  if (tokens < kFewestGemmTokens) return nullptr;
  switch (level()) {
    case Level::amx: return &kGemmAmx;
    case Level::avx512_bf16: return &kGemmAvx512Bf16;
    default: return nullptr;
  }
}

void run_gemm(const GemmKernel& kernel, const Gemm& gemm) {
  const int64_t outputs = gemm.gated ? kernel.gated_outputs : kernel.outputs;
  const int64_t panels = (gemm.out_features + outputs - 1) / outputs;
  const int64_t piece = piece_tokens(gemm.tokens, panels, at::get_num_threads());
  // A last piece of fewer than kGemmTokens joins the one before.
  const int64_t pieces = std::max<int64_t>(1, (gemm.tokens + piece - kGemmTokens) / piece);
  const int64_t bytes = (gemm.pairs() + kPanelPairs - 1) / kPanelPairs * kPanelPairs * kernel.panel_bytes;
  at::parallel_for(0, panels * pieces, 1, [&](int64_t begin, int64_t end) {
    thread_local PanelMemory memory;
    uint32_t* panel = memory.at_least(bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / pieces * outputs;
      if (i == begin || i % pieces == 0) kernel.pack(gemm, first, panel);
      const int64_t token = i % pieces * piece;
      kernel.run(gemm, panel, first, token, i % pieces == pieces - 1 ? gemm.tokens : token + piece);
    }
  });
}

}  // namespace depthprune
