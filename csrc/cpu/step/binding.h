#pragma once

#include <pybind11/pybind11.h>

namespace depthprune {

// StepLinear, StepBuilder and DecodeStep of the module.
void bind_decode_step(pybind11::module_& m);

}  // namespace depthprune
