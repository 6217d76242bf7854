// From tensors to the kernel of rotary.cu. Contracts: depthprune_runtime/ops/rotary.py, rotary_kv_write.py.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>

#include "common/check.h"
#include "common/dtype_of.h"
#include "cuda/rotary.h"

namespace depthprune::cuda {
namespace {

void check_same(const char* op, const char* name, const at::Tensor& t, const at::Tensor& q) {
  DEPTHPRUNE_CHECK(
      t.scalar_type() == q.scalar_type(), op, name, c10::str("dtype ", q.scalar_type(), " (that of q)"),
      t.scalar_type());
  DEPTHPRUNE_CHECK(t.device() == q.device(), op, name, c10::str("device ", q.device(), " (that of q)"), t.device());
}

void check_rotation(
    const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos_sin, const at::Tensor& positions) {
  DEPTHPRUNE_CHECK(q.dim() == 3 && q.size(2) % 2 == 0, op, "q", "shape [T, H, D] with an even D", q.sizes());
  DEPTHPRUNE_CHECK(is_known(q.scalar_type()), op, "q", "dtype bfloat16, float16 or float32", q.scalar_type());
  DEPTHPRUNE_CHECK(
      k.dim() == 3 && k.size(0) == q.size(0) && k.size(2) == q.size(2), op, "k",
      c10::str("shape [", q.size(0), ", K, ", q.size(2), "]"), k.sizes());
  check_same(op, "k", k, q);
  const int64_t half = q.size(2) / 2;
  DEPTHPRUNE_CHECK(
      cos_sin.dim() == 3 && cos_sin.size(1) == 2 && cos_sin.size(2) == half, op, "cos_sin",
      c10::str("shape [S, 2, ", half, "]"), cos_sin.sizes());
  DEPTHPRUNE_CHECK(
      cos_sin.scalar_type() == at::kFloat && cos_sin.device() == q.device(), op, "cos_sin",
      c10::str("dtype Float on ", q.device()), c10::str(cos_sin.scalar_type(), " on ", cos_sin.device()));
  DEPTHPRUNE_CHECK(
      positions.dim() == 1 && positions.size(0) == q.size(0), op, "positions", c10::str("shape [", q.size(0), "]"),
      positions.sizes());
  DEPTHPRUNE_CHECK(
      (positions.scalar_type() == at::kLong || positions.scalar_type() == at::kInt) && positions.device() == q.device(),
      op, "positions", c10::str("dtype int64 or int32 on ", q.device()),
      c10::str(positions.scalar_type(), " on ", positions.device()));
}

void check_cache(
    const char* op, const char* name, const at::Tensor& cache, const at::Tensor& k, const at::Tensor& k_cache) {
  DEPTHPRUNE_CHECK(
      cache.dim() == 4 && cache.size(1) > 0 && cache.size(2) == k.size(1) && cache.size(3) == k.size(2), op, name,
      c10::str("shape [N, P, ", k.size(1), ", ", k.size(2), "]"), cache.sizes());
  DEPTHPRUNE_CHECK(
      cache.size(0) == k_cache.size(0) && cache.size(1) == k_cache.size(1), op, name,
      c10::str("as many kv_blocks as k_cache, ", k_cache.sizes()), cache.sizes());
  check_same(op, name, cache, k);
  DEPTHPRUNE_CHECK(
      cache.stride(3) == 1 || cache.size(3) == 1, op, name, "a dense last dimension",
      c10::str("stride ", cache.stride(3)));
}

void check_gain(const char* op, const char* name, const std::optional<at::Tensor>& gain, const at::Tensor& x) {
  if (!gain) return;
  DEPTHPRUNE_CHECK(
      gain->sizes() == x.sizes().slice(1), op, name, c10::str("shape ", x.sizes().slice(1)), gain->sizes());
  DEPTHPRUNE_CHECK(
      (gain->scalar_type() == x.scalar_type() || gain->scalar_type() == at::kFloat) && gain->device() == x.device(), op,
      name, c10::str("dtype ", x.scalar_type(), " (that of q) or Float on ", x.device()),
      c10::str(gain->scalar_type(), " on ", gain->device()));
}

// x, or a dense copy where its last dimension is strided, which the engine never has.
at::Tensor with_heads(const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

Heads heads_of(const at::Tensor& x, const std::optional<at::Tensor>& gain) {
  Heads heads{x.mutable_data_ptr(), x.stride(0), x.stride(1), x.size(1), nullptr, Dtype::float32};
  if (gain) {
    heads.gain = gain->const_data_ptr();
    heads.gain_dtype = dtype_of(gain->scalar_type());
  }
  return heads;
}

Cache cache_of(const at::Tensor& cache) {
  return {cache.mutable_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

std::optional<at::Tensor> dense(const std::optional<at::Tensor>& gain) {
  return gain ? std::optional<at::Tensor>(gain->contiguous()) : std::nullopt;
}

// Completes `rotation`, which may name values and caches, and runs it; q and k are written in place.
void run(
    const char* op, Rotation rotation,
    const at::Tensor& q,                      // [T, H, D]
    const at::Tensor& k,                      // [T, K, D]
    const std::optional<at::Tensor>& q_norm,  // [H, D]
    const std::optional<at::Tensor>& k_norm,  // [K, D]
    const at::Tensor& cos_sin,                // [S, 2, D/2]
    const at::Tensor& positions) {            // [T]
  const at::Tensor queries = with_heads(q);
  const at::Tensor keys = with_heads(k);
  const std::optional<at::Tensor> q_gain = dense(q_norm);
  const std::optional<at::Tensor> k_gain = dense(k_norm);
  const at::Tensor table = cos_sin.contiguous();
  const at::Tensor places = positions.to(at::kLong).contiguous();
  rotation.q = heads_of(queries, q_gain);
  rotation.k = heads_of(keys, k_gain);
  rotation.cos_sin = table.const_data_ptr<float>();
  rotation.positions = places.const_data_ptr<int64_t>();
  rotation.num_tokens = q.size(0);
  rotation.num_positions = table.size(0);
  rotation.half = q.size(2) / 2;
  rotation.dtype = dtype_of(q.scalar_type());
  rotate(op, rotation, c10::cuda::getCurrentCUDAStream(q.get_device()).stream());
  if (!queries.is_same(q)) q.copy_(queries);
  if (!keys.is_same(k)) k.copy_(keys);
}

void rotary(
    at::Tensor& q,                  // [T, H, D], rotated in place
    at::Tensor& k,                  // [T, K, D], rotated in place
    const at::Tensor& cos_sin,      // [S, 2, D/2] float32
    const at::Tensor& positions) {  // [T]
  check_rotation("rotary", q, k, cos_sin, positions);
  const c10::DeviceGuard guard(q.device());
  run("rotary", Rotation{}, q, k, std::nullopt, std::nullopt, cos_sin, positions);
}

void rotary_kv_write(
    at::Tensor& q,                            // [T, H, D], normalised and rotated in place
    at::Tensor& k,                            // [T, K, D], normalised and rotated in place
    const at::Tensor& v,                      // [T, K, D]
    const std::optional<at::Tensor>& q_norm,  // [H, D]
    const std::optional<at::Tensor>& k_norm,  // [K, D]
    double eps,
    const at::Tensor& cos_sin,         // [S, 2, D/2] float32
    const at::Tensor& positions,       // [T]
    at::Tensor& k_cache,               // [N, P, K, D], written in place
    at::Tensor& v_cache,               // [N, P, K, D], written in place
    const at::Tensor& slot_mapping) {  // [T]
  constexpr const char* op = "rotary_kv_write";
  check_rotation(op, q, k, cos_sin, positions);
  DEPTHPRUNE_CHECK(v.sizes() == k.sizes(), op, "v", c10::str("shape ", k.sizes(), " (that of k)"), v.sizes());
  check_same(op, "v", v, q);
  check_gain(op, "q_norm", q_norm, q);
  check_gain(op, "k_norm", k_norm, k);
  check_cache(op, "k_cache", k_cache, k, k_cache);
  check_cache(op, "v_cache", v_cache, k, k_cache);
  DEPTHPRUNE_CHECK(
      slot_mapping.dim() == 1 && slot_mapping.size(0) == k.size(0), op, "slot_mapping",
      c10::str("shape [", k.size(0), "]"), slot_mapping.sizes());
  DEPTHPRUNE_CHECK(
      slot_mapping.scalar_type() == at::kLong && slot_mapping.device() == q.device(), op, "slot_mapping",
      c10::str("dtype int64 on ", q.device()), c10::str(slot_mapping.scalar_type(), " on ", slot_mapping.device()));
  const c10::DeviceGuard guard(q.device());
  const at::Tensor values = with_heads(v);
  const at::Tensor slots = slot_mapping.contiguous();
  Rotation rotation{};
  // Only read: values are stored in the cache and left as they are.
  rotation.v = {
      const_cast<void*>(values.const_data_ptr()),
      values.stride(0),
      values.stride(1),
      values.size(1),
      nullptr,
      Dtype::float32};
  rotation.k_cache = cache_of(k_cache);
  rotation.v_cache = cache_of(v_cache);
  rotation.slot_mapping = slots.const_data_ptr<int64_t>();
  rotation.num_slots = k_cache.size(0) * k_cache.size(1);
  rotation.block_size = k_cache.size(1);
  rotation.eps = static_cast<float>(eps);
  run(op, rotation, q, k, q_norm, k_norm, cos_sin, positions);
}

}  // namespace

TORCH_LIBRARY_IMPL(depthprune, CUDA, m) {
  m.impl("rotary", &rotary);
  m.impl("rotary_kv_write", &rotary_kv_write);
}

}  // namespace depthprune::cuda
