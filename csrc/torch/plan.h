#pragma once

#include <pybind11/pybind11.h>

namespace askew {

void bind_plan(pybind11::module_& m);

}  // namespace askew
