// What lies between the qkv projection of an attention sub-layer and its attention, in one launch:
//   q, k: RMSNorm per head where there are gains, then  a' = a cos - b sin,  b' = b cos + a sin;  k', v into the cache
// in float32, rounded once. Without gains every product is rounded as plain torch does, so the bits are its own.
// Contracts: depthprune_runtime/ops/rotary.py, rotary_kv_write.py.
//
// Layout: a group of lanes takes one head of one token; a lane takes every lanes-th chunk of 16 bytes of the first
// half together with its partner in the second. The first chunk stays in registers between the norm and the rotation.
// Grid: x is the token; y and the rows of a block are its heads, q then k then v.
#include "cuda/rotary.h"

#include <algorithm>

#include "cuda/device.cuh"

namespace depthprune::cuda {
namespace {

constexpr int kMaxThreads = 256;

// One head of one token.
template <typename T, bool kAligned>
struct Head {
  static constexpr int kSize = kChunk<T>;
  T* data = nullptr;           // [2, D/2]
  T* cached = nullptr;         // [2, D/2], or null
  const void* gain = nullptr;  // [2, D/2], or null
  const float* cos = nullptr;  // [D/2], or null: stored as it is
  const float* sin = nullptr;  // [D/2]
  int64_t gain_start = 0;
  int half;
  bool gain_is_float = false;

  struct Pair {
    float a[kSize];
    float b[kSize];
  };

  __device__ int count(int chunk) const { return min(kSize, half - chunk * kSize); }

  __device__ Pair load_pair(int chunk) const {
    Pair pair;
    load<kAligned>(data + chunk * kSize, count(chunk), pair.a);
    load<kAligned>(data + half + chunk * kSize, count(chunk), pair.b);
    return pair;
  }

  __device__ float square_sum(const Pair& pair) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += pair.a[i] * pair.a[i];
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += pair.b[i] * pair.b[i];
    return sum;
  }

  __device__ void scale(Pair& pair, int chunk, float rstd) const {
    float weight[kSize];
    load_gain<kAligned, T>(gain, gain_is_float, gain_start + chunk * kSize, count(chunk), weight);
#pragma unroll
    for (int i = 0; i < kSize; ++i) pair.a[i] = pair.a[i] * rstd * weight[i];
    load_gain<kAligned, T>(gain, gain_is_float, gain_start + half + chunk * kSize, count(chunk), weight);
#pragma unroll
    for (int i = 0; i < kSize; ++i) pair.b[i] = pair.b[i] * rstd * weight[i];
  }

  __device__ void rotate(Pair& pair, int chunk) const {
    float c[kSize];
    float s[kSize];
    load<kAligned>(cos + chunk * kSize, count(chunk), c);
    load<kAligned>(sin + chunk * kSize, count(chunk), s);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float a = pair.a[i];
      const float b = pair.b[i];
      pair.a[i] = __fsub_rn(__fmul_rn(a, c[i]), __fmul_rn(b, s[i]));
      pair.b[i] = __fadd_rn(__fmul_rn(b, c[i]), __fmul_rn(a, s[i]));
    }
  }

  __device__ void finish(Pair& pair, int chunk, float rstd) const {
    if (gain != nullptr) scale(pair, chunk, rstd);
    if (cos != nullptr) {
      rotate(pair, chunk);
      store_pair(data, pair, chunk);
    }
    if (cached != nullptr) store_pair(cached, pair, chunk);
  }

  __device__ void store_pair(T* to, const Pair& pair, int chunk) const {
    store<kAligned>(to + chunk * kSize, count(chunk), pair.a);
    store<kAligned>(to + half + chunk * kSize, count(chunk), pair.b);
  }
};

// Where `head` of the token lies in a cache; null if its slot is negative.
template <typename T>
__device__ __forceinline__ T* cached_head(const Rotation& rotation, const Cache& cache, int64_t token, int head) {
  const int64_t slot = rotation.slot_mapping[token];
  if (slot < 0) return nullptr;
  if (slot >= rotation.num_slots) __trap();
  const uint32_t index = static_cast<uint32_t>(slot);
  const uint32_t block_size = static_cast<uint32_t>(rotation.block_size);
  return static_cast<T*>(cache.data) + index / block_size * cache.block_stride +
         index % block_size * cache.slot_stride + head * cache.head_stride;
}

