// The loops of linear, compiled once an instruction level: included by linear_<level>.cpp inside a namespace of its
// own, after DEPTHPRUNE_TARGET. Hence no include guard. (A template has one target, so the level cannot be an
// argument of it.)
//
// A block keeps the sums of R weight rows times S tokens in registers and walks K once. The order of additions inside
// one sum depends on K alone, so an output does not depend on which other tokens, rows or threads share the work.
//
// A trait V has:
//   Format                          element format of simd.h
//   Packed, kAsStored, kPaired      elements of packed x; kPaired: a step holds the even elements, then the odd ones
//   kStep, kTokens                  elements of K a step; most tokens a block
//   kStreamed, kAhead               most tokens with rows read one by one; elements that these prefetch ahead
//   Weight, Input, Sum              registers: a step of weights, a step of x, one sum a lane
//   load, input, add, zero          sum += weight * input
//   reduce                          four sums over their lanes
//   store4                          those, plus bias unless null, rounded once

template <typename V, int R, int S, bool prefetch>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void add_step(
    const typename V::Format::storage* weight,  // [R, kStep]
    int64_t weight_stride,
    const typename V::Packed* x,  // [S, kStep]
    int64_t x_stride,
    int64_t ahead,  // elements from here to the weights to prefetch
    typename V::Sum (*sums)[S]) {  // [R]
  typename V::Input inputs[S];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) inputs[s] = V::input(x + s * x_stride);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const auto* row = weight + r * weight_stride;
    if constexpr (prefetch) DEPTHPRUNE_PREFETCH(row + ahead);
    const typename V::Weight wide = V::load(row);
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) sums[r][s] = V::add(sums[r][s], wide, inputs[s]);
  }
}

template <typename V, int R, int S, bool stream>
DEPTHPRUNE_TARGET void block(const Linear& linear, int64_t n, int64_t t) {
  using Format = typename V::Format;
  using T = typename Format::storage;
  constexpr int64_t step = V::kStep;
  const int64_t stride = linear.weight_stride;
  const int64_t x_stride = linear.x_stride;
  const T* weight = static_cast<const T*>(linear.weight) + n * stride;  // [R, K]
  const auto* x = static_cast<const typename V::Packed*>(linear.x) + t * x_stride;  // [S, K]
  typename V::Sum sums[R][S];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) sums[r][s] = V::zero();
  }
  const int64_t whole = linear.in_features - linear.in_features % step;
  if constexpr (stream) {
    // Row after row: memory is read in one direction, which its prefetchers follow best. Many tokens take two rows, or
    // reading the inputs would be the limit.
    constexpr int side = S > 4 && R % 2 == 0 ? 2 : 1;
#pragma GCC unroll 8
    for (int r = 0; r < R; r += side) {
      const T* row = weight + r * stride;
      for (int64_t k = 0; k < whole; k += step) {
        add_step<V, side, S, true>(row + k, stride, x + k, x_stride, V::kAhead, &sums[r]);
      }
    }
  } else {
    for (int64_t k = 0; k < whole; k += step) add_step<V, R, S, false>(weight + k, stride, x + k, x_stride, 0, sums);
  }
  if (whole < linear.in_features) {
    T rest[R * step] = {};
    for (int r = 0; r < R; ++r) {
      std::memcpy(rest + r * step, weight + r * stride + whole, (linear.in_features - whole) * sizeof(T));
    }
    add_step<V, R, S, false>(rest, step, x + whole, x_stride, 0, sums);
  }
  const T* bias = linear.bias == nullptr ? nullptr : static_cast<const T*>(linear.bias) + n;  // [R]
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    T* out = static_cast<T*>(linear.out) + (t + s) * linear.out_features + n;  // [R]
    if constexpr (R == 4) {
      V::store4(V::reduce(sums[0][s], sums[1][s], sums[2][s], sums[3][s]), bias, out);
    } else {
      static_assert(R == 1);
      T four[4], offsets[4] = {bias == nullptr ? T{} : bias[0]};
      V::store4(V::reduce(sums[0][s], V::zero(), V::zero(), V::zero()), bias == nullptr ? nullptr : offsets, four);
      out[0] = four[0];
    }
  }
}

// The last tokens, fewer than a full block.
template <typename V, int R, int S, bool stream>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void last_tokens(const Linear& linear, int64_t n, int64_t t) {
  if constexpr (S > 0) {
    if (linear.tokens - t < S) return last_tokens<V, R, S - 1, stream>(linear, n, t);
    block<V, R, S, stream>(linear, n, t);
  }
}

// R weight rows against all tokens: up to a block of them wait for memory, more keep the rows in the cache.
template <typename V, int R>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void weight_rows(const Linear& linear, int64_t n) {
  if (linear.tokens <= V::kStreamed) return last_tokens<V, R, V::kStreamed, true>(linear, n, 0);
  int64_t t = 0;
  for (; t + V::kTokens <= linear.tokens; t += V::kTokens) block<V, R, V::kTokens, false>(linear, n, t);
  last_tokens<V, R, V::kTokens - 1, false>(linear, n, t);
}

template <typename V>
DEPTHPRUNE_TARGET void rows(const Linear& linear, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + kLinearRows <= end; n += kLinearRows) weight_rows<V, kLinearRows>(linear, n);
  for (; n < end; ++n) weight_rows<V, 1>(linear, n);
}

template <typename V>
DEPTHPRUNE_TARGET DEPTHPRUNE_INLINE void pack_step(const typename V::Format::storage* x, typename V::Packed* packed) {
  if constexpr (V::kAsStored) {
    std::memcpy(packed, x, V::kStep * sizeof(*x));
  } else if constexpr (V::kPaired) {
    constexpr int half = V::kStep / 2;
    for (int i = 0; i < half; ++i) packed[i] = V::Format::widen(x[2 * i]);
    for (int i = 0; i < half; ++i) packed[half + i] = V::Format::widen(x[2 * i + 1]);
  } else {
    for (int i = 0; i < V::kStep; ++i) packed[i] = V::Format::widen(x[i]);
  }
}

template <typename V>
DEPTHPRUNE_TARGET void pack(const void* row, void* packed_row, int64_t in_features) {
  using T = typename V::Format::storage;
  const T* x = static_cast<const T*>(row);  // [K]
  auto* packed = static_cast<typename V::Packed*>(packed_row);  // [K rounded up to kStep]
  int64_t k = 0;
  for (; k + V::kStep <= in_features; k += V::kStep) pack_step<V>(x + k, packed + k);
  if (k < in_features) {
    T rest[V::kStep] = {};
    std::memcpy(rest, x + k, (in_features - k) * sizeof(T));
    pack_step<V>(rest, packed + k);
  }
}

template <typename V>
constexpr LinearKernel kernel() {
  return {V::kStep, sizeof(typename V::Packed), V::kAsStored, &pack<V>, &rows<V>};
}
