// The loops of quantized_linear, compiled once an instruction level: included by quantized_<level>.cpp inside a
// namespace of its own, after DEPTHPRUNE_TARGET. Hence no include guard.
//
// A block keeps S tokens times R panels: integer sums of one run of 32 inputs, float sums over the runs of a group, and
// over groups. Integer sums are exact and the others are added in order, so that an output depends on its token and row
// alone.
//
// A trait V has:
//   kRegisters                  registers for the 16 rows of a panel
//   kPanels, kTokens            panels and most tokens of a block
//   kStreamed                   most tokens with panels read one by one
//   kAhead, kSecondLevel        <bits, S>: bytes that these prefetch ahead; whether into the second level of caches only
//   Int, Float                  a register of integer or float sums
//   Codes<bits>                 one tile [16, 4] of 4-bit pairs or of 8-bit codes, ready to be multiplied
//   start<bits>(sum, zeros)     integer sum to begin with, from what a run's packed inputs say
//   add                         sum += codes * inputs
//   add_run, add_group          group += x_scale * sum;  total += scale * group
//   add_alone                   total += scale * (x_scale * sum), of a group that is one run
//   store, kNarrows, narrow     16 totals as they are; whether it rounds them to bfloat16 itself

template <typename V, int bits, int S>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void prefetch_ahead(const uint8_t* from) {
  if constexpr (V::template kSecondLevel<bits, S>) {
    DEPTHPRUNE_PREFETCH_L2((from + V::template kAhead<bits, S>));
  } else {
    DEPTHPRUNE_PREFETCH((from + V::template kAhead<bits, S>));
  }
}

// Adds a run `to` the totals where it is alone in its group, else those of the group.
template <typename V, int bits, bool symmetric, bool alone, int R, int S>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_run(
    const QuantizedLinear& linear, const uint8_t* codes, int64_t panel_bytes, int64_t scale_offset, int64_t run,
    const char* x, int64_t x_stride, typename V::Float (&to)[R][S][V::kRegisters]) {
  const QuantizedWeight& weight = linear.weight;
  const int64_t panel_scales = weight.groups * kPanelRows;
  constexpr int tiles = kRun * bits / 32;  // of 64 bytes
  typename V::Int sums[R][S][V::kRegisters];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    const char* packed = x + s * x_stride;
    int32_t minus;
    std::memcpy(&minus, packed + weight.padded() + weight.runs() * 4 + run * 4, 4);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      V::template start<bits, symmetric>(minus, symmetric ? nullptr : weight.zeros + scale_offset + r * panel_scales, sums[r][s]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < tiles; ++i) {
    typename V::template Codes<bits> tile[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = codes + r * panel_bytes + i * 64;
      if constexpr (S <= V::kStreamed) prefetch_ahead<V, bits, S>(from);
      tile[r].load(from);
    }
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const char* inputs = x + s * x_stride + run * kRun + i * (32 / bits);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) tile[r].add(inputs, sums[r][s]);
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    float x_scale;
    std::memcpy(&x_scale, x + s * x_stride + weight.padded() + run * 4, 4);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if constexpr (alone) {
        V::add_alone(sums[r][s], x_scale, V::scales(weight.scales + scale_offset + r * panel_scales), to[r][s]);
      } else {
        V::add_run(sums[r][s], x_scale, to[r][s]);
      }
    }
  }
}

template <typename V, int R, int S>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void clear(typename V::Float (&sums)[R][S][V::kRegisters]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) V::zero(sums[r][s]);
  }
}

