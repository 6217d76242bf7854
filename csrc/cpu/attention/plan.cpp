#include "cpu/attention/plan.h"

#include <algorithm>

#include "cpu/attention/output.h"
#include "cpu/simd/clones.h"
#include "cpu/simd/formats.h"
#include "cpu/simd/level.h"

namespace depthprune::attention {
namespace {

constexpr int64_t kTileRows = 192;  // queries times heads of a tile
constexpr int64_t kSplit = 256;     // keys of a task where keys are split

}  // namespace

// The first position that any query from `position` on sees.
int64_t oldest_visible(const Problem& problem, int64_t position) {
  return problem.window > 0 ? std::max<int64_t>(0, position + 1 - problem.window) : 0;
}

// v4 and v3 need a little more than the levels avx512 and avx2.
Attend best_attend() {
#if DEPTHPRUNE_HAS_CLONES
  static const bool v4 = __builtin_cpu_supports("x86-64-v4");
  static const bool v3 = __builtin_cpu_supports("x86-64-v3");
  if (level() >= Level::avx512_bf16 && v4) return attend_avx512_bf16;
  if (level() >= Level::avx512 && v4) return attend_avx512;
  if (level() >= Level::avx2 && v3) return attend_avx2;
#endif
  return attend_generic;
}

namespace {

DEPTHPRUNE_CLONES void combine_any(const Problem& problem, const Task& task, int64_t splits, float* partials) {
  switch (problem.dtype) {
    case Dtype::bfloat16: return combine_as<BFloat16>(problem, task, splits, partials);
    case Dtype::float16: return combine_as<Float16>(problem, task, splits, partials);
    default: return combine_as<Float32>(problem, task, splits, partials);
  }
}

}  // namespace

void combine(const Problem& problem, const Plan& plan, const Split& split, float* partials) {
  combine_any(problem, plan.tasks[split.first], split.count, partials);
}

void add_tasks(const Problem& problem, int64_t num_kv_heads, const Request& request, Plan& plan) {
  const int64_t tile = std::max<int64_t>(1, kTileRows / problem.group);
  const int64_t tiles = (request.num_queries + tile - 1) / tile;
  Task task{};
  task.table = request.table;
  task.first_token = request.first_token;
  task.few_rows = request.num_queries * problem.group <= kFewRows;
  task.partial = -1;
  plan.panels |= !task.few_rows || !problem.in_place();
  plan.most_rows = std::max(plan.most_rows, std::min(tile, request.num_queries) * problem.group);
  const auto place = [&](int64_t i) {  // at tile i, all its keys
    task.first_query = request.first_query + i * tile;
    task.num_queries = std::min(tile, request.num_queries - i * tile);
    task.position = request.context - request.num_queries + i * tile;
    task.first_key = oldest_visible(problem, task.position);
    task.end_key = task.position + task.num_queries;
    const int64_t rows = num_kv_heads * task.num_queries * problem.group;
    plan.work += rows * (task.end_key - task.first_key) * 2 * problem.padded_dim();
  };
  if (tiles > 1) {
    // Head by head, so that its keys stay in the cache; the longest tile first: threads end at about the same time.
    for (task.kv_head = 0; task.kv_head < num_kv_heads; ++task.kv_head) {
      for (int64_t i = tiles - 1; i >= 0; --i) {
        place(i);
        plan.tasks.push_back(task);
      }
    }
    return;
  }
  place(0);
  const int64_t first_key = task.first_key;
  const int64_t end_key = task.end_key;
  const int64_t splits = (end_key - 1) / kSplit - first_key / kSplit + 1;
  const int64_t size = task.num_queries * problem.group * (problem.padded_dim() + 2);
  if (splits > 1) {
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      plan.splits.push_back({static_cast<int64_t>(plan.tasks.size()) + head, splits});
    }
  }
  // Range by range, its heads one after the other: they lie in the same pages.
  for (int64_t i = 0; i < splits; ++i) {
    task.first_key = std::max(first_key, (first_key / kSplit + i) * kSplit);
    task.end_key = std::min(end_key, (first_key / kSplit + i + 1) * kSplit);
    for (task.kv_head = 0; task.kv_head < num_kv_heads; ++task.kv_head) {
      if (splits > 1) task.partial = plan.partial_size + (task.kv_head * splits + i) * size;
      plan.tasks.push_back(task);
    }
  }
  if (splits > 1) plan.partial_size += num_kv_heads * splits * size;
}

}  // namespace depthprune::attention
