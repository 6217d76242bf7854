// RMSNorm, alone, fused with the residual add, or per head:
//   out_tc = x_tc * rsqrt(mean_c(x_tc^2) + eps) * w_c
// in float32, rounded once. Contract: depthprune_runtime/ops/norm.py.
//
// Layout: a thread takes every lanes-th chunk of 16 bytes of its row. Its first chunks stay in registers between the
// sum and the result; of rows too long for that the rest is read again.
// Grid: short rows (heads) take a power of two of lanes and share blocks of 128 threads; long ones take a block each.
// The lanes follow from the hidden size and the dtype alone, so a row's result depends on nothing but its values.
#include "cuda/norm.h"

#include "cuda/device.cuh"

namespace depthprune::cuda {
namespace {

constexpr int kShared = 128;      // threads of a block of short rows
constexpr int kMaxThreads = 512;  // of a block of one long row: 4096 bf16 values are one chunk each

__device__ __forceinline__ int64_t offset_of(const RowStrides& rows, uint32_t row) {
  if (rows.inner == 1) return row * rows.outer_stride;
  const uint32_t inner = static_cast<uint32_t>(rows.inner);
  return row / inner * rows.outer_stride + row % inner * rows.inner_stride;
}

// One row as a thread sees it: chunk i covers columns [i * kChunk, (i + 1) * kChunk).
template <typename T, bool kAdd, bool kAligned>
struct Row {
  static constexpr int kSize = kChunk<T>;
  const T* x;          // [C]
  T* residual;         // [C]
  T* out;              // [C]
  const void* weight;  // [weight_rows, C]
  int64_t weight_start;
  int hidden_size;
  bool weight_is_float;

  __device__ Row(const Norm& norm, uint32_t row)
      : x(static_cast<const T*>(norm.x) + offset_of(norm.x_rows, row)),
        residual(nullptr),
        out(static_cast<T*>(norm.out) + offset_of(norm.out_rows, row)),
        weight(norm.weight),
        weight_start(0),
        hidden_size(static_cast<int>(norm.hidden_size)),
        weight_is_float(norm.weight_dtype == Dtype::float32) {
    if constexpr (kAdd) residual = static_cast<T*>(norm.residual) + offset_of(norm.residual_rows, row);
    if (norm.weight_rows > 1) weight_start = row % static_cast<uint32_t>(norm.weight_rows) * norm.hidden_size;
  }

  __device__ int count(int chunk) const { return min(kSize, hidden_size - chunk * kSize); }

  // What is normalised: x, or x + residual rounded as later sub-layers will see it.
  __device__ void load_x(int chunk, float (&to)[kSize]) const {
    load<kAligned>(x + chunk * kSize, count(chunk), to);
    if constexpr (kAdd) {
      float before[kSize];
      load<kAligned>(residual + chunk * kSize, count(chunk), before);
#pragma unroll
      for (int i = 0; i < kSize; ++i) to[i] = widen(narrow<T>(before[i] + to[i]));
    }
  }

  __device__ void load_weight(int chunk, float (&to)[kSize]) const {
    load_gain<kAligned, T>(weight, weight_is_float, weight_start + chunk * kSize, count(chunk), to);
  }

  __device__ void store_sum(int chunk, const float (&sum)[kSize]) const {
    if constexpr (kAdd) store<kAligned>(residual + chunk * kSize, count(chunk), sum);
  }

  __device__ void store_out(int chunk, float (&values)[kSize], const float (&gain)[kSize], float rstd) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = values[i] * rstd * gain[i];
    store<kAligned>(out + chunk * kSize, count(chunk), values);
  }
};

template <int kSize>
__device__ __forceinline__ float square_sum(const float (&values)[kSize]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum += values[i] * values[i];
  return sum;
}

// Sum over the threads of one row: a group of lanes, or the whole block.
__device__ float sum_of_row(float value, int lanes) {
  value = sum_of_lanes(value, min(lanes, kWarp));
  if (lanes <= kWarp) return value;
  __shared__ float sums[kMaxThreads / kWarp];
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < lanes / kWarp; ++warp) total += sums[warp];
  return total;
}

