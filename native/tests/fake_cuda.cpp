// A driver that launches nothing and remembers what it was asked for; a test builds it as
// libcuda.so.1. Device memory is host memory.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

int capability = 90;
bool has_context = true;
int fails = 0;                       // result of every launch
std::vector<std::vector<int>> sizes; // of the parameters of each launch to come
std::vector<uint64_t> log_;          // programs, threads, shared, stream, count, values

}  // namespace

API void fake_reset(int arch, int context, int result) {
  capability = arch, has_context = context != 0, fails = result;
  sizes.clear();
  log_.clear();
}
API void fake_expect(const int *bytes, int count) { sizes.emplace_back(bytes, bytes + count); }
API int fake_log(const uint64_t **values) {
  *values = log_.data();
  return static_cast<int>(log_.size());
}

API int cuInit(unsigned) { return 0; }
API int cuDeviceGet(int *device, int) { return *device = 0; }
API int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &capability, 0; }
API int cuCtxSetCurrent(void *) { return 0; }
API int cuCtxGetCurrent(void **context) {
  *context = has_context ? &capability : nullptr;
  return 0;
}
API int cuCtxGetDevice(int *device) { return *device = 0; }
API int cuCtxSynchronize() { return 0; }
API int cuDeviceGetAttribute(int *value, int attribute, int) {
  if (attribute != 75 && attribute != 76) return 1;
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
API int cuMemAlloc_v2(unsigned long long *memory, size_t bytes) {
  *memory = reinterpret_cast<unsigned long long>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  return 0;
}
API int cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t bytes) {
  return std::memcpy(reinterpret_cast<void *>(to), from, bytes), 0;
}
API int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t bytes) {
  return std::memcpy(to, reinterpret_cast<const void *>(from), bytes), 0;
}
API int cuModuleLoadData(void **module, const void *image) {
  if (std::memcmp(image, "\177ELF", 4) != 0) return 200;
  *module = const_cast<void *>(image);
  return 0;
}
// The name must be a symbol of the machine code; it stands there between two zeros.
API int cuModuleGetFunction(void **function, void *module, const char *name) {
  const char *image = static_cast<const char *>(module);
  uint64_t sections = 0;
  uint16_t size = 0, count = 0;
  std::memcpy(&sections, image + 0x28, 8);
  std::memcpy(&size, image + 0x3A, 2);
  std::memcpy(&count, image + 0x3C, 2);
  const uint64_t end = sections + static_cast<uint64_t>(size) * count, length = std::strlen(name) + 1;
  for (uint64_t i = 1; i + length < end; ++i)
    if (image[i - 1] == 0 && std::memcmp(image + i, name, length) == 0)
      return *function = module, 0;
  return 500;
}
API int cuFuncSetAttribute(void *, int attribute, int bytes) {
  return attribute == 8 && bytes > 48 * 1024 ? 0 : 1;
}
API int cuGetErrorString(int result, const char **text) {
  return *text = result == 500 ? "named symbol not found" : "a fake error", 0;
}
API int cuLaunchKernel(void *, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                       unsigned, unsigned shared, void *stream, void **parameters, void **) {
  if (fails != 0 || y != 1 || z != 1) return fails;
  std::printf("launched %u programs of %u threads\n", x, threads);
  if (sizes.empty()) return 0;
  const std::vector<int> expected = sizes.front();
  sizes.erase(sizes.begin());
  log_.insert(log_.end(), {x, threads, shared, reinterpret_cast<uint64_t>(stream), expected.size()});
  for (size_t i = 0; i < expected.size(); ++i) {
    uint64_t value = 0;
    std::memcpy(&value, parameters[i], static_cast<size_t>(expected[i]));
    log_.push_back(value);
  }
  return 0;
}
