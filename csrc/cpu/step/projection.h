// A projection whose weight is dense, in rows or in panels, or quantised, for code that splits its rows over threads by
// itself.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/codes/codes.h"
#include "cpu/panels/panels.h"
#include "cpu/rows/rows.h"

namespace depthprune {

// The kernels of the instruction level in force for a number of tokens.
struct Kernels {
  const LinearKernel* dense;
  QuantizedPanels quantized;
};

struct Projection {
  Dtype dtype;  // of inputs, outputs, bias and a dense weight
  int64_t out_features;
  int64_t in_features;
  const void* weight;      // [N, K] dense rows, or null
  const uint32_t* panels;  // dense in panels (panels/panels.h), or null
  const void* bias;        // [N], or null
  QuantizedWeight codes;   // where neither

  bool quantized() const { return weight == nullptr && panels == nullptr; }

  // Rows that are computed together: threads get multiples of it.
  int64_t unit() const { return weight != nullptr ? kLinearRows : kPanelRows; }

  // Whether gate and up rows can be multiplied and joined at once.
  bool gates() const { return panels != nullptr && out_features % (2 * kGemmRows) == 0; }

  // Bytes of a packed token; 0 where tokens are read as they are.
  int64_t packed_token(const Kernels& kernels) const;
  void pack(const Kernels& kernels, const void* x, char* packed) const;

  // Outputs [begin, end) of every token. x: [T, packed_token] bytes, or [T, K]; out: [T, N]; begin: a multiple of unit.
  void rows(const Kernels& kernels, const void* x, int64_t tokens, void* out, int64_t begin, int64_t end) const;

  // Where `gates()`: activations [begin, end) of every token. out: [T, N / 2].
  void gated_rows(const void* x, int64_t tokens, void* out, int64_t begin, int64_t end) const;

  // Row `index` of the weight [K], the lookup of an embedding.
  void row(int64_t index, void* out) const;
};

}  // namespace depthprune
