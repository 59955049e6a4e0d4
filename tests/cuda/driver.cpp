// Stands in for libcuda.so.1: records every call as a line, and fails where it is told to.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

namespace {
std::string recorded;
std::string failing;
bool has_context = true;

int call(const char* name, const std::string& arguments) {
  recorded += std::string(name) + "(" + arguments + ")\n";
  return failing == name ? 218 : 0;
}

std::string text(std::uintptr_t value) { return std::to_string(value); }
}  // namespace

extern "C" {

const char* standin_recorded() { return recorded.c_str(); }
void standin_reset(const char* function_that_fails, int context) {
  recorded.clear();
  failing = function_that_fails;
  has_context = context != 0;
}

int cuGetErrorString(int status, const char** message) {
  if (status != 218) return 1;
  *message = "a PTX JIT compilation failed";
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = has_context ? reinterpret_cast<void*>(1) : nullptr;
  return call("cuCtxGetCurrent", "");
}
int cuDeviceGet(int* handle, int device) {
  *handle = 40 + device;
  return call("cuDeviceGet", text(device));
}
int cuDevicePrimaryCtxRetain(void** context, int handle) {
  *context = reinterpret_cast<void*>(std::uintptr_t(50 + handle));
  return call("cuDevicePrimaryCtxRetain", text(handle));
}
int cuCtxSetCurrent(void* context) {
  return call("cuCtxSetCurrent", text(reinterpret_cast<std::uintptr_t>(context)));
}
int cuModuleLoadDataEx(void** module, const char* image, unsigned count, const int* options,
                       void** values) {
  *module = reinterpret_cast<void*>(std::uintptr_t(60));
  const int status = call("cuModuleLoadDataEx", image);
  if (status != 0 && count == 2 && options[0] == 5 && options[1] == 6) {
    std::snprintf(static_cast<char*>(values[0]), reinterpret_cast<std::uintptr_t>(values[1]),
                  "ptxas: line 7 is no PTX");
  }
  return status;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = reinterpret_cast<void*>(std::uintptr_t(70));
  return call("cuModuleGetFunction",
              text(reinterpret_cast<std::uintptr_t>(module)) + ", " + name);
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return call("cuFuncSetAttribute", text(reinterpret_cast<std::uintptr_t>(function)) + ", " +
                                        text(attribute) + ", " + text(value));
}
// Of kernels with the parameters of the test: a pointer, a null pointer, an integer and a float.
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                   void* stream, void** parameters, void** extra) {
  void *pointer, *null;
  std::int32_t integer;
  float real;
  std::memcpy(&pointer, parameters[0], sizeof pointer);
  std::memcpy(&null, parameters[1], sizeof null);
  std::memcpy(&integer, parameters[2], sizeof integer);
  std::memcpy(&real, parameters[3], sizeof real);
  char line[256];
  std::snprintf(line, sizeof line, "%ju, %u x %u x %u, %u x %u x %u, %u, %ju, %ju, %ju, %d, %g, %d",
                reinterpret_cast<std::uintptr_t>(function), grid_x, grid_y, grid_z, block_x, block_y,
                block_z, shared, reinterpret_cast<std::uintptr_t>(stream),
                reinterpret_cast<std::uintptr_t>(pointer), reinterpret_cast<std::uintptr_t>(null),
                integer, real, extra == nullptr);
  return call("cuLaunchKernel", line);
}

}  // extern "C"
