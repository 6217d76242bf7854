// How a request is cut into tasks: by KV head, tile of queries and, where it has one tile only, range of keys (flash
// decoding). The cut depends on the request alone, and partial sums are added in the order of the keys: a result does
// not change with the batch around it or with the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention/task.h"

namespace depthprune::attention {

// One KV head whose keys were split over `count` tasks; `first` is the first of them.
struct Split {
  int64_t first;
  int64_t count;
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<Split> splits;
  int64_t partial_size = 0;  // floats
  int64_t most_rows = 0;
  int64_t work = 0;  // multiply-adds
  bool panels = false;
};

// Queries first_query .. + num_queries, the last of `context` tokens.
struct Request {
  int64_t first_query;
  int64_t num_queries;
  int64_t context;
  const int64_t* table;  // [M]; null: not paged
  int64_t first_token;
};

// The first position that any query from `position` on sees.
int64_t oldest_visible(const Problem& problem, int64_t position);

// `problem` needs no pointers yet.
void add_tasks(const Problem& problem, int64_t num_kv_heads, const Request& request, Plan& plan);

// The code for the instruction level in force (simd/level.h).
Attend best_attend();

// Partial sums of the keys of `split` to outputs.
void combine(const Problem& problem, const Plan& plan, const Split& split, float* partials);

}  // namespace depthprune::attention
