// Bindings of the mask decoder's and the mask generator's kernels.
#pragma once

#include <pybind11/pybind11.h>

void bind_masks(pybind11::module_& module);
