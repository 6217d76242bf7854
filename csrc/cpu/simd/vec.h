// Vectors of W floats and the products that attention needs: registers where GCC or Clang compile, else plain arrays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"
#if DEPTHPRUNE_HAS_CLONES
#include <immintrin.h>
#endif

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define DEPTHPRUNE_VECTORS 1
#else
#define DEPTHPRUNE_VECTORS 0
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"                // every function here is inlined: no vector crosses a call
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own immintrin.h
#endif

// Loops over arrays of vectors: only once unrolled do the arrays become registers.
#if defined(__GNUC__)
#define DEPTHPRUNE_UNROLL _Pragma("GCC unroll 16")
#else
#define DEPTHPRUNE_UNROLL
#endif

namespace depthprune {

#if DEPTHPRUNE_VECTORS

template <int W>
struct VecOf;
template <>
struct VecOf<4> {
  typedef float floats __attribute__((vector_size(16)));
  typedef uint32_t words __attribute__((vector_size(16)));
  typedef uint16_t halves __attribute__((vector_size(8)));
};
template <>
struct VecOf<8> {
  typedef float floats __attribute__((vector_size(32)));
  typedef uint32_t words __attribute__((vector_size(32)));
  typedef uint16_t halves __attribute__((vector_size(16)));
};
template <>
struct VecOf<16> {
  typedef float floats __attribute__((vector_size(64)));
  typedef uint32_t words __attribute__((vector_size(64)));
  typedef uint16_t halves __attribute__((vector_size(32)));
};
template <int W>
using Vec = typename VecOf<W>::floats;

template <int W>
DEPTHPRUNE_INLINE Vec<W> load(const uint16_t* x) {  // bfloat16
  typename VecOf<W>::halves halves;
  std::memcpy(&halves, x, sizeof(halves));
#if DEPTHPRUNE_HAS_CLONES  // GCC 12 makes four instructions of this one
  if constexpr (W == 16) return (Vec<W>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#endif
  return (Vec<W>)(__builtin_convertvector(halves, typename VecOf<W>::words) << 16);
}

template <int W>
DEPTHPRUNE_INLINE Vec<W> broadcast(float x) {
  return x - Vec<W>{};
}

// One value per pair of neighbours: within each four lanes, (a0, a2, b0, b2) + (a1, a3, b1, b3).
template <int W, std::size_t... lane>
DEPTHPRUNE_INLINE Vec<W> add_pairs(Vec<W> a, Vec<W> b, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, b, (lane / 4 * 4 + lane % 2 * 2 + (lane % 4 >= 2 ? W : 0))...) +
         __builtin_shufflevector(a, b, (lane / 4 * 4 + lane % 2 * 2 + 1 + (lane % 4 >= 2 ? W : 0))...);
}

// The sums of the lanes of four vectors.
template <int W>
DEPTHPRUNE_INLINE void store_sums(const Vec<W>* x, float* sums) {
  constexpr auto lanes = std::make_index_sequence<W>();
  const Vec<W> all = add_pairs<W>(add_pairs<W>(x[0], x[1], lanes), add_pairs<W>(x[2], x[3], lanes), lanes);
  Vec<4> parts[W / 4];
  std::memcpy(parts, &all, sizeof(all));
  for (int step = W / 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
  }
  std::memcpy(sums, parts, sizeof(parts[0]));
}

template <int W>
DEPTHPRUNE_INLINE Vec<W> larger(Vec<W> a, Vec<W> b) {
  return a > b ? a : b;
}

#else

template <int W>
struct Vec {
  float lanes[W];
  Vec operator*(const Vec& b) const {
    Vec c;
    for (int i = 0; i < W; ++i) c.lanes[i] = lanes[i] * b.lanes[i];
    return c;
  }
  Vec& operator+=(const Vec& b) {
    for (int i = 0; i < W; ++i) lanes[i] += b.lanes[i];
    return *this;
  }
};

template <int W>
DEPTHPRUNE_INLINE Vec<W> load(const uint16_t* x) {  // bfloat16
  Vec<W> y;
  for (int i = 0; i < W; ++i) y.lanes[i] = BFloat16::widen(x[i]);
  return y;
}

template <int W>
DEPTHPRUNE_INLINE Vec<W> broadcast(float x) {
  Vec<W> y;
  for (int i = 0; i < W; ++i) y.lanes[i] = x;
  return y;
}

template <int W>
DEPTHPRUNE_INLINE void store_sums(const Vec<W>* x, float* sums) {
  DEPTHPRUNE_UNROLL
  for (int i = 0; i < 4; ++i) {
    sums[i] = 0.0f;
    for (int lane = 0; lane < W; ++lane) sums[i] += x[i].lanes[lane];
  }
}

template <int W>
DEPTHPRUNE_INLINE Vec<W> larger(const Vec<W>& a, const Vec<W>& b) {
  Vec<W> c;
  for (int i = 0; i < W; ++i) c.lanes[i] = std::max(a.lanes[i], b.lanes[i]);
  return c;
}

#endif

template <int W>
DEPTHPRUNE_INLINE Vec<W> load(const float* x) {
  Vec<W> y;
  std::memcpy(&y, x, sizeof(y));
  return y;
}

template <int W>
DEPTHPRUNE_INLINE void store(float* x, Vec<W> y) {
  std::memcpy(x, &y, sizeof(y));
}

// The largest of x[0 .. size), size a positive multiple of 16; NaN is skipped.
template <int W>
DEPTHPRUNE_INLINE float largest(const float* x, int64_t size) {
  Vec<W> top = load<W>(x);
  for (int64_t c = W; c < size; c += W) top = larger<W>(load<W>(x + c), top);
  float lanes[W];
  store<W>(lanes, top);
  for (int step = W / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] = lanes[i + step] > lanes[i] ? lanes[i + step] : lanes[i];
  }
  return lanes[0];
}

