// The C ABI: every argument is checked before anything is written.
#include "sculpt_kernels/cpu.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "rows.h"

namespace {

thread_local char message[512] = "";

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
bool refuse(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return false;
}

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

bool check_round(const sculpt_matrix &out, const sculpt_matrix &in, int64_t m, int64_t n,
                 const sculpt_rounding &rounding, int32_t threads) {
  if (m < 0 || n < 0)
    return refuse("m and n must not be negative; got %lld, %lld", wide(m), wide(n));
  if (threads < 1) return refuse("threads must be positive; got %d", static_cast<int>(threads));
  if (!check_matrix("out", out, m, n, true) || !check_matrix("in", in, m, n, false)) return false;
  if (rounding.stochastic && out.dtype == SCULPT_FLOAT32)
    return refuse("rounding.stochastic is for bfloat16 and float16; out is float32");
  if (rounding.row0 < 0)
    return refuse("rounding.row0 must not be negative; got %lld", wide(rounding.row0));
  return true;
}

char *address(const sculpt_matrix &x, int64_t row, int64_t column) {
  const int64_t size = x.dtype == SCULPT_FLOAT32 ? 4 : 2;
  return static_cast<char *>(x.data) + (row * x.stride_row + column * x.stride_column) * size;
}

void round_row(const sculpt::Rows &rows, const sculpt_matrix &out, const sculpt_matrix &in,
               int64_t row, int64_t n, const sculpt_rounding &rounding) {
  using sculpt::LANES, sculpt::SEGMENT;
  alignas(64) float values[SEGMENT];
  alignas(64) uint16_t bits[SEGMENT];
  // The first group of the row, counted through the matrix.
  const uint64_t first = static_cast<uint64_t>(rounding.row0 + row) *
                         static_cast<uint64_t>((n + LANES - 1) / LANES);
  for (int64_t column = 0; column < n; column += SEGMENT) {
    const int64_t count = std::min(SEGMENT, n - column);
    rows.load(values, address(in, row, column), in.stride_column, in.dtype, count);
    if (rounding.stochastic) {
      rows.random_bits(bits, first + static_cast<uint64_t>(column / LANES),
                       (count + LANES - 1) / LANES, rounding.seed);
      rows.stochastic(values, bits, out.dtype, count);
    }
    rows.store(address(out, row, column), out.stride_column, out.dtype, values, count);
  }
}

}  // namespace

#if defined(_WIN32)
#define SCULPT_API extern "C" __declspec(dllexport)
#else
#define SCULPT_API extern "C" __attribute__((visibility("default")))
#endif

SCULPT_API int32_t sculpt_cpu_abi(void) { return SCULPT_CPU_ABI; }

SCULPT_API const char *sculpt_cpu_error(void) { return message; }

SCULPT_API const char *sculpt_cpu_isa(void) { return sculpt::rows().name; }

SCULPT_API int32_t sculpt_cpu_use_isa(const char *name) {
  if (sculpt::use_isa(name)) return 0;
  refuse("this CPU or build has no instruction set %s", name == nullptr ? "(null)" : name);
  return 1;
}

SCULPT_API int32_t sculpt_cpu_round(const sculpt_matrix *out, const sculpt_matrix *in, int64_t m,
                                    int64_t n, const sculpt_rounding *rounding, int32_t threads) {
  if (!check_round(*out, *in, m, n, *rounding, threads)) return 1;
  if (n == 0) return 0;
  const sculpt::Rows &rows = sculpt::rows();
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < m; ++row) round_row(rows, *out, *in, row, n, *rounding);
  return 0;
}
