// The end of attention: sums to outputs, and sums over ranges of keys to sums over all.
#pragma once

#include <cstdint>
#include <limits>

#include "cpu/attention/task.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/exp.h"

namespace depthprune::attention {

template <typename X>
DEPTHPRUNE_INLINE void write_output(const Problem& problem, const Task& task, const float* l, const float* o) {
  using T = typename X::storage;
  const int64_t padded_dim = problem.padded_dim();
  for (int64_t row = 0; row < task.num_queries * problem.group; ++row) {
    T* out = static_cast<T*>(problem.out) + (task.first_query + row / problem.group) * problem.out_strides[0] +
             (task.kv_head * problem.group + row % problem.group) * problem.out_strides[1];  // [D]
    const float factor = 1.0f / l[row];
#pragma omp simd
    for (int64_t d = 0; d < problem.head_dim; ++d) out[d] = X::narrow(o[row * padded_dim + d] * factor);
  }
}

// The partial sums of a task whose keys were split over `splits` tasks, added up in their order.
template <typename X>
DEPTHPRUNE_INLINE void combine_as(const Problem& problem, const Task& task, int64_t splits, float* partials) {
  const int64_t rows = task.num_queries * problem.group;
  const int64_t padded_dim = problem.padded_dim();
  const int64_t size = rows * (padded_dim + 2);
  float* total = partials + task.partial;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 1; i < splits; ++i) {
      const float* part = total + i * size;
      const float m = part[row] > total[row] ? part[row] : total[row];
      const float base = m == -std::numeric_limits<float>::infinity() ? 0.0f : m;
      const float keep = fast_exp(total[row] - base);
      const float factor = fast_exp(part[row] - base);
      total[row] = m;
      total[rows + row] = total[rows + row] * keep + part[rows + row] * factor;
      float* o = total + 2 * rows + row * padded_dim;
      const float* more = part + 2 * rows + row * padded_dim;
#pragma omp simd
      for (int64_t d = 0; d < padded_dim; ++d) o[d] = o[d] * keep + more[d] * factor;
    }
  }
  write_output<X>(problem, task, total + rows, total + 2 * rows);
}

}  // namespace depthprune::attention