template <typename X>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store_rows(
    const float* totals, const QuantizedLinear& linear, int64_t token, int64_t row) {
  using T = typename X::storage;
  const T* bias = static_cast<const T*>(linear.bias);
  T* out = static_cast<T*>(linear.out) + token * linear.out_stride + row;
  const int64_t count = linear.weight.out_features - row;
  if (count >= kPanelRows) {
    float values[kPanelRows];
    for (int i = 0; i < kPanelRows; ++i) values[i] = bias == nullptr ? totals[i] : totals[i] + X::widen(bias[row + i]);
    for (int i = 0; i < kPanelRows; ++i) out[i] = X::narrow(values[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    out[i] = X::narrow(bias == nullptr ? totals[i] : totals[i] + X::widen(bias[row + i]));
  }
}

DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store_any(
    const float* totals, const QuantizedLinear& linear, int64_t token, int64_t row) {
  switch (linear.dtype) {
    case Dtype::bfloat16: return store_rows<BFloat16>(totals, linear, token, row);
    case Dtype::float16: return store_rows<Float16>(totals, linear, token, row);
    default: return store_rows<Float32>(totals, linear, token, row);
  }
}

template <typename V>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void store_totals(
    const typename V::Float (&totals)[V::kRegisters], const QuantizedLinear& linear, int64_t token, int64_t row) {
  if constexpr (V::kNarrows) {  // the usual case, from registers rather than value by value
    if (linear.dtype == Dtype::bfloat16 && linear.bias == nullptr && linear.weight.out_features - row >= kPanelRows) {
      V::narrow(totals, static_cast<uint16_t*>(linear.out) + token * linear.out_stride + row);
      return;
    }
  }
  alignas(64) float rows[kPanelRows];
  V::store(totals, rows);
  store_any(rows, linear, token, row);
}

template <typename V, int bits, bool symmetric, int R, int S>
DEPTHPRUNE_TARGET void block(const QuantizedLinear& linear, int64_t panel, int64_t token) {
  const QuantizedWeight& weight = linear.weight;
  const int64_t panel_bytes = weight.padded() * kPanelRows * bits / 8;
  const int64_t x_stride = packed_bytes(weight);
  const char* x = linear.x + token * x_stride;
  const uint8_t* codes = weight.codes + panel * panel_bytes;
  typename V::Float totals[R][S][V::kRegisters];
  clear<V>(totals);
  const int64_t run_bytes = kRun * kPanelRows * bits / 8;
  const int64_t runs_per_group = weight.group_size / kRun;
  const int64_t panel_scales = weight.groups * kPanelRows;
  int64_t scale_offset = panel * panel_scales;
  for (int64_t run = 0; run < weight.runs(); scale_offset += kPanelRows) {
    if (runs_per_group == 1) {
      add_run<V, bits, symmetric, true, R, S>(
          linear, codes + run * run_bytes, panel_bytes, scale_offset, run, x, x_stride, totals);
      ++run;
      continue;
    }
    typename V::Float group[R][S][V::kRegisters];
    clear<V>(group);
    for (const int64_t end = run + runs_per_group; run < end; ++run) {
      add_run<V, bits, symmetric, false, R, S>(
          linear, codes + run * run_bytes, panel_bytes, scale_offset, run, x, x_stride, group);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const typename V::Scales scales = V::scales(weight.scales + scale_offset + r * panel_scales);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) V::add_group(group[r][s], scales, totals[r][s]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) {
      store_totals<V>(totals[r][s], linear, token + s, (panel + r) * kPanelRows);
    }
  }
}

template <typename V, int bits, bool symmetric, int R, int S>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void last_tokens(const QuantizedLinear& linear, int64_t panel, int64_t t, int64_t end) {
  if constexpr (S > 0) {
    if (end - t < S) return last_tokens<V, bits, symmetric, R, S - 1>(linear, panel, t, end);
    block<V, bits, symmetric, R, S>(linear, panel, t);
  }
}

// R panels against tokens [first, end).
template <typename V, int bits, bool symmetric, int R, int S>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void panel_rows(const QuantizedLinear& linear, int64_t panel, int64_t first, int64_t end) {
  int64_t t = first;
  for (; t + S <= end; t += S) block<V, bits, symmetric, R, S>(linear, panel, t);
  last_tokens<V, bits, symmetric, R, S - 1>(linear, panel, t, end);
}

template <typename V, int bits, bool symmetric, int R, int S>
DEPTHPRUNE_TARGET void panels(const QuantizedLinear& linear, int64_t begin, int64_t end) {
  // Inputs of a pass stay in the second-level cache, while the weights stream past them.
  const int64_t most = std::max<int64_t>(S, kPassBytes / packed_bytes(linear.weight) / S * S);
  for (int64_t first = 0; first < linear.tokens; first += most) {
    const int64_t last = std::min(linear.tokens, first + most);
    int64_t panel = begin;
    for (; panel + R <= end; panel += R) panel_rows<V, bits, symmetric, R, S>(linear, panel, first, last);
    for (; panel < end; ++panel) panel_rows<V, bits, symmetric, 1, S>(linear, panel, first, last);
  }
}

// Few tokens wait for memory: panel after panel is one direction, which its prefetchers follow best.
template <typename V, int bits, bool symmetric>
DEPTHPRUNE_TARGET void panels_of(const QuantizedLinear& linear, int64_t begin, int64_t end) {
  if (linear.tokens <= V::kStreamed) return panels<V, bits, symmetric, 1, V::kStreamed>(linear, begin, end);
  panels<V, bits, symmetric, V::kPanels, V::kTokens>(linear, begin, end);
}

template <typename V>
DEPTHPRUNE_TARGET void panels_any(const QuantizedLinear& linear, int64_t begin, int64_t end) {
  if (linear.weight.bits == 8) {
    linear.weight.zeros == nullptr ? panels_of<V, 8, true>(linear, begin, end) : panels_of<V, 8, false>(linear, begin, end);
  } else {
    linear.weight.zeros == nullptr ? panels_of<V, 4, true>(linear, begin, end) : panels_of<V, 4, false>(linear, begin, end);
  }
}
