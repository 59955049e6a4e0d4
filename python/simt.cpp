// The extension module evsam_kernels._simt: runs PTX on the CPU.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch.h"
#include "program.h"
#include "ptx/error.h"
#include "replay.h"

namespace py = pybind11;
using namespace evsam::simt;

namespace {

using Size = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

Index3 index_of(const Size& size, const char* name) {
  const auto axis = [&](std::int64_t extent) {
    if (extent < 1 || extent > 0x7fffffff) {
      throw py::value_error(std::string(name) + " must be positive, got " + std::to_string(extent));
    }
    return std::uint32_t(extent);
  };
  return {axis(std::get<0>(size)), axis(std::get<1>(size)), axis(std::get<2>(size))};
}

Size linear_index(std::uint32_t index, Index3 size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

struct PyParameter {
  std::string name;
  std::uint32_t offset;
  std::uint64_t size;
  bool pointer;
};

struct PyInstruction {
  std::string text;
  int ptx_line;
  std::string file;
  int line;
  std::string kind;
};

struct PyFault {
  std::string kind;
  std::string message;
  std::uint32_t instruction;
  Size block;
  Size thread;
  std::string buffer;
  std::int64_t offset;
  std::optional<Size> other_block;
  std::optional<Size> other_thread;
  std::optional<std::uint32_t> other_instruction;
  std::uint64_t count;
};

struct PyLaunch {
  std::vector<PyFault> faults;
  std::map<std::string, py::array_t<std::uint64_t>> counters;
  std::map<std::string, std::pair<std::uint64_t, std::uint64_t>> unique_bytes;
};

std::vector<PyInstruction> instructions(Program& program, const std::string& name) {
  std::vector<PyInstruction> found;
  for (const Source& source : program.kernel(name).sources) {
    found.push_back({source.text, source.ptx_line, program.file_name(source.file), source.line,
                     std::string(source.kind)});
  }
  return found;
}

PyFault fault_of(const Fault& fault, const LaunchOptions& options) {
  PyFault made{std::string(fault.kind),
               fault.message,
               fault.instruction,
               linear_index(fault.block, options.grid),
               linear_index(fault.thread, options.block),
               fault.buffer,
               fault.offset,
               std::nullopt,
               std::nullopt,
               std::nullopt,
               fault.count};
  if (fault.other_block != NOBODY) made.other_block = linear_index(fault.other_block, options.grid);
  if (fault.other_thread != NOBODY) {
    made.other_thread = linear_index(fault.other_thread, options.block);
  }
  if (fault.other_instruction != NOBODY) made.other_instruction = fault.other_instruction;
  return made;
}

PyLaunch run(Program& program, const std::string& kernel, const Size& grid, const Size& block,
             std::uint32_t dynamic_shared, const py::bytes& parameters, std::vector<Buffer> buffers,
             bool check, int threads, std::uint64_t step_limit,
             std::vector<std::uint32_t> sample) {
  LaunchOptions options;
  options.grid = index_of(grid, "grid");
  options.block = index_of(block, "block");
  options.dynamic_shared = dynamic_shared;
  const std::string_view bytes = parameters;
  options.parameters.resize(bytes.size());
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(options.parameters.data()));
  options.buffers = std::move(buffers);
  options.check = check;
  options.threads = threads;
  options.step_limit = step_limit;
  options.sample = std::move(sample);
  LaunchResult result;
  bool interrupted = false;
  {
    const py::gil_scoped_release release;
    result = launch(program, kernel, options, [&] {
      const py::gil_scoped_acquire acquire;
      interrupted = PyErr_CheckSignals() != 0;
      return interrupted;
    });
  }
  if (interrupted) throw py::error_already_set();

  PyLaunch made;
  for (const Fault& fault : result.faults) made.faults.push_back(fault_of(fault, options));
  const auto column = [&](const char* name, std::uint64_t Counters::* member) {
    py::array_t<std::uint64_t> values(py::ssize_t(result.counters.size()));
    for (std::size_t i = 0; i < result.counters.size(); ++i) {
      values.mutable_at(i) = result.counters[i].*member;
    }
    made.counters[name] = std::move(values);
  };
  column("warp_executions", &Counters::warp_executions);
  column("lane_executions", &Counters::lane_executions);
  column("requests", &Counters::requests);
  column("bytes", &Counters::bytes);
  column("sectors", &Counters::sectors);
  column("ideal_sectors", &Counters::ideal_sectors);
  column("wavefronts", &Counters::wavefronts);
  column("ideal_wavefronts", &Counters::ideal_wavefronts);
  for (const Traffic& traffic : result.traffic) {
    made.unique_bytes[traffic.buffer] = {traffic.read, traffic.written};
  }
  return made;
}

template <typename Value>
Value one_of(int value, int count, const char* name) {
  if (value < 0 || value >= count) {
    throw std::invalid_argument(std::string(name) + " must be below " + std::to_string(count));
  }
  return Value(value);
}

std::vector<double> run_replay(
    const std::vector<ReplayInstruction>& instructions,
    const py::array_t<std::uint32_t, py::array::c_style | py::array::forcecast>& trace,
    const Multiprocessor& multiprocessor, int warps, int resident, int blocks) {
  const std::span<const std::uint32_t> steps(trace.data(), std::size_t(trace.size()));
  std::vector<double> ends;
  bool interrupted = false;
  {
    const py::gil_scoped_release release;
    ends = replay(instructions, steps, {multiprocessor, warps, resident, blocks}, [&] {
      const py::gil_scoped_acquire acquire;
      interrupted = PyErr_CheckSignals() != 0;
      return interrupted;
    });
  }
  if (interrupted) throw py::error_already_set();
  return ends;
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.doc() = "Runs PTX on the CPU. evsam_kernels.simt is the interface to use.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const PtxError& error) {
      py::set_error(PyExc_ValueError, error.what());
    }
  });

  py::class_<PyParameter>(m, "Parameter")
      .def_readonly("name", &PyParameter::name)
      .def_readonly("offset", &PyParameter::offset)
      .def_readonly("size", &PyParameter::size)
      .def_readonly("pointer", &PyParameter::pointer);

  py::class_<Kernel, std::unique_ptr<Kernel, py::nodelete>>(m, "Kernel")
      .def_readonly("name", &Kernel::name)
      .def_property_readonly(
          "parameters",
          [](const Kernel& kernel) {
            std::vector<PyParameter> list;
            for (std::size_t i = 0; i < kernel.parameters.size(); ++i) {
              const Variable& p = kernel.parameters[i];
              list.push_back({p.name, kernel.parameter_offsets[i], p.size, p.pointer});
            }
            return list;
          })
      .def_readonly("parameter_bytes", &Kernel::parameter_bytes)
      .def_readonly("static_shared", &Kernel::static_shared)
      .def_readonly("local_bytes", &Kernel::local_bytes)
      .def_property_readonly("required_block", [](const Kernel& kernel) -> std::optional<Size> {
        const auto& size = kernel.required_block;
        if (size[0] == 0) return std::nullopt;
        return Size{size[0], size[1], size[2]};
      });

  py::class_<PyInstruction>(m, "Instruction")
      .def_readonly("text", &PyInstruction::text)
      .def_readonly("ptx_line", &PyInstruction::ptx_line)
      .def_readonly("file", &PyInstruction::file)
      .def_readonly("line", &PyInstruction::line)
      .def_readonly("kind", &PyInstruction::kind);

  py::class_<Buffer>(m, "Buffer")
      .def(py::init<std::string, std::uint64_t, std::uint64_t, bool, bool>(), py::arg("name"),
           py::arg("address"), py::arg("size"), py::arg("writable"), py::arg("initialised"))
      .def_readonly("name", &Buffer::name)
      .def_readonly("address", &Buffer::address)
      .def_readonly("size", &Buffer::size)
      .def_readonly("writable", &Buffer::writable)
      .def_readonly("initialised", &Buffer::initialised);

  py::class_<PyFault>(m, "Fault")
      .def_readonly("kind", &PyFault::kind)
      .def_readonly("message", &PyFault::message)
      .def_readonly("instruction", &PyFault::instruction)
      .def_readonly("block", &PyFault::block)
      .def_readonly("thread", &PyFault::thread)
      .def_readonly("buffer", &PyFault::buffer)
      .def_readonly("offset", &PyFault::offset)
      .def_readonly("other_block", &PyFault::other_block)
      .def_readonly("other_thread", &PyFault::other_thread)
      .def_readonly("other_instruction", &PyFault::other_instruction)
      .def_readonly("count", &PyFault::count);

  py::class_<PyLaunch>(m, "Launch")
      .def_readonly("faults", &PyLaunch::faults)
      .def_readonly("counters", &PyLaunch::counters)
      .def_readonly("unique_bytes", &PyLaunch::unique_bytes);

  py::class_<Program>(m, "Program")
      .def(py::init<std::string_view>(), py::arg("ptx"))
      .def_property_readonly("target", &Program::target)
      .def_property_readonly(
          "kernels",
          [](const Program& program) {
            std::vector<Kernel*> list;
            for (const auto& kernel : program.kernels()) {
              list.push_back(kernel.get());
            }
            return list;
          },
          py::return_value_policy::reference_internal)
      .def("instructions", &instructions, py::arg("kernel"))
      .def("launch", &run, py::arg("kernel"), py::arg("grid"), py::arg("block"),
           py::arg("dynamic_shared"), py::arg("parameters"), py::arg("buffers"), py::arg("check"),
           py::arg("threads"), py::arg("step_limit"), py::arg("sample"));

  py::class_<ReplayInstruction>(m, "ReplayInstruction")
      .def(py::init([](int pipe, int effect, double occupied, double latency, double bytes,
                       std::uint32_t groups_left, std::vector<std::uint16_t> reads,
                       std::vector<std::uint16_t> writes) {
             return ReplayInstruction{one_of<Pipe>(pipe, PIPES + 1, "pipe"),
                                      one_of<Effect>(effect, EFFECTS, "effect"),
                                      occupied,
                                      latency,
                                      bytes,
                                      groups_left,
                                      std::move(reads),
                                      std::move(writes)};
           }),
           py::arg("pipe"), py::arg("effect"), py::arg("occupied"), py::arg("latency"),
           py::arg("bytes"), py::arg("groups_left"), py::arg("reads"), py::arg("writes"));

  py::class_<Multiprocessor>(m, "Multiprocessor")
      .def(py::init<int, double, double, double, double>(), py::arg("schedulers"),
           py::arg("l2_bytes_per_cycle"), py::arg("branch_latency"), py::arg("barrier_latency"),
           py::arg("block_latency"));

  m.def("replay", &run_replay, py::arg("instructions"), py::arg("trace"), py::arg("multiprocessor"),
        py::arg("warps"), py::arg("resident"), py::arg("blocks"));
}
