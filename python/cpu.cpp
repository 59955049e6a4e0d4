// The module evsam_kernels._cpu: checks what Python passes and calls the C++ kernels without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "evsam/isa.h"
#include "evsam/layer_norm_2d.h"

namespace py = pybind11;

namespace {

// The address of a tensor's first element, as Tensor.data_ptr() gives it.
using Address = std::int64_t;

std::int64_t size_of(evsam::DType dtype) {
  switch (dtype) {
    case evsam::DType::float16:
    case evsam::DType::bfloat16: return 2;
    case evsam::DType::float32: return 4;
    case evsam::DType::float64: return 8;
  }
  return 0;
}

evsam::DType compute_dtype(evsam::DType dtype) {
  return dtype == evsam::DType::float64 ? dtype : evsam::DType::float32;
}

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

evsam::DType parse_dtype(const std::string& name) {
  if (name == "float16") return evsam::DType::float16;
  if (name == "bfloat16") return evsam::DType::bfloat16;
  if (name == "float32") return evsam::DType::float32;
  check(name == "float64",
        "dtype must be float16, bfloat16, float32 or float64, got '" + name + "'");
  return evsam::DType::float64;
}

void check_at_least(const char* name, std::int64_t value, std::int64_t least) {
  check(value >= least, std::string(name) + " must be at least " + std::to_string(least) +
                            ", got " + std::to_string(value));
}

// The pointer to `count` elements. PyTorch gives tensors without elements the address 0.
void* pointer(const char* name, Address address, evsam::DType dtype, std::int64_t count) {
  check(address > 0 || (address == 0 && count == 0),
        std::string(name) + " must be the address of a tensor's elements, got " +
            std::to_string(address));
  check(address % size_of(dtype) == 0,
        std::string(name) + " must be aligned to its element size, got " + std::to_string(address));
  return reinterpret_cast<void*>(address);
}

const void* optional_pointer(const char* name, std::optional<Address> address, evsam::DType dtype,
                             std::int64_t count) {
  return address.has_value() ? pointer(name, *address, dtype, count) : nullptr;
}

// a * b elements of `dtype`, whose size in bytes must fit.
std::int64_t element_count(std::int64_t a, std::int64_t b, evsam::DType dtype) {
  check(b == 0 || a <= std::numeric_limits<std::int64_t>::max() / b / size_of(dtype),
        std::to_string(a) + " x " + std::to_string(b) + " elements are more than memory can hold");
  return a * b;
}

void layer_norm_2d(Address x, Address y, std::optional<Address> weight, std::optional<Address> bias,
                   std::int64_t rows, std::int64_t channels, double eps,
                   const std::string& dtype_name, int num_threads) {
  check_at_least("rows", rows, 0);
  check_at_least("channels", channels, 1);
  check_at_least("num_threads", num_threads, 1);
  const evsam::DType dtype = parse_dtype(dtype_name);
  const evsam::DType affine_dtype = compute_dtype(dtype);
  const std::int64_t count = element_count(rows, channels, dtype);
  evsam::LayerNorm2dArgs args;
  args.x = pointer("x", x, dtype, count);
  args.y = pointer("y", y, dtype, count);
  args.weight = optional_pointer("weight", weight, affine_dtype, channels);
  args.bias = optional_pointer("bias", bias, affine_dtype, channels);
  args.rows = rows;
  args.channels = channels;
  args.eps = eps;
  args.dtype = dtype;
  args.num_threads = num_threads;
  const py::gil_scoped_release without_gil;
  evsam::layer_norm_2d(args);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using namespace py::literals;
  module.doc() = "C++ kernels of evsam_kernels; tensors are passed as addresses and sizes.";

  module.def("available_isas", &evsam::available_isas,
             "Names of the instruction sets that were built and run on this CPU, slowest first.");
  module.def("isa", &evsam::isa, "Name of the instruction set in use.");
  module.def("use_isa", &evsam::use_isa, "name"_a,
             "Use this instruction set from now on, in place of what EVSAM_CPU_ISA says.");

  module.def("layer_norm_2d", &layer_norm_2d, py::kw_only(), "x"_a, "y"_a, "weight"_a, "bias"_a,
             "rows"_a, "channels"_a, "eps"_a, "dtype"_a, "num_threads"_a,
             "LayerNorm over rows of channels; see csrc/include/evsam/layer_norm_2d.h.");
}
