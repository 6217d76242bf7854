// The Python module. Importing it runs the TORCH_LIBRARY_IMPL blocks of the other files, which give the ops
// that depthprune_runtime.ops defined their CPU implementations.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/simd/level.h"
#include "cpu/step/binding.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_levels", &depthprune::level_names, "Instruction levels that this machine runs, lowest first");
  m.def(
      "cpu_level", [] { return depthprune::level_name(depthprune::level()); },
      "The instruction level in use: the highest, unless set_cpu_level chose another");
  m.def(
      "set_cpu_level", &depthprune::set_level, pybind11::arg("name"),
      "Use the level `name` of cpu_levels() from now on, in all threads; for tests and benchmarks");
  depthprune::bind_decode_step(m);
}
