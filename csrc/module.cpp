// The Python module. Importing it runs the TORCH_LIBRARY_IMPL blocks of the other files, which give the ops
// that depthprune_runtime.ops defined their CPU implementations.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/decode_step_binding.h"
#include "cpu/features.h"
#include "cpu/simd.h"

namespace {

// Which clone of the CPU kernels this machine runs.
const char* simd_level() {
#if DEPTHPRUNE_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "generic";
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("simd_level", &simd_level, "The CPU kernels in use: x86-64-v4 (AVX-512), x86-64-v3 (AVX2) or generic");
  m.def("cpu_levels", &depthprune::level_names, "Instruction levels of linear that this machine runs, lowest first");
  m.def(
      "cpu_level", [] { return depthprune::level_name(depthprune::level()); },
      "The instruction level in use: the highest, unless set_cpu_level chose another");
  m.def(
      "set_cpu_level", &depthprune::set_level, pybind11::arg("name"),
      "Use the level `name` of cpu_levels() from now on, in all threads; for tests and benchmarks");
  depthprune::bind_decode_step(m);
}