// Row d of the right-hand side of a product: rows at a fixed distance, or wherever they lie.
struct Panel {
  using storage = float;
  const float* data;
  int64_t stride;
  DEPTHPRUNE_INLINE const float* row(int64_t d) const { return data + d * stride; }
};

// Asks for a row ahead of its use, into the second-level cache: a core has too few first-level misses to wait for
// memory with.
template <typename T>
DEPTHPRUNE_INLINE void prefetch_row(const T* row, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < size; d += kLine) DEPTHPRUNE_PREFETCH_L2(row + d);
}

// Rows that are needed after those a product reads: it asks for one of them with each of its own, so that memory works
// while it multiplies. (All at once would wait for each other: a core follows some 24 cache lines at a time.)
template <typename T>
struct Ahead {
  const T* const* rows;
  int64_t count;
  int64_t size;  // elements of a row
  DEPTHPRUNE_INLINE void ask(int64_t i) const {
    if (i < count) prefetch_row(rows[i], size);
  }
};

template <typename T>
struct Scattered {
  using storage = T;
  const T* const* rows;
  Ahead<T> ahead;
  DEPTHPRUNE_INLINE const T* row(int64_t d) const {
    ahead.ask(d);
    return rows[d];
  }
};

// c_rj = keep_r c_rj + sum_d a_rd b_dj for `rows` rows and vecs * W columns from j; without `keep`, c starts at zero.
template <int W, int rows, int vecs, typename B>
DEPTHPRUNE_INLINE void multiply_block(
    const float* a, int64_t a_stride, B b, int64_t depth, int64_t j, float* c, int64_t c_stride, const float* keep) {
  Vec<W> sums[rows][vecs];
  DEPTHPRUNE_UNROLL
  for (int r = 0; r < rows; ++r) {
    DEPTHPRUNE_UNROLL
    for (int i = 0; i < vecs; ++i) {
      sums[r][i] = broadcast<W>(0.0f);
      if (keep != nullptr) sums[r][i] = load<W>(c + r * c_stride + j + i * W) * broadcast<W>(keep[r]);
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    const typename B::storage* row = b.row(d) + j;
    Vec<W> values[vecs];
    DEPTHPRUNE_UNROLL
    for (int i = 0; i < vecs; ++i) values[i] = load<W>(row + i * W);
    DEPTHPRUNE_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Vec<W> factor = broadcast<W>(a[r * a_stride + d]);
      DEPTHPRUNE_UNROLL
      for (int i = 0; i < vecs; ++i) sums[r][i] += factor * values[i];
    }
  }
  DEPTHPRUNE_UNROLL
  for (int r = 0; r < rows; ++r) {
    DEPTHPRUNE_UNROLL
    for (int i = 0; i < vecs; ++i) store<W>(c + r * c_stride + j + i * W, sums[r][i]);
  }
}

