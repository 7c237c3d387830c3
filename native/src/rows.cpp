// Compiled once per instruction set, with SCULPT_ISA naming it; the compiler vectorises the loops.
//
// No inline function of a header is used here: the linker would keep one copy for all sets.
#include "rows.h"

#include "sculpt_kernels/cpu.h"

#define SCULPT_NAME_(isa) rows_##isa
#define SCULPT_NAME(isa) SCULPT_NAME_(isa)
#define SCULPT_TEXT_(isa) #isa
#define SCULPT_TEXT(isa) SCULPT_TEXT_(isa)

namespace sculpt {
namespace {

inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

inline float magnitude(float x) { return float_of(bits_of(x) & 0x7FFFFFFFu); }

template <typename T>
inline T read(const char *at) {
  T x;
  __builtin_memcpy(&x, at, sizeof x);
  return x;
}

template <typename T>
inline void write(char *at, T x) {
  __builtin_memcpy(at, &x, sizeof x);
}

inline float from_bfloat16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

inline float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7FFFu;
  // Subnormals are multiples of 2^-24; this way no float32 subnormal appears in between.
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  const uint32_t normal = (rest << 13) + 0x38000000u;
  const uint32_t special = (rest << 13) | 0x7F800000u;
  const uint32_t finite = rest < 0x0400u ? small : normal;
  return float_of(sign | (rest >= 0x7C00u ? special : finite));
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = 0x7FC0u;
  return static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

inline uint16_t to_float16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t rest = u & 0x7FFFFFFFu;
  // Adding 1/2 leaves the multiples of 2^-24, rounded to nearest even by the addition itself.
  const uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3F000000u;
  const uint32_t shifted = rest - 0x38000000u;
  const uint32_t normal = (shifted + 0x0FFFu + ((shifted >> 13) & 1u)) >> 13;
  uint32_t out = rest < 0x38800000u ? small : normal;
  out = rest >= 0x477FF000u ? 0x7C00u : out;
  out = rest > 0x7F800000u ? 0x7E00u : out;
  return static_cast<uint16_t>(sign | out);
}

// `contiguous` is a constant where it matters, so that the common case has its own loop.
template <typename T, typename Convert>
inline void load_as(float *out, const char *x, int64_t stride, int64_t n, Convert convert) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i)
      out[i] = convert(read<T>(x + i * static_cast<int64_t>(sizeof(T))));
  } else {
    for (int64_t i = 0; i < n; ++i)
      out[i] = convert(read<T>(x + i * stride * static_cast<int64_t>(sizeof(T))));
  }
}

template <typename T, typename Convert>
inline void store_as(char *out, int64_t stride, const float *x, int64_t n, Convert convert) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i)
      write<T>(out + i * static_cast<int64_t>(sizeof(T)), convert(x[i]));
  } else {
    for (int64_t i = 0; i < n; ++i)
      write<T>(out + i * stride * static_cast<int64_t>(sizeof(T)), convert(x[i]));
  }
}

void load(float *out, const void *x, int64_t stride, int32_t dtype, int64_t n) {
  const char *at = static_cast<const char *>(x);
  if (dtype == SCULPT_BFLOAT16)
    load_as<uint16_t>(out, at, stride, n, from_bfloat16);
  else if (dtype == SCULPT_FLOAT16)
    load_as<uint16_t>(out, at, stride, n, from_float16);
  else
    load_as<float>(out, at, stride, n, [](float v) { return v; });
}

void store(void *out, int64_t stride, int32_t dtype, const float *x, int64_t n) {
  char *at = static_cast<char *>(out);
  if (dtype == SCULPT_BFLOAT16)
    store_as<uint16_t>(at, stride, x, n, to_bfloat16);
  else if (dtype == SCULPT_FLOAT16)
    store_as<uint16_t>(at, stride, x, n, to_float16);
  else
    store_as<float>(at, stride, x, n, [](float v) { return v; });
}

void stochastic(float *x, const uint16_t *bits, int32_t dtype, int64_t n) {
  if (dtype == SCULPT_BFLOAT16) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t raw = bits_of(x[i]);
      const uint32_t rounded = (raw + bits[i]) & 0xFFFF0000u;
      x[i] = float_of((raw & 0x7F800000u) != 0x7F800000u ? rounded : raw);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t raw = bits_of(x[i]);
    const uint32_t rounded = (raw + (bits[i] >> 3)) & 0xFFFFE000u;
    // Below 2^-14 float16 has a fixed spacing of 2^-24; every step here is exact.
    const float size = magnitude(x[i]);
    const float steps = (size < 0x1p-14f ? size : 0.0f) * 0x1p24f;
    const int32_t down = static_cast<int32_t>(steps);
    const int32_t up = (steps - static_cast<float>(down)) * 65536.0f > static_cast<float>(bits[i]);
    const uint32_t small = bits_of(static_cast<float>(down + up) * 0x1p-24f);
    const uint32_t signed_small = small | (raw & 0x80000000u);
    const uint32_t finite = size < 0x1p-14f ? signed_small : rounded;
    x[i] = float_of((raw & 0x7F800000u) != 0x7F800000u ? finite : raw);
  }
}

// Philox4x32-10 (Salmon et al., SC'11). In memory the eight 16-bit halves of a call's four words
// are its eight lanes in order.
void random_bits(uint16_t *out, uint64_t first, int64_t groups, uint64_t seed) {
  constexpr int64_t WIDE = 32;
  const uint32_t low_key = static_cast<uint32_t>(seed);
  const uint32_t high_key = static_cast<uint32_t>(seed >> 32);
  for (int64_t start = 0; start < groups; start += WIDE) {
    uint32_t c0[WIDE], c1[WIDE], c2[WIDE], c3[WIDE], words[4 * WIDE];
    for (int64_t i = 0; i < WIDE; ++i) {
      const uint64_t counter = first + static_cast<uint64_t>(start + i);
      c0[i] = static_cast<uint32_t>(counter);
      c1[i] = static_cast<uint32_t>(counter >> 32);
      c2[i] = 0;
      c3[i] = 0;
    }
    uint32_t k0 = low_key, k1 = high_key;
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
    const int64_t count = groups - start < WIDE ? groups - start : WIDE;
    __builtin_memcpy(out + start * LANES, words, static_cast<uint64_t>(count * LANES) * 2);
  }
}

}  // namespace

extern const Rows SCULPT_NAME(SCULPT_ISA);
const Rows SCULPT_NAME(SCULPT_ISA) = {
    SCULPT_TEXT(SCULPT_ISA), load, store, stochastic, random_bits,
};

}  // namespace sculpt
