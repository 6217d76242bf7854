// Enough of CUDA for g++ to compile csrc/cuda/*.cu and run the kernels on the CPU, so that their results can be tested
// without a GPU. It shows wrong indices, sums, masks and barriers; it says nothing about speed.
//
// Blocks run one after the other; the threads of a block are fibers (ucontext) that run until they wait. The order
// of the fibers is set by `emulation_order`: a missing barrier shows as results that differ between the orders.
// emulated/ holds the toolkit's header names, all of which lead here.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one at a time
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  size_t count() const { return static_cast<size_t>(x) * y * z; }
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// Element types: _Float16 converts as the hardware does; bfloat16 rounds to nearest even here.
struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <typename T>
T min(T a, T b) {
  return std::min(a, b);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

inline int emulation_order = 0;         // 0 forwards, 1 backwards, else the seed of a random order for every round
inline bool emulation_refuses = false;  // every launch

namespace emulation {

constexpr size_t kWarp = 32;
constexpr size_t kStack = 128 * 1024;

enum class State { ready, at_block, at_warp, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  State state;
  bool odd;  // which of the two exchange buffers is next: a warp may be one exchange ahead of its slowest reader
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<float> exchange;  // [2, threads]
inline ucontext_t scheduler;
inline size_t current;
inline std::function<void()> body;
inline std::string error;

inline void yield(State state) {
  fibers[current]->state = state;
  swapcontext(&fibers[current]->context, &scheduler);
}

inline void fail(const std::string& message) {
  error = message;
  yield(State::done);
}

inline void entry() {
  body();
  yield(State::done);
}

inline void start_block(size_t threads) {
  exchange.assign(2 * threads, 0.0f);
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fiber.state = State::ready;
    fiber.odd = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
}

// Threads [begin, end) go on if all of them have reached `state`.
inline bool release(size_t begin, size_t end, State state) {
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i]->state != state) return false;
  }
  for (size_t i = begin; i < end; ++i) fibers[i]->state = State::ready;
  return true;
}

inline void run_block(size_t threads, std::mt19937& random) {
  start_block(threads);
  std::vector<size_t> order(threads);
  std::iota(order.begin(), order.end(), size_t{0});
  if (emulation_order == 1) std::reverse(order.begin(), order.end());
  while (true) {
    if (emulation_order > 1) std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) {
      if (fibers[i]->state != State::ready) continue;
      current = i;
      threadIdx = fibers[i]->thread;
      swapcontext(&scheduler, &fibers[i]->context);
      if (!error.empty()) throw std::runtime_error(error);
    }
    bool moves = release(0, threads, State::at_block);
    for (size_t warp = 0; warp < threads; warp += kWarp) {
      moves |= release(warp, std::min(warp + kWarp, threads), State::at_warp);
    }
    if (moves) continue;
    for (size_t i = 0; i < threads; ++i) {
      if (fibers[i]->state != State::done) throw std::runtime_error("not every thread reached the barrier");
    }
    return;
  }
}

inline void run_grid(dim3 grid, dim3 block, std::function<void()> kernel) {
  body = std::move(kernel);
  error.clear();
  gridDim = grid;
  blockDim = block;
  std::mt19937 random(static_cast<unsigned>(emulation_order));
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(block.count(), random);
      }
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::yield(emulation::State::at_block); }
inline void __trap() { emulation::fail("the kernel was stopped by a trap"); }

inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
  emulation::Fiber& fiber = *emulation::fibers[emulation::current];
  if (mask != 0xffffffffu || blockDim.count() % emulation::kWarp != 0) emulation::fail("expected whole warps");
  float* values = emulation::exchange.data() + (fiber.odd ? blockDim.count() : 0);
  fiber.odd = !fiber.odd;
  values[emulation::current] = value;
  emulation::yield(emulation::State::at_warp);
  return values[emulation::current ^ static_cast<size_t>(offset)];
}

// Launches, in the form that is plain C++.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const dim3 grid = config->gridDim;
  const size_t threads = config->blockDim.count();
  const bool possible = !emulation_refuses && grid.count() > 0 && grid.x <= INT32_MAX && grid.y <= 65535 &&
                        grid.z <= 65535 && threads > 0 && threads <= 1024 && config->blockDim.z <= 64;
  if (!possible) return cudaErrorInvalidConfiguration;
  emulation::run_grid(grid, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