template <typename T, bool kAligned>
__device__ __forceinline__ Head<T, kAligned> head_of(const Rotation& rotation, int64_t token, int index) {
  Head<T, kAligned> head;
  head.half = static_cast<int>(rotation.half);
  const int num_q = static_cast<int>(rotation.q.count);
  const int num_k = static_cast<int>(rotation.k.count);
  const bool is_q = index < num_q;
  const bool is_v = index >= num_q + num_k;
  const Heads& heads = is_q ? rotation.q : is_v ? rotation.v : rotation.k;
  const int h = is_q ? index : is_v ? index - num_q - num_k : index - num_q;
  head.data = static_cast<T*>(heads.data) + token * heads.token_stride + h * heads.head_stride;
  if (!is_q && rotation.slot_mapping != nullptr) {
    head.cached = cached_head<T>(rotation, is_v ? rotation.v_cache : rotation.k_cache, token, h);
  }
  if (is_v) return head;
  const int64_t position = rotation.positions[token];
  if (position < 0 || position >= rotation.num_positions) __trap();
  head.cos = rotation.cos_sin + position * 2 * rotation.half;
  head.sin = head.cos + rotation.half;
  head.gain = heads.gain;
  head.gain_start = h * 2 * rotation.half;
  head.gain_is_float = heads.gain_dtype == Dtype::float32;
  return head;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) rotary_kernel(const Rotation rotation) {
  constexpr int kSize = kChunk<T>;
  const int lanes = static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x);
  const int64_t num_heads = rotation.q.count + rotation.k.count + rotation.v.count;
  const int64_t index = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  // Threads beyond the last head take no chunk, but take part in the sums of their warp.
  const int chunks = index < num_heads ? static_cast<int>((rotation.half + kSize - 1) / kSize) : 0;
  const auto head = head_of<T, kAligned>(rotation, blockIdx.x, static_cast<int>(min(index, num_heads - 1)));

  typename Head<T, kAligned>::Pair pair{};
  if (first < chunks) pair = head.load_pair(first);
  float rstd = 1.0f;
  if (rotation.q.gain != nullptr || rotation.k.gain != nullptr) {  // the same for the whole grid
    float sum = first < chunks ? head.square_sum(pair) : 0.0f;
    for (int chunk = first + lanes; chunk < chunks; chunk += lanes) sum += head.square_sum(head.load_pair(chunk));
    rstd = rsqrtf(sum_of_lanes(sum, lanes) / static_cast<float>(2 * head.half) + rotation.eps);
  }
  if (first < chunks) head.finish(pair, first, rstd);
  for (int chunk = first + lanes; chunk < chunks; chunk += lanes) {
    auto next = head.load_pair(chunk);
    head.finish(next, chunk, rstd);
  }
}

bool are_aligned(const Heads& heads, int64_t chunk) {
  return heads.count == 0 || (is_aligned(heads.data) && is_aligned(heads.gain) && heads.token_stride % chunk == 0 &&
                              heads.head_stride % chunk == 0);
}

bool are_aligned(const Cache& cache, int64_t chunk) {
  return is_aligned(cache.data) && cache.block_stride % chunk == 0 && cache.slot_stride % chunk == 0 &&
         cache.head_stride % chunk == 0;
}

template <typename T>
void launch_rotary(const char* op, const Rotation& rotation, cudaStream_t stream) {
  constexpr int64_t kSize = kChunk<T>;
  const int64_t num_heads = rotation.q.count + rotation.k.count + rotation.v.count;
  check_count(op, rotation.num_tokens, "tokens");
  check_count(op, rotation.num_slots, "slots in the cache");
  check_count(op, num_heads, "heads");
  const int64_t lanes = lanes_up_to_a_warp((rotation.half + kSize - 1) / kSize);
  // As many heads as a token has, in whole warps, up to the largest block.
  const int64_t per_warp = kWarp / lanes;
  const int64_t heads = std::min(kMaxThreads / lanes, (num_heads + per_warp - 1) / per_warp * per_warp);
  const dim3 grid(static_cast<unsigned>(rotation.num_tokens), static_cast<unsigned>((num_heads + heads - 1) / heads));
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(heads));
  const bool caches_aligned = rotation.slot_mapping == nullptr ||
                              (are_aligned(rotation.k_cache, kSize) && are_aligned(rotation.v_cache, kSize));
  const bool aligned = rotation.half % kSize == 0 && is_aligned(rotation.cos_sin) && caches_aligned &&
                       are_aligned(rotation.q, kSize) && are_aligned(rotation.k, kSize) &&
                       are_aligned(rotation.v, kSize);
  if (aligned) {
    launch(op, rotary_kernel<T, true>, grid, block, stream, rotation);
  } else {
    launch(op, rotary_kernel<T, false>, grid, block, stream, rotation);
  }
}

}  // namespace

void rotate(const char* op, const Rotation& rotation, CUstream_st* stream) {
  const bool no_heads = rotation.q.count == 0 && rotation.k.count == 0 && rotation.v.count == 0;
  if (rotation.num_tokens == 0 || rotation.half == 0 || no_heads) return;
  switch (rotation.dtype) {
    case Dtype::bfloat16: return launch_rotary<__nv_bfloat16>(op, rotation, stream);
    case Dtype::float16: return launch_rotary<__half>(op, rotation, stream);
    case Dtype::float32: return launch_rotary<float>(op, rotation, stream);
  }
}

}  // namespace depthprune::cuda
