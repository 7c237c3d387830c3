// The C ABI: every argument is checked before anything is written.
#include "sculpt_kernels/cpu.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "operations.h"
#include "refuse.h"
#include "rows.h"
#include "segment.h"

using sculpt::refuse;

namespace {

long long wide(int64_t x) { return static_cast<long long>(x); }

bool check_matrix(const char *name, const sculpt_matrix &x, int64_t m, int64_t n, bool written) {
  if (x.dtype != SCULPT_FLOAT32 && x.dtype != SCULPT_BFLOAT16 && x.dtype != SCULPT_FLOAT16)
    return refuse("%s.dtype must be 0 (float32), 1 (bfloat16) or 2 (float16); got %d", name,
                  static_cast<int>(x.dtype));
  if (m == 0 || n == 0) return true;
  if (x.data == nullptr) return refuse("%s.data must not be null", name);
  const bool shared = (x.stride_row == 0 && m > 1) || (x.stride_column == 0 && n > 1);
  if (written && shared)
    return refuse("%s is written, so its strides must not be 0; got %lld and %lld", name,
                  wide(x.stride_row), wide(x.stride_column));
  return true;
}

// What a BLAS takes: float32, one stride of 1, the other within 31 bits and past the extent.
bool check_basis(const char *name, const sculpt_matrix &x, int64_t rows, int64_t columns) {
  if (!check_matrix(name, x, rows, columns, false)) return false;
  if (x.dtype != SCULPT_FLOAT32)
    return refuse("%s.dtype must be 0 (float32); got %d", name, static_cast<int>(x.dtype));
  if (rows == 0 || columns == 0) return true;
  const auto spans = [](int64_t stride, int64_t extent, int64_t count) {
    return count == 1 || (stride >= extent && stride <= INT32_MAX);
  };
  const bool by_rows = x.stride_column == 1 && spans(x.stride_row, columns, rows);
  const bool by_columns = x.stride_row == 1 && spans(x.stride_column, rows, columns);
  if (!by_rows && !by_columns)
    return refuse("%s must be row- or column-major for a %lld x %lld matrix; got strides %lld "
                  "and %lld", name, wide(rows), wide(columns), wide(x.stride_row),
                  wide(x.stride_column));
  if (reinterpret_cast<uintptr_t>(x.data) % alignof(float) != 0)
    return refuse("%s.data must be aligned to 4 bytes", name);
  return true;
}

bool check_shape(const sculpt_products &p) {
  for (const int64_t size : {p.m, p.n, p.r, p.s})
    if (size < 0 || size > INT32_MAX)
      return refuse("m, n, r and s must be between 0 and 2^31 - 1; got %lld, %lld, %lld, %lld",
                    wide(p.m), wide(p.n), wide(p.r), wide(p.s));
  if (p.form < SCULPT_CORE || p.form > SCULPT_RIGHT)
    return refuse("form must be 0 (core), 1 (strict), 2 (left) or 3 (right); got %d",
                  static_cast<int>(p.form));
  if (p.threads < 1) return refuse("threads must be positive; got %d", static_cast<int>(p.threads));
  if (p.panel_rows < 0)
    return refuse("panel_rows must not be negative; got %d", static_cast<int>(p.panel_rows));
  return true;
}

bool check_products(const sculpt_products &p) {
  if (!check_shape(p)) return false;
  if (p.form != SCULPT_RIGHT && !check_basis("U", p.U, p.m, p.r)) return false;
  if (p.form != SCULPT_LEFT && !check_basis("V", p.V, p.n, p.s)) return false;
  if (p.m == 0 || p.n == 0) return true;
  if (p.sgemm == nullptr) return refuse("sgemm must not be null");
  const int64_t needed = sculpt::workspace(p);
  if (p.workspace == nullptr || p.workspace_floats < needed)
    return refuse("workspace must have %lld floats; got %lld", wide(needed),
                  wide(p.workspace == nullptr ? 0 : p.workspace_floats));
  if (reinterpret_cast<uintptr_t>(p.workspace) % 64 != 0)
    return refuse("workspace must be aligned to 64 bytes");
  return true;
}

bool check_rounding(const sculpt_rounding &rounding, const char *name, const sculpt_matrix &x) {
  if (rounding.stochastic && x.dtype == SCULPT_FLOAT32)
    return refuse("rounding.stochastic is for bfloat16 and float16; %s is float32", name);
  if (rounding.row0 < 0)
    return refuse("rounding.row0 must not be negative; got %lld", wide(rounding.row0));
  return true;
}

// A small product of whole numbers, exact in every order. A library may throw where the CPU or a
// setting of the process is not what it needs.
bool multiplies(sculpt_row_gemm multiply, bool paired) {
  constexpr int64_t M = 3, N = 17, K = 6;
  const auto left = [](int64_t i, int64_t k) { return static_cast<float>((i + 2 * k) % 5 - 2); };
  const auto right = [](int64_t k, int64_t j) { return static_cast<float>((3 * k + j) % 7 - 3); };
  const auto low = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
  };
  float a[M * K], b[K * N], c[M * N];
  uint16_t low_a[M * K], low_b[K * N];
  std::fill_n(c, M * N, std::numeric_limits<float>::quiet_NaN());
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t i = 0; i < M; ++i) low_a[i * K + k] = low(a[i * K + k] = left(i, k));
    for (int64_t j = 0; j < N; ++j)
      low_b[2 * (k / 2 * N + j) + k % 2] = low(b[k * N + j] = right(k, j));
  }
  try {
    for (const bool add : {false, true})
      multiply(M, N, K, K, N, N, add, paired ? static_cast<void *>(low_a) : a,
               paired ? static_cast<void *>(low_b) : b, c, paired);
  } catch (...) {
    return false;
  }
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < N; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += 2 * left(i, k) * right(k, j);
      if (c[i * N + j] != sum) return false;
    }
  return true;
}

}  // namespace

