// Matrix product by a bfloat16 weight in panels:
//   out_tn = sum_k x_tk w_nk (+ bias_n),  or gated  out_tf = silu(x_t . g_f (+ b_f)) * (x_t . u_f (+ b_(F + f)))
// in float32, rounded once. What its callers (arguments, threads) and the kernels (<level>.cpp) agree on.
//
// A panel holds 16 weight rows, pairs of K over the rows: [K' / 2, 16, 2], K' = K rounded up to 32, zeros behind the
// ends. A register of it meets one pair of a token: sums need no reduction, and a panel is one stretch of memory. A sum
// takes its products in the order of K (AVX-512 without BF16: even and odd ones apart), so a token's result depends on
// neither the other tokens nor the threads.
#pragma once

#include <cstdint>

namespace depthprune {

constexpr int64_t kGemmRows = 16;    // of a panel
constexpr int64_t kGemmTokens = 32;  // fewest tokens of a call to an AMX kernel

struct Gemm {
  const uint16_t* x;     // [T, K]
  const uint16_t* bias;  // [N] or [2F]; or null
  uint16_t* out;         // [T, N] or [T, F], dense
  int64_t tokens;        // T
  int64_t in_features;   // K
  int64_t out_features;  // N, or F
  int64_t x_stride;      // elements from row to row
  bool gated;

  int64_t panel_words() const { return (in_features + 31) / 32 * 16 * kGemmRows; }  // of 4 bytes
};

struct GemmKernel {
  // Outputs [first, last) of tokens [begin, end); first: a multiple of kGemmRows.
  // panels: those of the outputs from `first` on; ups: the same of the up rows, where gated.
  void (*run)(
      const Gemm& gemm, const uint32_t* panels, const uint32_t* ups, int64_t first, int64_t last, int64_t begin,
      int64_t end);
  // That share their inputs; threads get multiples of it where there are many tokens.
  int64_t outputs;
  int64_t gated_outputs;
};

extern const GemmKernel kGemmGeneric;
// Null where the compiler or the processor family lacks the level.
extern const GemmKernel kGemmAvx2;
extern const GemmKernel kGemmAvx512;
extern const GemmKernel kGemmAvx512Bf16;
extern const GemmKernel kGemmAmx;

// Most tokens of a decode step, for which every level has one kernel: a token's result is the same among all of them.
constexpr int64_t kMostStepTokens = 64;

// The kernel of the level in force.
const GemmKernel& gemm_kernel(int64_t tokens);

// Whether the level in force has a kernel of its own: else torch multiplies many tokens.
bool has_gemm();

// All outputs by a weight in panels [N / 16 rounded up, panel_words].
void run_gemm(const Gemm& gemm, const uint32_t* panels);

// Rows of torch's layout [rows, K] (gated: the first of them gates) that are copied into panels as they are needed.
struct GemmRows {
  const uint16_t* data;
  int64_t stride;  // elements from row to row
};
void run_gemm(const Gemm& gemm, const GemmRows& rows);

// `count` <= kGemmRows rows into one panel.
using GemmPack = void (*)(const uint16_t* rows, int64_t stride, int64_t count, int64_t in_features, uint32_t* panel);
extern const GemmPack kGemmPackAvx2;  // null like the kernels
extern const GemmPack kGemmPackAvx512;
void pack_panel(const uint16_t* rows, int64_t stride, int64_t count, int64_t in_features, uint32_t* panel);

}  // namespace depthprune
