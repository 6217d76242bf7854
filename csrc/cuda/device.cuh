// What every kernel here shares: element types, chunks of 16 bytes in float32 registers, sums over lanes, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace depthprune::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load of a thread

// Elements of T in one vector: the chunk that a thread takes at a time, whether or not it can be loaded as a vector,
// so that the order of every sum is the same on both paths.
template <typename T>
constexpr int kChunk = kVectorBytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// The first `count` of kSize elements, zeros after them. Aligned: all of them, in vectors.
template <bool kAligned, int kSize, typename T>
__device__ __forceinline__ void load(const T* from, int count, float (&to)[kSize]) {
  if constexpr (kAligned) {
#pragma unroll
    for (int first = 0; first < kSize; first += kChunk<T>) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + first);
      T values[kChunk<T>];
      std::memcpy(values, &bits, sizeof(bits));
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) to[first + i] = widen(values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) to[i] = i < count ? widen(from[i]) : 0.0f;
  }
}

// A gain has the dtype of the activations or is float32; the branch is the same for the whole grid.
template <bool kAligned, typename T, int kSize>
__device__ __forceinline__ void load_gain(
    const void* gain, bool is_float, int64_t offset, int count, float (&to)[kSize]) {
  if (is_float) {
    load<kAligned>(static_cast<const float*>(gain) + offset, count, to);
  } else {
    load<kAligned>(static_cast<const T*>(gain) + offset, count, to);
  }
}

template <bool kAligned, int kSize, typename T>
__device__ __forceinline__ void store(T* to, int count, const float (&from)[kSize]) {
  if constexpr (kAligned) {
#pragma unroll
    for (int first = 0; first < kSize; first += kChunk<T>) {
      T values[kChunk<T>];
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) values[i] = narrow<T>(from[first + i]);
      uint4 bits;
      std::memcpy(&bits, values, sizeof(bits));
      *reinterpret_cast<uint4*>(to + first) = bits;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < count) to[i] = narrow<T>(from[i]);
    }
  }
}

// Sum over groups of `lanes` neighbouring threads, a power of two up to a warp. Every thread of the warp must call it;
// all of a group get the same bits.
__device__ __forceinline__ float sum_of_lanes(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Threads for one row: how many chunks it has decides, never how many rows there are.
inline int lanes_up_to_a_warp(int64_t chunks) {
  int lanes = 1;
  while (lanes < kWarp && lanes < chunks) lanes *= 2;
  return lanes;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }

template <typename... Parameters, typename... Arguments>
void launch(
    const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
    const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so the next call must not report it again
  throw std::runtime_error(std::string(op) + ": the launch failed: " + cudaGetErrorString(error));
}

// The launches count rows in 32 bits: a division by a number of heads costs a fifth of one in 64.
inline void check_count(const char* op, int64_t count, const char* what) {
  if (count <= INT32_MAX) return;
  throw std::invalid_argument(
      std::string(op) + ": expected " + what + " of at most 2147483647, got " + std::to_string(count));
}

}  // namespace depthprune::cuda
