// Attention of a tile of queries over a range of keys, the inner part of attention.cpp:
//   o_t = sum_s e^(scale q_t . k_s - m_t) v_s,   l_t = sum_s e^(scale q_t . k_s - m_t)
// with the running maximum m (online softmax: Milakov and Gimelshein, arXiv 1805.02867). A row is one query of one
// head; all query heads of a KV head share each key and value that is read. Everything is summed in float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/attention_output.h"
#include "cpu/attention_pairs.h"
#include "cpu/attention_task.h"
#include "cpu/exp.h"
#include "cpu/simd.h"
#include "cpu/vec.h"

namespace depthprune::attention {

// Where the rows of up to kKeys tokens start; the last is repeated up to a multiple of 4.
template <typename T>
DEPTHPRUNE_INLINE void find_rows(
    const Problem& problem, const Task& task, const Source& source, int64_t first, int64_t count, const T** rows) {
  const T* data = static_cast<const T*>(source.data) + task.kv_head * source.head_stride;
  if (task.table == nullptr) {
    for (int64_t j = 0; j < count; ++j) rows[j] = data + (task.first_token + first + j) * source.token_stride;
  } else {
    for (int64_t j = 0; j < count;) {
      const int64_t offset = (first + j) % problem.block_size;
      const T* block = data + task.table[(first + j) / problem.block_size] * source.block_stride;
      const int64_t end = std::min(count, j + problem.block_size - offset);
      for (int64_t i = offset; j < end; ++j, ++i) rows[j] = block + i * source.token_stride;
    }
  }
  for (int64_t j = count; j % 4 != 0; ++j) rows[j] = rows[count - 1];
}

template <typename T>
DEPTHPRUNE_INLINE void prefetch_rows(const T* const* rows, int64_t count, int64_t head_dim) {
  for (int64_t j = 0; j < count; ++j) prefetch_row(rows[j], head_dim);
}

// out_jd = row_jd as float32, zero from head_dim on.
template <typename X>
DEPTHPRUNE_INLINE void widen_rows(
    const typename X::storage* const* rows, int64_t count, int64_t head_dim, int64_t padded_dim, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    const typename X::storage* row = rows[j];
#pragma omp simd
    for (int64_t d = 0; d < head_dim; ++d) out[j * padded_dim + d] = X::widen(row[d]);
    for (int64_t d = head_dim; d < padded_dim; ++d) out[j * padded_dim + d] = 0.0f;
  }
}

// out_dj = row_jd as float32.
template <typename X>
DEPTHPRUNE_INLINE void transpose_rows(
    const typename X::storage* const* rows, int64_t count, int64_t head_dim, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    const typename X::storage* row = rows[j];
    for (int64_t d = 0; d < head_dim; ++d) out[d * kKeys + j] = X::widen(row[d]);
  }
}

// One row of scores, the largest being `top`, becomes weights e^(score - m); m and l move on. Returns what the sums so
// far are to be multiplied with. `columns` is a multiple of 16.
DEPTHPRUNE_INLINE float softmax_row(
    float* scores, int64_t columns, float top, float& m, float& l) {
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  const float next = top > m ? top : m;
  const float base = next == kMinusInf ? 0.0f : next;  // nothing visible so far
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < columns; ++j) {
    const float weight = fast_exp(scores[j] - base);
    scores[j] = weight;
    sum += weight;
  }
  const float keep = fast_exp(m - base);
  l = l * keep + sum;
  m = next;
  return keep;
}

// Up to kRows rows of a task against one tile of keys.
struct Block {
  int64_t first_row;
  int64_t rows;
  int64_t first_key;
  int64_t keys;  // of the tile; no row sees a later one
};

// The keys of a block that its row r sees.
struct Visible {
  int64_t begin, end;

  DEPTHPRUNE_INLINE Visible(const Problem& problem, const Task& task, const Block& block, int64_t r) {
    const int64_t position = task.position + (block.first_row + r) / problem.group;
    const int64_t oldest = problem.window > 0 ? position + 1 - problem.window : 0;
    begin = std::clamp<int64_t>(oldest - block.first_key, 0, block.keys);
    end = std::clamp<int64_t>(position + 1 - block.first_key, 0, block.keys);
  }
};

