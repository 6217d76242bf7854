// New keys and values into their slots of the paged KV cache, both in one pass. Contract:
// depthprune_runtime/ops/kv_cache.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/check.h"

namespace depthprune {
namespace {

constexpr int64_t kGrain = 65536;  // bytes that are worth a second thread

// [T, K, D] to [N, P, K, D], strides in bytes; the vectors of D elements are dense.
struct Copy {
  const char* from;
  char* to;
  int64_t from_strides[2];
  int64_t to_strides[3];

  void token(int64_t t, int64_t block, int64_t offset, int64_t heads, int64_t head_bytes) const {
    const char* source = from + t * from_strides[0];
    char* target = to + block * to_strides[0] + offset * to_strides[1];
    for (int64_t h = 0; h < heads; ++h) {
      std::memcpy(target + h * to_strides[2], source + h * from_strides[1], head_bytes);
    }
  }
};

Copy copy_of(const at::Tensor& x, const at::Tensor& cache) {
  const int64_t bytes = x.element_size();
  return {
      static_cast<const char*>(x.const_data_ptr()),
      static_cast<char*>(cache.mutable_data_ptr()),
      {x.stride(0) * bytes, x.stride(1) * bytes},
      {cache.stride(0) * bytes, cache.stride(1) * bytes, cache.stride(2) * bytes}};
}

void check_pair(
    const at::Tensor& x, const char* name, const at::Tensor& cache, const char* cache_name, const at::Tensor& like) {
  const char* op = "kv_write";
  DEPTHPRUNE_CHECK(x.dim() == 3 && x.size(0) == like.size(0), op, name, "shape [T, K, D]", x.sizes());
  DEPTHPRUNE_CHECK(
      cache.dim() == 4 && cache.size(1) > 0 && cache.size(2) == x.size(1) && cache.size(3) == x.size(2), op, cache_name,
      c10::str("shape [N, P, ", x.size(1), ", ", x.size(2), "]"), cache.sizes());
  DEPTHPRUNE_CHECK(
      cache.scalar_type() == x.scalar_type(), op, cache_name,
      c10::str("dtype ", x.scalar_type(), " (that of ", name, ")"), cache.scalar_type());
  DEPTHPRUNE_CHECK(x.is_cpu() && cache.is_cpu(), op, cache_name, "device cpu, as the other tensors", cache.device());
  DEPTHPRUNE_CHECK(
      cache.stride(3) == 1 || cache.size(3) == 1, op, cache_name, "a dense last dimension",
      c10::str("stride ", cache.stride(3)));
}

void kv_write(
    const at::Tensor& k,               // [T, K, D]
    const at::Tensor& v,               // [T, K, D]
    at::Tensor& k_cache,               // [N, P, K, D], written in place
    at::Tensor& v_cache,               // [N, P, K, D], written in place
    const at::Tensor& slot_mapping) {  // [T]
  const char* op = "kv_write";
  DEPTHPRUNE_CHECK(k.dim() == 3, op, "k", "shape [T, K, D]", k.sizes());
  check_pair(k, "k", k_cache, "k_cache", k);
  check_pair(v, "v", v_cache, "v_cache", k);
  DEPTHPRUNE_CHECK(
      v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == k_cache.size(1), op, "v_cache",
      c10::str("as many kv_blocks as k_cache, ", k_cache.sizes()), v_cache.sizes());
  DEPTHPRUNE_CHECK(
      slot_mapping.dim() == 1 && slot_mapping.size(0) == k.size(0), op, "slot_mapping",
      c10::str("shape [", k.size(0), "]"), slot_mapping.sizes());
  DEPTHPRUNE_CHECK(
      slot_mapping.scalar_type() == at::kLong && slot_mapping.is_cpu(), op, "slot_mapping", "dtype int64 on the cpu",
      c10::str(slot_mapping.scalar_type(), " on ", slot_mapping.device()));
  const int64_t size = k_cache.size(1);
  const int64_t slots = k_cache.size(0) * size;
  const at::Tensor mapping = slot_mapping.contiguous();
  const int64_t* slot = mapping.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < k.size(0); ++t) {
    DEPTHPRUNE_CHECK(
        slot[t] >= 0 && slot[t] < slots, op, "slot_mapping", c10::str("slots from 0 to ", slots - 1),
        c10::str(slot[t], " at index ", t));
  }
  if (k.numel() == 0 && v.numel() == 0) return;
  const at::Tensor dense_k = k.stride(2) == 1 ? k : k.contiguous();
  const at::Tensor dense_v = v.stride(2) == 1 ? v : v.contiguous();
  const Copy keys = copy_of(dense_k, k_cache);
  const Copy values = copy_of(dense_v, v_cache);
  const int64_t key_bytes = k.size(2) * k.element_size();
  const int64_t value_bytes = v.size(2) * v.element_size();
  const int64_t token_bytes = k.size(1) * key_bytes + v.size(1) * value_bytes;
  // In order on one thread below the grain; slots are distinct, so threads never meet.
  at::parallel_for(0, k.size(0), std::max<int64_t>(1, kGrain / token_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      keys.token(t, slot[t] / size, slot[t] % size, k.size(1), key_bytes);
      values.token(t, slot[t] / size, slot[t] % size, v.size(1), value_bytes);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CPU, m) { m.impl("kv_write", &kv_write); }

}  // namespace depthprune