template <typename T, bool kAdd, bool kAligned, int kKept>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(const Norm norm) {
  constexpr int kSize = kChunk<T>;
  const int lanes = static_cast<int>(blockDim.x);
  const uint32_t index = blockIdx.x * blockDim.y + threadIdx.y;
  const uint32_t last = static_cast<uint32_t>(norm.num_rows - 1);
  const Row<T, kAdd, kAligned> row(norm, min(index, last));
  // Threads beyond the last row take no chunk, but take part in the sums of their warp.
  const int chunks = index <= last ? (row.hidden_size + kSize - 1) / kSize : 0;
  const int first = static_cast<int>(threadIdx.x);

  // All loads before the first store: it might alias with them, as far as the compiler knows.
  float kept[kKept][kSize];
  float gain[kKept][kSize];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (first + i * lanes >= chunks) continue;
    row.load_x(first + i * lanes, kept[i]);
    row.load_weight(first + i * lanes, gain[i]);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (first + i * lanes >= chunks) continue;
    row.store_sum(first + i * lanes, kept[i]);
    sum += square_sum(kept[i]);
  }
  for (int chunk = first + kKept * lanes; chunk < chunks; chunk += lanes) {
    float values[kSize];
    row.load_x(chunk, values);
    row.store_sum(chunk, values);
    sum += square_sum(values);
  }
  const float rstd = rsqrtf(sum_of_row(sum, lanes) / static_cast<float>(row.hidden_size) + norm.eps);
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (first + i * lanes < chunks) row.store_out(first + i * lanes, kept[i], gain[i], rstd);
  }
  for (int chunk = first + kKept * lanes; chunk < chunks; chunk += lanes) {
    float values[kSize];
    float weight[kSize];
    // This thread's own store of the sum is what it reads here.
    load<kAligned>((kAdd ? row.residual : row.x) + chunk * kSize, row.count(chunk), values);
    row.load_weight(chunk, weight);
    row.store_out(chunk, values, weight, rstd);
  }
}

bool are_aligned(const RowStrides& rows, const void* data, int64_t chunk) {
  return is_aligned(data) && rows.outer_stride % chunk == 0 && rows.inner_stride % chunk == 0;
}

template <typename T, bool kAdd>
void launch_norm(const Norm& norm, cudaStream_t stream) {
  constexpr const char* op = kAdd ? "add_rms_norm" : "rms_norm";
  constexpr int64_t kSize = kChunk<T>;
  check_count(op, norm.num_rows, "rows");
  check_count(op, norm.hidden_size, "hidden_size");
  const int64_t chunks = (norm.hidden_size + kSize - 1) / kSize;
  const int64_t rounds = (chunks + kMaxThreads - 1) / kMaxThreads;
  int64_t lanes = lanes_up_to_a_warp(chunks);
  // Long rows: as many chunks for each thread, in whole warps.
  if (chunks > kWarp) lanes = ((chunks + rounds - 1) / rounds + kWarp - 1) / kWarp * kWarp;
  const int64_t rows = lanes <= kWarp ? kShared / lanes : 1;
  const dim3 grid(static_cast<unsigned>((norm.num_rows + rows - 1) / rows));
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(rows));
  const bool aligned = norm.hidden_size % kSize == 0 && is_aligned(norm.weight) &&
                       are_aligned(norm.x_rows, norm.x, kSize) && are_aligned(norm.out_rows, norm.out, kSize) &&
                       (!kAdd || are_aligned(norm.residual_rows, norm.residual, kSize));
  if (!aligned) {
    launch(op, norm_kernel<T, kAdd, false, 1>, grid, block, stream, norm);
  } else if (rounds == 1) {
    launch(op, norm_kernel<T, kAdd, true, 1>, grid, block, stream, norm);
  } else {
    launch(op, norm_kernel<T, kAdd, true, 2>, grid, block, stream, norm);
  }
}

template <typename T>
void launch_norm(const Norm& norm, cudaStream_t stream) {
  norm.residual == nullptr ? launch_norm<T, false>(norm, stream) : launch_norm<T, true>(norm, stream);
}

}  // namespace

void norm(const Norm& norm, CUstream_st* stream) {
  if (norm.num_rows == 0 || norm.hidden_size == 0) return;
  switch (norm.dtype) {
    case Dtype::bfloat16: return launch_norm<__nv_bfloat16>(norm, stream);
    case Dtype::float16: return launch_norm<__half>(norm, stream);
    case Dtype::float32: return launch_norm<float>(norm, stream);
  }
}

}  // namespace depthprune::cuda