// The scores of a block, in scratch.scores and not wide yet, become the weights of its softmax; keep_r: see
// softmax_row.
template <int W>
DEPTHPRUNE_INLINE void weigh(const Problem& problem, const Task& task, const Block& block, Scratch& scratch, float* keep) {
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  const int64_t all_rows = task.num_queries * problem.group;
  const int64_t columns = (block.keys + 15) / 16 * 16;
  for (int64_t r = 0; r < block.rows; ++r) {
    const Visible visible(problem, task, block, r);
    float* scores = scratch.scores + r * kKeys;
    // Here rather than in the queries: a wide query is rounded, and an outlier channel multiplies that.
#pragma omp simd
    for (int64_t j = visible.begin; j < visible.end; ++j) scores[j] *= problem.scale;
    for (int64_t j = 0; j < visible.begin; ++j) scores[j] = kMinusInf;
    for (int64_t j = visible.end; j < columns; ++j) scores[j] = kMinusInf;
    float& m = scratch.sums[block.first_row + r];
    float& l = scratch.sums[all_rows + block.first_row + r];
    keep[r] = softmax_row(scores, columns, largest<W>(scores, columns), m, l);
  }
}

// Where the sums of a block's rows lie: [rows, padded_dim].
DEPTHPRUNE_INLINE float* sums_of(const Problem& problem, const Task& task, const Block& block, const Scratch& scratch) {
  return scratch.sums + 2 * task.num_queries * problem.group + block.first_row * problem.padded_dim();
}

// The values of a block, weighed, join its sums.
template <int W, typename B>
DEPTHPRUNE_INLINE void weigh_values(
    const Problem& problem, const Task& task, const Block& block, B values, Scratch& scratch) {
  const int64_t padded_dim = problem.padded_dim();
  float keep[kRows];
  weigh<W>(problem, task, block, scratch, keep);
  multiply<W>(
      block.rows, scratch.scores, kKeys, values, block.keys, padded_dim, sums_of(problem, task, block, scratch),
      padded_dim, keep);
}

#ifdef DEPTHPRUNE_BF16_PAIRS

// Keys and values of a tile, and the queries of all rows, as pairs: a head has an even number of dimensions.
struct Paired {
  static bool serves(const Problem& problem) {
    return problem.dtype == Dtype::bfloat16 && problem.head_dim % 2 == 0;
  }

  static DEPTHPRUNE_INLINE void read_queries(const Problem& problem, const Task& task, Scratch& scratch) {
    for (int64_t row = 0; row < task.num_queries * problem.group; ++row) {
      const auto* q = static_cast<const uint16_t*>(problem.q) +
                      (task.first_query + row / problem.group) * problem.q_strides[0] +
                      (task.kv_head * problem.group + row % problem.group) * problem.q_strides[1];  // [D]
      std::memcpy(scratch.q + row * problem.padded_dim(), q, problem.head_dim * sizeof(uint16_t));
    }
  }

  static DEPTHPRUNE_INLINE void read_tile(
      const Problem& problem, const uint16_t* const* k, const uint16_t* const* v, int64_t keys, Scratch& scratch) {
    pair_keys(k, keys, problem.head_dim, reinterpret_cast<Pair*>(scratch.k));
    pair_values(v, keys, problem.head_dim, problem.padded_dim(), reinterpret_cast<Pair*>(scratch.v));
  }

  static DEPTHPRUNE_INLINE void attend(const Problem& problem, const Task& task, const Block& block, Scratch& scratch) {
    const int64_t padded_dim = problem.padded_dim();
    const auto* q = reinterpret_cast<const Pair*>(scratch.q + block.first_row * padded_dim);
    const auto* k = reinterpret_cast<const Pair*>(scratch.k);
    const auto* v = reinterpret_cast<const Pair*>(scratch.v);
    const auto* weights = reinterpret_cast<const Pair*>(scratch.scores);
    const int64_t all_rows = task.num_queries * problem.group;
    multiply_pairs(
        block.rows, q, padded_dim, k, kKeys, problem.head_dim / 2, (block.keys + 15) / 16 * 16, scratch.scores, kKeys,
        nullptr, problem.scale);
    float keep[kRows];
    for (int64_t r = 0; r < block.rows; ++r) {
      const Visible visible(problem, task, block, r);
      const int64_t row = block.first_row + r;
      keep[r] = softmax_pairs(
          scratch.scores + r * kKeys, visible.begin, visible.end, scratch.sums[row], scratch.sums[all_rows + row]);
    }
    multiply_pairs(
        block.rows, weights, kKeys, v, padded_dim, (block.keys + 1) / 2, padded_dim,
        sums_of(problem, task, block, scratch), padded_dim, keep, 1.0f);
  }
};

#endif