#if defined(_WIN32)
#define SCULPT_API extern "C" __declspec(dllexport)
#else
#define SCULPT_API extern "C" __attribute__((visibility("default")))
#endif

SCULPT_API int32_t sculpt_cpu_abi(void) { return SCULPT_CPU_ABI; }

SCULPT_API const char *sculpt_cpu_error(void) { return sculpt::message; }

SCULPT_API const char *sculpt_cpu_isa(void) { return sculpt::rows().name; }

SCULPT_API int32_t sculpt_cpu_use_isa(const char *name) {
  if (sculpt::use_isa(name)) return 0;
  refuse("this CPU or build has no instruction set %s", name == nullptr ? "(null)" : name);
  return 1;
}

SCULPT_API int32_t sculpt_cpu_multiplies(sculpt_row_gemm multiply, bool paired) {
  return multiply != nullptr && multiplies(multiply, paired);
}

SCULPT_API int64_t sculpt_cpu_workspace(const sculpt_products *products) {
  return check_shape(*products) ? sculpt::workspace(*products) : -1;
}

SCULPT_API int32_t sculpt_cpu_expand_add(const sculpt_expand_add *job) {
  const sculpt_products &p = job->products;
  if (p.form != SCULPT_CORE) return refuse("form must be 0 (core) for expand_add"), 1;
  if (!check_products(p) || !check_matrix("W", job->W, p.m, p.n, true) ||
      !check_matrix("base", job->base, p.m, p.n, false) ||
      !check_rounding(job->rounding, "W", job->W))
    return 1;
  if (job->C == nullptr && p.r > 0 && p.s > 0) return refuse("C must not be null"), 1;
  if (p.m > 0 && p.n > 0) sculpt::expand_add(*job);
  return 0;
}

SCULPT_API int32_t sculpt_cpu_project_adamw(const sculpt_adamw *job) {
  const sculpt_products &p = job->products;
  const bool copied = job->copy.data != nullptr;
  if (!check_products(p) || !check_matrix("W", job->W, p.m, p.n, true) ||
      !check_matrix("G", job->G, p.m, p.n, false) ||
      !check_matrix("exp_avg", job->exp_avg, p.m, p.n, true) ||
      !check_matrix("exp_avg_sq", job->exp_avg_sq, p.m, p.n, true) ||
      (copied && !check_matrix("copy", job->copy, p.m, p.n, true)) ||
      !check_rounding(job->rounding, copied ? "copy" : "W", copied ? job->copy : job->W))
    return 1;
  if (p.m > 0 && p.n > 0) sculpt::project_adamw(*job);
  return 0;
}

SCULPT_API int32_t sculpt_cpu_round(const sculpt_matrix *out, const sculpt_matrix *in, int64_t m,
                                    int64_t n, const sculpt_rounding *rounding, int32_t threads) {
  if (m < 0 || n < 0) return refuse("m and n must not be negative; got %lld, %lld", wide(m), wide(n)), 1;
  if (threads < 1) return refuse("threads must be positive; got %d", static_cast<int>(threads)), 1;
  if (!check_matrix("out", *out, m, n, true) || !check_matrix("in", *in, m, n, false) ||
      !check_rounding(*rounding, "out", *out))
    return 1;
  if (m > 0 && n > 0) sculpt::round(*out, *in, m, n, *rounding, threads);
  return 0;
}
