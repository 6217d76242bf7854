// Matrix product of many tokens in bfloat16, where arithmetic decides the time:
//   out_tn = sum_k x_tk w_nk (+ bias_n),  or gated  out_tf = silu(x_t . g_f (+ b_f)) * (x_t . u_f (+ b_(F + f)))
// in float32, rounded once. What gemm.cpp (arguments, threads) and the kernels (gemm_<level>.cpp) agree on.
//
// A thread turns a few weight rows into a panel, pairs of K over 16 rows, and takes all its tokens past it: the copy costs
// a few percent of the products of 65 tokens and nothing at 512, and the weights stay as they are stored. A sum takes its
// products in the order of K, so a token's result depends on neither the other tokens nor the threads.
#pragma once

#include <cstdint>

namespace depthprune {

struct Gemm {
  const uint16_t* x;       // [T, K]
  const uint16_t* weight;  // [N, K]; gated: [2F, K], gate rows first
  const uint16_t* bias;    // [N] or [2F]; or null
  uint16_t* out;           // [T, N] or [T, F], dense
  int64_t tokens;          // T
  int64_t in_features;     // K
  int64_t out_features;    // N, or F
  int64_t x_stride;        // elements from row to row
  int64_t weight_stride;   // elements from row to row
  bool gated;

  int64_t pairs() const { return (in_features + 1) / 2; }
};

constexpr int64_t kPanelPairs = 16;  // panels are filled up with zeros to a multiple of so many pairs

struct GemmKernel {
  int64_t outputs;        // of a panel
  int64_t gated_outputs;  // of a panel that holds gate and up rows
  int64_t panel_bytes;    // a pair of K
  void (*pack)(const Gemm& gemm, int64_t first, uint32_t* panel);
  // Outputs from `first` of tokens [begin, end), at least kTokens of them.
  void (*run)(const Gemm& gemm, const uint32_t* panel, int64_t first, int64_t begin, int64_t end);
};

constexpr int64_t kGemmTokens = 32;

// Null where the compiler or the processor family lacks the level.
extern const GemmKernel kGemmAvx512Bf16;
extern const GemmKernel kGemmAmx;

// Fewest tokens for which copying the weights pays.
constexpr int64_t kFewestGemmTokens = 65;

// The kernel of the level in force; null: there is none, or too few tokens.
const GemmKernel* gemm_kernel(int64_t tokens);

void run_gemm(const GemmKernel& kernel, const Gemm& gemm);

}  // namespace depthprune