// The scores of a block, queries [rows, padded_dim] against transposed keys. Long heads are summed in parts: one chain of
// 256 products in float32 errs several times as much as the matrix products of a library, whose sums are blocked.
template <int W>
DEPTHPRUNE_INLINE void score(const Problem& problem, int64_t rows, const float* q, const float* k, float* scores) {
  constexpr int64_t kPart = 64;
  const int64_t padded_dim = problem.padded_dim();
  multiply<W>(
      rows, q, padded_dim, Panel{k, kKeys}, std::min(kPart, problem.head_dim), kKeys, scores, kKeys, nullptr);
  for (int64_t d = kPart; d < problem.head_dim; d += kPart) {
    float part[kRows * kKeys];
    multiply<W>(
        rows, q + d, padded_dim, Panel{k + d * kKeys, kKeys}, std::min(kPart, problem.head_dim - d), kKeys, part,
        kKeys, nullptr);
#pragma omp simd
    for (int64_t i = 0; i < rows * kKeys; ++i) scores[i] += part[i];
  }
}

// All rows of a task against the keys first_key .. first_key + keys, whose rows are given. next: keys to ask for.
template <int W, typename X, Read read, typename T>
DEPTHPRUNE_INLINE void attend_tile(
    const Problem& problem, const Task& task, int64_t first_key, int64_t keys, const T* const* k, const T* const* v,
    Ahead<T> next, Scratch& scratch) {
  const int64_t padded_dim = problem.padded_dim();
  const int64_t all_rows = task.num_queries * problem.group;
  if constexpr (read == Read::kPairs) {
#ifdef DEPTHPRUNE_BF16_PAIRS
    Paired::read_tile(problem, k, v, keys, scratch);
#endif
  } else if constexpr (read == Read::kTransposed) {
    transpose_rows<X>(k, keys, problem.head_dim, scratch.k);
    widen_rows<X>(v, keys, problem.head_dim, padded_dim, scratch.v);
  }
  for (int64_t row = 0; row < all_rows; row += kRows) {
    Block block{row, std::min<int64_t>(kRows, all_rows - row), first_key, keys};
    const int64_t first = task.position + row / problem.group;
    const int64_t last = task.position + (row + block.rows - 1) / problem.group;
    block.keys = std::min(keys, last + 1 - first_key);
    if (block.keys <= 0 || (problem.window > 0 && first - problem.window >= first_key + keys - 1)) continue;
    const float* q = scratch.q + row * padded_dim;
    if constexpr (read == Read::kPairs) {
#ifdef DEPTHPRUNE_BF16_PAIRS
      Paired::attend(problem, task, block, scratch);
#endif
    } else if constexpr (read == Read::kTransposed) {
      score<W>(problem, block.rows, q, scratch.k, scratch.scores);
      weigh_values<W>(problem, task, block, Panel{scratch.v, padded_dim}, scratch);
    } else {
      const int64_t columns = (block.keys + 3) / 4 * 4;
      const bool first_block = row == 0;
      const Ahead<T> values{v, first_block && next.size > 0 ? columns : 0, problem.head_dim};
      dot<W>(block.rows, q, padded_dim, k, padded_dim, columns, scratch.scores, kKeys, values);
      weigh_values<W>(problem, task, block, Scattered<T>{v, first_block ? next : Ahead<T>{}}, scratch);
    }
  }
}

template <typename X>
DEPTHPRUNE_INLINE void read_queries(const Problem& problem, const Task& task, Scratch& scratch) {
  using T = typename X::storage;
  const int64_t padded_dim = problem.padded_dim();
  for (int64_t row = 0; row < task.num_queries * problem.group; ++row) {
    const T* q = static_cast<const T*>(problem.q) + (task.first_query + row / problem.group) * problem.q_strides[0] +
                 (task.kv_head * problem.group + row % problem.group) * problem.q_strides[1];  // [D]
    float* wide = scratch.q + row * padded_dim;
#pragma omp simd
    for (int64_t d = 0; d < problem.head_dim; ++d) wide[d] = X::widen(q[d]);
    for (int64_t d = problem.head_dim; d < padded_dim; ++d) wide[d] = 0.0f;
  }
}

// Tiles end at multiples of kKeys.
DEPTHPRUNE_INLINE int64_t tile_end(const Task& task, int64_t first) {
  return std::min(task.end_key, (first / kKeys + 1) * kKeys);
}

