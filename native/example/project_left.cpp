// Removes from a gradient what lies in a protected subspace: G <- (1 - U U') G, without Python.
//
// U holds the first 128 unit vectors, so the first 128 rows of the result must be zero.
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sculpt_kernels/pack.h"

namespace {

constexpr size_t ROWS = 4096, COLUMNS = 4096, RANK = 128;
constexpr uint16_t ONE = 0x3F80;  // bfloat16

void check(CUresult result, const char *what) {
  if (result == CUDA_SUCCESS) return;
  const char *text = nullptr;
  cuGetErrorString(result, &text);
  std::fprintf(stderr, "%s: %s\n", what, text == nullptr ? "unknown error" : text);
  std::exit(1);
}

CUdeviceptr on_device(const std::vector<uint16_t> &values) {
  CUdeviceptr memory = 0;
  check(cuMemAlloc(&memory, values.size() * 2), "cuMemAlloc");
  check(cuMemcpyHtoD(memory, values.data(), values.size() * 2), "cuMemcpyHtoD");
  return memory;
}

}  // namespace

int main() {
  CUdevice device = 0;
  CUcontext context = nullptr;
  check(cuInit(0), "cuInit");
  check(cuDeviceGet(&device, 0), "cuDeviceGet");
  check(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  check(cuCtxSetCurrent(context), "cuCtxSetCurrent");

  std::vector<uint16_t> gradient(ROWS * COLUMNS, ONE), basis(ROWS * RANK, 0);
  for (size_t i = 0; i < RANK; ++i) basis[i * RANK + i] = ONE;
  const CUdeviceptr G = on_device(gradient), U = on_device(basis);

  const int64_t bytes = sculpt_aot_workspace("project_left_4096x4096_r128_bfloat16");
  CUdeviceptr workspace = 0;
  if (bytes > 0) check(cuMemAlloc(&workspace, static_cast<size_t>(bytes)), "cuMemAlloc");
  if (bytes < 0 || sculpt_project_left_4096x4096_r128_bfloat16(G, U, workspace, nullptr) != 0) {
    std::fprintf(stderr, "%s\n", sculpt_aot_error());
    return 1;
  }
  check(cuCtxSynchronize(), "cuCtxSynchronize");
  check(cuMemcpyDtoH(gradient.data(), G, gradient.size() * 2), "cuMemcpyDtoH");

  size_t wrong = 0;
  for (size_t i = 0; i < gradient.size(); ++i)
    wrong += (gradient[i] & 0x7FFFu) != (i / COLUMNS < RANK ? 0u : ONE);
  std::printf("%zu of %zu elements are wrong\n", wrong, gradient.size());
  return wrong == 0 ? 0 : 1;
}
