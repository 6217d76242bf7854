// In place of torch's: emulated kernels run at once, on no stream.
#pragma once

#include <c10/core/Device.h>

struct CUstream_st;

namespace c10::cuda {

struct CUDAStream {
  CUstream_st* stream() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream(DeviceIndex = -1) { return {}; }

}  // namespace c10::cuda