template <int W, typename X, Read read>
DEPTHPRUNE_INLINE void attend_keys(const Problem& problem, const Task& task, Scratch& scratch) {
  using T = typename X::storage;
  const int64_t padded_dim = problem.padded_dim();
  const T* rows[2][2][kKeys];  // of keys and values, of this tile and of the next
  int64_t end = tile_end(task, task.first_key);
  find_rows(problem, task, problem.k, task.first_key, end - task.first_key, rows[0][0]);
  find_rows(problem, task, problem.v, task.first_key, end - task.first_key, rows[0][1]);
  if constexpr (read == Read::kInPlace) prefetch_rows(rows[0][0], end - task.first_key, problem.head_dim);
  int tile = 0;
  for (int64_t first = task.first_key; first < task.end_key; tile = 1 - tile) {
    const int64_t keys = end - first;
    const T* const* k = rows[tile][0];
    const T* const* v = rows[tile][1];
    Ahead<T> next{nullptr, 0, problem.head_dim};
    if (end < task.end_key) {
      const int64_t more = tile_end(task, end) - end;
      find_rows(problem, task, problem.k, end, more, rows[1 - tile][0]);
      find_rows(problem, task, problem.v, end, more, rows[1 - tile][1]);
      if constexpr (read == Read::kInPlace) {
        next = {rows[1 - tile][0], more, problem.head_dim};  // this tile's values are asked for with its keys
      } else {
        prefetch_rows(rows[1 - tile][0], more, problem.head_dim);
        prefetch_rows(rows[1 - tile][1], more, problem.head_dim);
      }
    }
    if constexpr (read == Read::kWidened) {
      const float* wide_k[kKeys];
      const float* wide_v[kKeys];
      widen_rows<X>(k, keys, problem.head_dim, padded_dim, scratch.k);
      widen_rows<X>(v, keys, problem.head_dim, padded_dim, scratch.v);
      for (int64_t j = 0; j < kKeys; ++j) {
        wide_k[j] = scratch.k + std::min(j, keys - 1) * padded_dim;
        wide_v[j] = scratch.v + std::min(j, keys - 1) * padded_dim;
      }
      attend_tile<W, Float32, read>(problem, task, first, keys, wide_k, wide_v, Ahead<float>{}, scratch);
    } else {
      attend_tile<W, X, read>(problem, task, first, keys, k, v, next, scratch);
    }
    first = end;
    end = tile_end(task, end);
  }
}

// pairs: bfloat16 is multiplied in pairs where a task has many rows.
template <int W, bool pairs, typename X>
DEPTHPRUNE_INLINE void attend_as(const Problem& problem, const Task& task, Scratch& scratch, float* partials) {
  const int64_t rows = task.num_queries * problem.group;
  const int64_t sums = rows * (problem.padded_dim() + 2);
  bool paired = false;
#ifdef DEPTHPRUNE_BF16_PAIRS
  if constexpr (pairs && std::is_same_v<X, BFloat16>) paired = !task.few_rows && Paired::serves(problem);
  if (paired) Paired::read_queries(problem, task, scratch);
#endif
  if (!paired) read_queries<X>(problem, task, scratch);
  std::fill(scratch.sums, scratch.sums + rows, -std::numeric_limits<float>::infinity());
  std::fill(scratch.sums + rows, scratch.sums + sums, 0.0f);
  if (paired) {
    if constexpr (pairs && std::is_same_v<X, BFloat16>) attend_keys<W, X, Read::kPairs>(problem, task, scratch);
  } else if (!task.few_rows) {
    attend_keys<W, X, Read::kTransposed>(problem, task, scratch);
  } else if (!problem.in_place()) {
    attend_keys<W, X, Read::kWidened>(problem, task, scratch);
  } else if constexpr (!std::is_same_v<X, Float16>) {
    attend_keys<W, X, Read::kInPlace>(problem, task, scratch);
  }
  if (task.partial >= 0) {
    std::memcpy(partials + task.partial, scratch.sums, sums * sizeof(float));
  } else {
    write_output<X>(problem, task, scratch.sums + rows, scratch.sums + 2 * rows);
  }
}

template <int W, bool pairs>
DEPTHPRUNE_INLINE void attend(const Problem& problem, const Task& task, Scratch& scratch, float* partials) {
  switch (problem.dtype) {
    case Dtype::bfloat16: return attend_as<W, pairs, BFloat16>(problem, task, scratch, partials);
    case Dtype::float16: return attend_as<W, false, Float16>(problem, task, scratch, partials);
    default: return attend_as<W, false, Float32>(problem, task, scratch, partials);
  }
}

}  // namespace depthprune::attention
