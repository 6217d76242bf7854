// Causal grouped-query attention over the paged KV cache and over packed sequences, one code for both; contract:
// depthprune_runtime/ops/attention.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common/check.h"
#include "common/dtype_of.h"
#include "cpu/attention/plan.h"

namespace depthprune {
namespace {

using attention::Plan;
using attention::Problem;
using attention::Request;
using attention::Scratch;

constexpr int64_t kGrain = 65536;  // multiply-adds that are worth a second thread

void execute(const Problem& problem, const Plan& plan) {
  const int64_t count = static_cast<int64_t>(plan.tasks.size());
  std::vector<float> partials(plan.partial_size);
  const attention::Attend attend = attention::best_attend();
  // Tasks differ in length, so threads take them one by one.
  std::atomic<int64_t> next = 0;
  const auto work_off = [&](int64_t, int64_t) {
    Scratch scratch(plan.most_rows, problem.padded_dim(), plan.panels);
    for (int64_t i = next++; i < count; i = next++) attend(problem, plan.tasks[i], scratch, partials.data());
  };
  const int64_t threads = std::min<int64_t>({at::get_num_threads(), count, 1 + plan.work / kGrain});
  at::parallel_for(0, threads, 1, work_off);
  at::parallel_for(0, static_cast<int64_t>(plan.splits.size()), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      attention::combine(problem, plan, plan.splits[i], partials.data());
    }
  });
}

void check_query(
    const char* op, const at::Tensor& q, const char* name, const at::Tensor& k, const at::Tensor& v, int64_t window) {
  const int64_t dims = k.dim();
  DEPTHPRUNE_CHECK(
      q.dim() == 3 && q.size(1) > 0 && q.size(2) > 0, op, "q", "shape [T, H, D] with H and D of at least 1", q.sizes());
  DEPTHPRUNE_CHECK(window >= 0, op, "window", "at least 0 (0: all tokens)", window);
  DEPTHPRUNE_CHECK(is_known(q.scalar_type()), op, "q", "dtype bfloat16, float16 or float32", q.scalar_type());
  DEPTHPRUNE_CHECK(
      k.size(dims - 1) == q.size(2) && k.size(dims - 2) > 0 && q.size(1) % k.size(dims - 2) == 0, op, name,
      c10::str("shape [..., K, ", q.size(2), "] where K divides the ", q.size(1), " heads of q"), k.sizes());
  DEPTHPRUNE_CHECK(v.sizes() == k.sizes(), op, "values", c10::str("shape ", k.sizes(), " (that of keys)"), v.sizes());
  for (const at::Tensor* t : {&k, &v}) {
    DEPTHPRUNE_CHECK(
        t->scalar_type() == q.scalar_type(), op, "keys and values", c10::str("dtype ", q.scalar_type(), " (that of q)"),
        t->scalar_type());
    DEPTHPRUNE_CHECK(t->is_cpu(), op, "keys and values", "device cpu", t->device());
    DEPTHPRUNE_CHECK(
        t->stride(dims - 1) == 1 || t->size(dims - 1) == 1, op, "keys and values", "a dense last dimension",
        c10::str("stride ", t->stride(dims - 1)));
  }
}

// A dense int64 [sizes] on the CPU.
at::Tensor integers(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  DEPTHPRUNE_CHECK(
      t.scalar_type() == at::kLong || t.scalar_type() == at::kInt, op, name, "dtype int64 or int32", t.scalar_type());
  DEPTHPRUNE_CHECK(t.is_cpu(), op, name, "device cpu", t.device());
  DEPTHPRUNE_CHECK(t.sizes() == sizes, op, name, c10::str("shape ", sizes), t.sizes());
  return t.to(at::kLong).contiguous();
}

void check_bounds(const char* op, const char* name, const int64_t* bounds, int64_t requests, int64_t tokens) {
  DEPTHPRUNE_CHECK(bounds[0] == 0, op, name, "first value 0", bounds[0]);
  for (int64_t b = 0; b < requests; ++b) {
    DEPTHPRUNE_CHECK(
        bounds[b + 1] >= bounds[b], op, name, "values that do not fall",
        c10::str(bounds[b + 1], " after ", bounds[b], " at index ", b + 1));
  }
  DEPTHPRUNE_CHECK(
      bounds[requests] == tokens, op, name, c10::str("last value ", tokens, " (the tokens of q)"), bounds[requests]);
}

Problem problem_of(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, double scale,
    int64_t window) {
  const int64_t token = k.dim() - 3;  // the dimension of tokens
  const auto source = [token](const at::Tensor& t) {
    return attention::Source{t.const_data_ptr(), token > 0 ? t.stride(0) : 0, t.stride(token), t.stride(token + 1)};
  };
  Problem problem{};
  problem.q = q.const_data_ptr();
  problem.out = out.mutable_data_ptr();
  problem.k = source(k);
  problem.v = source(v);
  for (int i = 0; i < 2; ++i) {
    problem.q_strides[i] = q.stride(i);
    problem.out_strides[i] = out.stride(i);
  }
  problem.block_size = token > 0 ? k.size(1) : 0;
  problem.head_dim = q.size(2);
  problem.group = q.size(1) / k.size(token + 1);
  problem.window = window;
  problem.scale = static_cast<float>(scale);
  problem.dtype = dtype_of(q.scalar_type());
  return problem;
}

