// Runs the operations of a pack: every check comes before the first launch.
#include "sculpt_kernels/aot.h"

#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"
#include "refuse.h"
#include "tables.h"

namespace sculpt {
namespace {

bool succeeded(const Driver &cuda, Result result, const char *what) {
  if (result == 0) return true;
  const char *text = nullptr;
  cuda.text(result, &text);
  return refuse("%s failed: %s", what, text == nullptr ? "unknown error" : text);
}

// The driver, the current context and the architecture of its device.
struct Place {
  const Driver *cuda = nullptr;
  Handle context = nullptr;
  int32_t arch = 0;

  bool look() {
    const char *reason = "";
    cuda = driver(&reason);
    if (cuda == nullptr) return refuse("%s", reason);
    if (!succeeded(*cuda, cuda->context(&context), "cuCtxGetCurrent")) return false;
    if (context == nullptr) return refuse("a CUDA context must be current on this thread");
    int device = 0, major = 0, minor = 0;
    if (!succeeded(*cuda, cuda->device(&device), "cuCtxGetDevice") ||
        !succeeded(*cuda, cuda->attribute(&major, CAPABILITY_MAJOR, device),
                   "cuDeviceGetAttribute") ||
        !succeeded(*cuda, cuda->attribute(&minor, CAPABILITY_MINOR, device),
                   "cuDeviceGetAttribute"))
      return false;
    arch = 10 * major + minor;
    return true;
  }
};

const Operation *find(const char *name, int32_t arch) {
  std::string others;
  for (int32_t i = 0; i < tables.operation_count; ++i) {
    const Operation &operation = tables.operations[i];
    if (name == nullptr || std::strcmp(operation.name, name) != 0) continue;
    if (operation.arch == arch) return &operation;
    others += " sm_" + std::to_string(operation.arch);
  }
  if (others.empty())
    refuse("operation must be one of this pack; got %s", name == nullptr ? "(null)" : name);
  else
    refuse("%s was compiled for%s; this device is sm_%d", name, others.c_str(),
           static_cast<int>(arch));
  return nullptr;
}

// The function of a kernel in a context, loaded once; null if the driver refuses it.
Handle load(const Place &place, int32_t number) {
  static std::mutex mutex;
  static std::map<std::pair<Handle, int32_t>, Handle> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  Handle &function = loaded[{place.context, number}];
  if (function != nullptr) return function;
  const Kernel &kernel = tables.kernels[number];
  Handle module = nullptr, found = nullptr;
  if (!succeeded(*place.cuda, place.cuda->load(&module, kernel.image), "cuModuleLoadData") ||
      !succeeded(*place.cuda, place.cuda->function(&found, module, kernel.function),
                 "cuModuleGetFunction"))
    return nullptr;
  if (kernel.shared > DEFAULT_SHARED &&
      !succeeded(*place.cuda,
                 place.cuda->set(found, MAX_DYNAMIC_SHARED, static_cast<int>(kernel.shared)),
                 "cuFuncSetAttribute"))
    return nullptr;
  function = found;
  return function;
}

bool check(const Operation &operation, const sculpt_device_pointer *tensors, int32_t count,
           sculpt_device_pointer workspace) {
  if (count != operation.tensors)
    return refuse("%s takes %d tensors; got %d", operation.name,
                  static_cast<int>(operation.tensors), static_cast<int>(count));
  for (int32_t i = 0; i < count; ++i)
    if (tensors[i] == 0 || tensors[i] % 16 != 0)
      return refuse("tensor %d of %s must be aligned to 16 bytes and not null; got 0x%llx",
                    static_cast<int>(i), operation.name, tensors[i]);
  if (operation.workspace > 0 && (workspace == 0 || workspace % 16 != 0))
    return refuse("workspace of %s must be %lld bytes, aligned to 16; got 0x%llx", operation.name,
                  static_cast<long long>(operation.workspace), workspace);
  return true;
}

bool launch(const Place &place, const Launch &launch, Handle function,
            const sculpt_device_pointer *tensors, sculpt_device_pointer workspace, void *stream) {
  const Kernel &kernel = tables.kernels[launch.kernel];
  // Kernels end with two pointers to scratch memory, which none of these uses.
  std::vector<uint64_t> values(static_cast<size_t>(launch.count) + 2, 0);
  std::vector<void *> pointers;
  for (int32_t i = 0; i < launch.count; ++i) {
    const Argument &argument = launch.arguments[i];
    uint64_t &value = values[static_cast<size_t>(i)];
    if (argument.kind == SCULPT_AOT_TENSOR)
      value = tensors[argument.index] + static_cast<uint64_t>(argument.value);
    else if (argument.kind == SCULPT_AOT_WORKSPACE)
      value = workspace + static_cast<uint64_t>(argument.value);
    else if (argument.kind == SCULPT_AOT_BITS64)
      value = static_cast<uint64_t>(argument.value);
    else {
      const uint32_t bits = static_cast<uint32_t>(argument.value);
      std::memcpy(&value, &bits, sizeof bits);
    }
  }
  for (uint64_t &value : values) pointers.push_back(&value);
  return succeeded(*place.cuda,
                   place.cuda->launch(function, launch.programs, 1, 1, kernel.threads, 1, 1,
                                      kernel.shared, stream, pointers.data(), nullptr),
                   kernel.function);
}

}  // namespace
}  // namespace sculpt

#define SCULPT_API extern "C" __attribute__((visibility("default")))

SCULPT_API int32_t sculpt_aot_abi(void) { return SCULPT_AOT_ABI; }

SCULPT_API const char *sculpt_aot_error(void) { return sculpt::message; }

SCULPT_API const char *sculpt_aot_operation(int32_t number, int32_t *arch) {
  if (number < 0 || number >= sculpt::tables.operation_count) return nullptr;
  const sculpt::Operation &operation = sculpt::tables.operations[number];
  if (arch != nullptr) *arch = operation.arch;
  return operation.name;
}

SCULPT_API int64_t sculpt_aot_workspace(const char *name) {
  sculpt::Place place;
  if (!place.look()) return -1;
  const sculpt::Operation *operation = sculpt::find(name, place.arch);
  return operation == nullptr ? -1 : operation->workspace;
}

SCULPT_API int32_t sculpt_aot_run(const char *name, const sculpt_device_pointer *tensors,
                                  int32_t count, sculpt_device_pointer workspace, void *stream) {
  sculpt::Place place;
  if (!place.look()) return 1;
  const sculpt::Operation *operation = sculpt::find(name, place.arch);
  if (operation == nullptr || !sculpt::check(*operation, tensors, count, workspace)) return 1;
  std::vector<sculpt::Handle> functions;
  for (int32_t i = 0; i < operation->count; ++i) {
    functions.push_back(sculpt::load(place, operation->launches[i].kernel));
    if (functions.back() == nullptr) return 1;
  }
  for (int32_t i = 0; i < operation->count; ++i)
    if (!sculpt::launch(place, operation->launches[i], functions[static_cast<size_t>(i)], tensors,
                        workspace, stream))
      return 1;
  return 0;
}
