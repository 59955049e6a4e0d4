// Stands in for libcuda.so.1: writes every call to $STANDIN_LOG, a line each.
//
// $STANDIN_FAIL, such as "cuLaunchKernel=701", makes a function fail; of images only those fail whose
// text contains $STANDIN_REFUSES, if set. $STANDIN_CAPABILITY is that of every device, such as 86.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

int record(const char* function, const char* format = "", ...) {
  FILE* log = std::fopen(variable("STANDIN_LOG").c_str(), "a");
  std::fprintf(log, "%s ", function);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(log, format, arguments);
  va_end(arguments);
  std::fprintf(log, "\n");
  std::fclose(log);
  const std::string fails = variable("STANDIN_FAIL");
  const std::string name = std::string(function) + "=";
  return fails.rfind(name, 0) == 0 ? std::atoi(fails.c_str() + name.size()) : 0;
}

void* handle(long number) { return reinterpret_cast<void*>(number); }

int modules = 0;

}  // namespace

extern "C" {

int cuInit(unsigned) { return record("cuInit"); }

int cuDeviceGet(int* device, int ordinal) {
  *device = 10 + ordinal;
  return record("cuDeviceGet", "%d", ordinal);
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::string capability = variable("STANDIN_CAPABILITY");
  const int number = capability.empty() ? 80 : std::atoi(capability.c_str());
  *value = attribute == 75 ? number / 10 : attribute == 76 ? number % 10 : -1;
  return record("cuDeviceGetAttribute", "%d", attribute);
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = handle(100 + device);
  return record("cuDevicePrimaryCtxRetain", "%d", device);
}

int cuCtxPushCurrent_v2(void* context) {
  return record("cuCtxPushCurrent", "%ld", reinterpret_cast<long>(context));
}

int cuCtxPopCurrent_v2(void**) { return record("cuCtxPopCurrent"); }

int cuThreadExchangeStreamCaptureMode(int* mode) {
  static int current = 0;
  const int before = current;
  current = *mode;
  *mode = before;
  return record("cuThreadExchangeStreamCaptureMode", "%d", current);
}

int cuModuleLoadDataEx(void** module, const void* image, unsigned options, int* names, void** values) {
  const char* text = static_cast<const char*>(image);
  *module = handle(200 + ++modules);
  const int status = record("cuModuleLoadDataEx", "%.40s", text);
  if (!status || !std::strstr(text, variable("STANDIN_REFUSES").c_str())) return 0;
  for (unsigned i = 0; i < options; ++i)
    if (names[i] == 5) std::strcpy(static_cast<char*>(values[i]), "ptxas error: line 7");
  return status;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = handle(1000 + reinterpret_cast<long>(module));
  return record("cuModuleGetFunction", "%ld %s", reinterpret_cast<long>(module), name);
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  return record("cuFuncSetAttribute", "%ld %d %d", reinterpret_cast<long>(function), attribute, value);
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, void* stream,
                   void** parameters, void** extra) {
  if (parameters || extra[0] != handle(1) || extra[2] != handle(2) || extra[4] != nullptr) return 1;
  std::string bytes;
  for (size_t i = 0; i < *static_cast<size_t*>(extra[3]); ++i) {
    char digits[3];
    std::snprintf(digits, 3, "%02x", static_cast<unsigned char*>(extra[1])[i]);
    bytes += digits;
  }
  return record("cuLaunchKernel", "%ld %u,%u,%u %u,%u,%u %u %ld %s",
                reinterpret_cast<long>(function), grid_x, grid_y, grid_z, block_x, block_y, block_z,
                shared, reinterpret_cast<long>(stream), bytes.c_str());
}

int cuGetErrorName(int status, const char** text) {
  *text = status == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : "CUDA_ERROR_OF_SOME_KIND";
  return 0;
}

int cuGetErrorString(int, const char** text) {
  *text = "what it means";
  return 0;
}
}