at::Tensor dense_last(const at::Tensor& q) { return q.stride(2) == 1 || q.size(2) == 1 ? q : q.contiguous(); }

at::Tensor paged_attention(
    const at::Tensor& input,         // [T, H, D]
    const at::Tensor& k_cache,       // [N, P, K, D]
    const at::Tensor& v_cache,       // [N, P, K, D]
    const at::Tensor& block_tables,  // [B, M]
    const at::Tensor& context_lens,  // [B]
    const at::Tensor& cu_seqlens_q,  // [B + 1]
    double scale, int64_t window) {  // -> [T, H, D]
  const char* op = "paged_attention";
  DEPTHPRUNE_CHECK(k_cache.dim() == 4 && k_cache.size(1) > 0, op, "k_cache", "shape [N, P, K, D]", k_cache.sizes());
  check_query(op, input, "k_cache", k_cache, v_cache, window);
  DEPTHPRUNE_CHECK(block_tables.dim() == 2, op, "block_tables", "shape [B, M]", block_tables.sizes());
  const int64_t requests = block_tables.size(0);
  const int64_t width = block_tables.size(1);
  const at::Tensor tables = integers(op, "block_tables", block_tables, {requests, width});
  const at::Tensor contexts = integers(op, "context_lens", context_lens, {requests});
  const at::Tensor bounds = integers(op, "cu_seqlens_q", cu_seqlens_q, {requests + 1});
  const int64_t* bound = bounds.const_data_ptr<int64_t>();
  check_bounds(op, "cu_seqlens_q", bound, requests, input.size(0));

  const at::Tensor q = dense_last(input);
  at::Tensor out = at::empty_like(q);
  const Problem problem = problem_of(q, k_cache, v_cache, out, scale, window);
  Plan plan;
  for (int64_t b = 0; b < requests; ++b) {
    const int64_t context = contexts.const_data_ptr<int64_t>()[b];
    const int64_t* table = tables.const_data_ptr<int64_t>() + b * width;
    const Request request{bound[b], bound[b + 1] - bound[b], context, table, 0};
    DEPTHPRUNE_CHECK(
        context >= request.num_queries && context <= width * problem.block_size, op, "context_lens",
        c10::str("values from ", request.num_queries, " (queries) to ", width * problem.block_size, " (room)"),
        c10::str(context, " for request ", b));
    if (request.num_queries == 0) continue;
    const int64_t oldest = attention::oldest_visible(problem, context - request.num_queries);
    for (int64_t i = oldest / problem.block_size; i <= (context - 1) / problem.block_size; ++i) {
      DEPTHPRUNE_CHECK(
          table[i] >= 0 && table[i] < k_cache.size(0), op, "block_tables",
          c10::str("kv_blocks from 0 to ", k_cache.size(0) - 1), c10::str(table[i], " at [", b, ", ", i, "]"));
    }
    add_tasks(problem, k_cache.size(2), request, plan);
  }
  if (!plan.tasks.empty()) execute(problem, plan);
  return out;
}

at::Tensor varlen_attention(
    const at::Tensor& input,         // [T, H, D]
    const at::Tensor& k,             // [T, K, D]
    const at::Tensor& v,             // [T, K, D]
    const at::Tensor& cu_seqlens,    // [B + 1]
    double scale, int64_t window) {  // -> [T, H, D]
  const char* op = "varlen_attention";
  DEPTHPRUNE_CHECK(k.dim() == 3, op, "k", "shape [T, K, D]", k.sizes());
  check_query(op, input, "k", k, v, window);
  DEPTHPRUNE_CHECK(
      k.size(0) == input.size(0), op, "k", c10::str("shape [", input.size(0), ", K, D] (the tokens of q)"), k.sizes());
  DEPTHPRUNE_CHECK(
      cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, op, "cu_seqlens", "shape [B + 1]", cu_seqlens.sizes());
  const int64_t requests = cu_seqlens.size(0) - 1;
  const at::Tensor bounds = integers(op, "cu_seqlens", cu_seqlens, {requests + 1});
  const int64_t* bound = bounds.const_data_ptr<int64_t>();
  check_bounds(op, "cu_seqlens", bound, requests, input.size(0));

  const at::Tensor q = dense_last(input);
  at::Tensor out = at::empty_like(q);
  const Problem problem = problem_of(q, k, v, out, scale, window);
  Plan plan;
  for (int64_t b = 0; b < requests; ++b) {
    const int64_t length = bound[b + 1] - bound[b];
    if (length > 0) add_tasks(problem, k.size(1), Request{bound[b], length, length, nullptr, bound[b]}, plan);
  }
  if (!plan.tasks.empty()) execute(problem, plan);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) {
  m.impl("paged_attention", &paged_attention);
  // Also where torch has its own: without copying strided q, k, v, and faster than its attention at 64 to 1024 tokens
  // (bf16 and fp32, 9 heads of 64 on one core of an AMD EPYC).
  m.impl("varlen_attention", &varlen_attention);
}

}  // namespace depthprune
