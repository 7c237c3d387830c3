#include "driver.h"

#include <dlfcn.h>

#include <string>

namespace sculpt {
namespace {

struct Found {
  Driver driver{};
  std::string missing;

  Found() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      missing = std::string("there is no CUDA driver: ") + dlerror();
      return;
    }
    find(library, "cuCtxGetCurrent", driver.context);
    find(library, "cuCtxGetDevice", driver.device);
    find(library, "cuDeviceGetAttribute", driver.attribute);
    find(library, "cuModuleLoadData", driver.load);
    find(library, "cuModuleGetFunction", driver.function);
    find(library, "cuFuncSetAttribute", driver.set);
    find(library, "cuLaunchKernel", driver.launch);
    find(library, "cuGetErrorString", driver.text);
  }

  template <typename Function>
  void find(void *library, const char *name, Function &function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) missing = std::string("the CUDA driver has no ") + name;
  }
};

}  // namespace

const Driver *driver(const char **reason) {
  static const Found found;
  *reason = found.missing.c_str();
  return found.missing.empty() ? &found.driver : nullptr;
}

}  // namespace sculpt