// The same over all columns. 6 x 4 registers of sums where there are 32 registers (W = 16), else 6 x 2.
template <int W, int rows, typename B>
DEPTHPRUNE_INLINE void multiply_rows(
    const float* a, int64_t a_stride, B b, int64_t depth, int64_t columns, float* c, int64_t c_stride,
    const float* keep) {
  constexpr int vecs = W == 16 ? 4 : 2;
  int64_t j = 0;
  for (; j + vecs * W <= columns; j += vecs * W) {
    multiply_block<W, rows, vecs>(a, a_stride, b, depth, j, c, c_stride, keep);
  }
  for (; j < columns; j += W) multiply_block<W, rows, 1>(a, a_stride, b, depth, j, c, c_stride, keep);
}

// Up to kRows rows.
template <int W, typename B>
DEPTHPRUNE_INLINE void multiply(
    int64_t rows, const float* a, int64_t a_stride, B b, int64_t depth, int64_t columns, float* c, int64_t c_stride,
    const float* keep) {
  switch (rows) {
    case 6: return multiply_rows<W, 6>(a, a_stride, b, depth, columns, c, c_stride, keep);
    case 5: return multiply_rows<W, 5>(a, a_stride, b, depth, columns, c, c_stride, keep);
    case 4: return multiply_rows<W, 4>(a, a_stride, b, depth, columns, c, c_stride, keep);
    case 3: return multiply_rows<W, 3>(a, a_stride, b, depth, columns, c, c_stride, keep);
    case 2: return multiply_rows<W, 2>(a, a_stride, b, depth, columns, c, c_stride, keep);
    default: return multiply_rows<W, 1>(a, a_stride, b, depth, columns, c, c_stride, keep);
  }
}

// c_rj = sum_d a_rd b_jd: b in rows of memory, not transposed. `columns` is a multiple of 4.
template <int W, int rows, typename T>
DEPTHPRUNE_INLINE void dot_rows(
    const float* a, int64_t a_stride, const T* const* b, int64_t depth, int64_t columns, float* c, int64_t c_stride,
    const Ahead<T>& ahead) {
  for (int64_t j = 0; j < columns; j += 4) {
    for (int64_t i = j; i < j + 4; ++i) ahead.ask(i);
    Vec<W> sums[rows][4];
    DEPTHPRUNE_UNROLL
    for (int r = 0; r < rows; ++r) {
      DEPTHPRUNE_UNROLL
      for (int i = 0; i < 4; ++i) sums[r][i] = broadcast<W>(0.0f);
    }
    for (int64_t d = 0; d < depth; d += W) {
      DEPTHPRUNE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Vec<W> values = load<W>(b[j + i] + d);
        DEPTHPRUNE_UNROLL
        for (int r = 0; r < rows; ++r) sums[r][i] += load<W>(a + r * a_stride + d) * values;
      }
    }
    DEPTHPRUNE_UNROLL
    for (int r = 0; r < rows; ++r) store_sums<W>(sums[r], c + r * c_stride + j);
  }
}

template <int W, typename T>
DEPTHPRUNE_INLINE void dot(
    int64_t rows, const float* a, int64_t a_stride, const T* const* b, int64_t depth, int64_t columns, float* c,
    int64_t c_stride, Ahead<T> ahead) {
  for (int64_t r = 0; r < rows; ahead.count = 0) {
    const float* first = a + r * a_stride;
    float* out = c + r * c_stride;
    if (rows - r >= 3) {
      dot_rows<W, 3>(first, a_stride, b, depth, columns, out, c_stride, ahead);
      r += 3;
    } else if (rows - r == 2) {
      dot_rows<W, 2>(first, a_stride, b, depth, columns, out, c_stride, ahead);
      r += 2;
    } else {
      dot_rows<W, 1>(first, a_stride, b, depth, columns, out, c_stride, ahead);
      r += 1;
    }
  }
}

}  // namespace depthprune
