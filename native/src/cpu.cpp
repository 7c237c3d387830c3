// Stochastic rounding, a segment of a row at a time; the compiler vectorises the loops.
//
// No operation is contracted, reordered or reduced, so that every instruction set gives the same
// bits. They are those of sculpt_kernels/rounding.py, which says what the generator is.
#include "sculpt_kernels/cpu.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

// Compiled for each of these; the best that the CPU has is found when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && !defined(SCULPT_SANITIZE)
#define SCULPT_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define SCULPT_CLONES
#endif
#define SCULPT_INLINE static inline __attribute__((always_inline))

// Columns that are staged at a time: buffers of this size stay in the first cache.
constexpr int64_t SEGMENT = 512;
// Elements of a row that one call of the generator serves.
constexpr int64_t LANES = 8;

SCULPT_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

SCULPT_INLINE float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

// Up or down by 16 random bits, cut to 7 bits of mantissa.
SCULPT_INLINE uint16_t to_bfloat16(float x, uint16_t bits) {
  const uint32_t raw = bits_of(x);
  const uint32_t finite = (raw + bits) >> 16;
  const uint32_t special = (raw & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : raw >> 16;
  return static_cast<uint16_t>((raw & 0x7F800000u) != 0x7F800000u ? finite : special);
}

// Up or down by 13 random bits, or by 16 below 2^-14, where the spacing is 2^-24: all steps there
// are exact.
SCULPT_INLINE uint16_t to_float16(float x, uint16_t bits) {
  const uint32_t raw = bits_of(x);
  const uint32_t sign = (raw >> 16) & 0x8000u;
  const uint32_t rest = raw & 0x7FFFFFFFu;
  const float size = float_of(rest);
  const float steps = (size < 0x1p-14f ? size : 0.0f) * 0x1p24f;
  const int32_t down = static_cast<int32_t>(steps);
  const int32_t up = (steps - static_cast<float>(down)) * 65536.0f > static_cast<float>(bits);
  const uint32_t small = static_cast<uint32_t>(down + up);
  const uint32_t normal = (rest + (bits >> 3) - 0x38000000u) >> 13;
  uint32_t out = size < 0x1p-14f ? small : normal;
  out = out >= 0x7C00u || rest >= 0x7F800000u ? 0x7C00u : out;
  return static_cast<uint16_t>(rest > 0x7F800000u ? sign | 0x7E00u : sign | out);
}

// Philox4x32-10 (Salmon et al., SC'11). In memory the eight 16-bit halves of a call's four words
// are its eight lanes in order.
SCULPT_INLINE void random_bits(uint16_t *out, uint64_t first, int64_t groups, uint64_t seed) {
  constexpr int64_t WIDE = 32;
  for (int64_t start = 0; start < groups; start += WIDE) {
    uint32_t c0[WIDE], c1[WIDE], c2[WIDE], c3[WIDE], words[4 * WIDE];
    for (int64_t i = 0; i < WIDE; ++i) {
      const uint64_t counter = first + static_cast<uint64_t>(start + i);
      c0[i] = static_cast<uint32_t>(counter);
      c1[i] = static_cast<uint32_t>(counter >> 32);
      c2[i] = 0;
      c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int64_t i = 0; i < WIDE; ++i) {
        const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(p0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int64_t i = 0; i < WIDE; ++i) {
      words[4 * i] = c0[i];
      words[4 * i + 1] = c1[i];
      words[4 * i + 2] = c2[i];
      words[4 * i + 3] = c3[i];
    }
    const int64_t count = std::min(WIDE, groups - start);
    __builtin_memcpy(out + start * LANES, words, static_cast<uint64_t>(count * LANES) * 2);
  }
}

// `to <- from`, `n` elements of `size` bytes, both strides in bytes.
SCULPT_INLINE void copy(char *to, int64_t to_stride, const char *from, int64_t from_stride,
                        int64_t size, int64_t n) {
  if (to_stride == size && from_stride == size) {
    __builtin_memcpy(to, from, static_cast<uint64_t>(n * size));
    return;
  }
  for (int64_t i = 0; i < n; ++i)
    __builtin_memcpy(to + i * to_stride, from + i * from_stride, static_cast<uint64_t>(size));
}

SCULPT_CLONES static void round_row(char *out, int64_t out_stride, int32_t dtype, const char *in,
                                    int64_t in_stride, int64_t n, uint64_t group, uint64_t seed) {
  alignas(64) float values[SEGMENT];
  alignas(64) uint16_t bits[SEGMENT], rounded[SEGMENT];
  for (int64_t column = 0; column < n; column += SEGMENT) {
    const int64_t count = std::min(SEGMENT, n - column);
    copy(reinterpret_cast<char *>(values), 4, in + column * in_stride, in_stride, 4, count);
    random_bits(bits, group + static_cast<uint64_t>(column / LANES), (count + LANES - 1) / LANES,
                seed);
    if (dtype == SCULPT_BFLOAT16)
      for (int64_t i = 0; i < count; ++i) rounded[i] = to_bfloat16(values[i], bits[i]);
    else
      for (int64_t i = 0; i < count; ++i) rounded[i] = to_float16(values[i], bits[i]);
    copy(out + column * out_stride, out_stride, reinterpret_cast<char *>(rounded), 2, 2, count);
  }
}

static thread_local char message[512] = "";

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static bool refuse(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return false;
}

static long long wide(int64_t x) { return static_cast<long long>(x); }

static bool check(const sculpt_matrix &out, int32_t dtype, const sculpt_matrix &in, int64_t m,
                  int64_t n, int64_t row0, int32_t threads) {
  if (m < 0 || n < 0)
    return refuse("m and n must not be negative; got %lld, %lld", wide(m), wide(n));
  if (threads < 1) return refuse("threads must be positive; got %d", static_cast<int>(threads));
  if (dtype != SCULPT_BFLOAT16 && dtype != SCULPT_FLOAT16)
    return refuse("dtype must be 1 (bfloat16) or 2 (float16); got %d", static_cast<int>(dtype));
  if (row0 < 0) return refuse("row0 must not be negative; got %lld", wide(row0));
  if (m == 0 || n == 0) return true;
  if (out.data == nullptr || in.data == nullptr)
    return refuse("%s.data must not be null", out.data == nullptr ? "out" : "in");
  if ((out.stride_row == 0 && m > 1) || (out.stride_column == 0 && n > 1))
    return refuse("out is written, so its strides must not be 0; got %lld and %lld",
                  wide(out.stride_row), wide(out.stride_column));
  return true;
}

#if defined(_WIN32)
#define SCULPT_API extern "C" __declspec(dllexport)
#else
#define SCULPT_API extern "C" __attribute__((visibility("default")))
#endif

SCULPT_API int32_t sculpt_cpu_abi(void) { return SCULPT_CPU_ABI; }

SCULPT_API const char *sculpt_cpu_error(void) { return message; }

SCULPT_API int32_t sculpt_cpu_round(const sculpt_matrix *out, int32_t dtype,
                                    const sculpt_matrix *in, int64_t m, int64_t n, int64_t row0,
                                    uint64_t seed, int32_t threads) {
  if (!check(*out, dtype, *in, m, n, row0, threads)) return 1;
  const uint64_t groups = static_cast<uint64_t>((n + LANES - 1) / LANES);
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < m; ++row)
    round_row(static_cast<char *>(out->data) + 2 * row * out->stride_row, 2 * out->stride_column,
              dtype, static_cast<const char *>(in->data) + 4 * row * in->stride_row,
              4 * in->stride_column, n, static_cast<uint64_t>(row0 + row) * groups, seed);
  return 0;
}
