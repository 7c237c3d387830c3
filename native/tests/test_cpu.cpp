// The C ABI on exactly allocated memory: a sanitizer sees every overrun.
#include <cstdio>
#include <cstring>
#include <vector>

#include "sculpt_kernels/cpu.h"

namespace {

int failures = 0;

void expect(bool holds, const char *what, int64_t m, int64_t n) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED %s for %lld x %lld: %s\n", what, static_cast<long long>(m),
               static_cast<long long>(n), sculpt_cpu_error());
}

// Small integers, which bfloat16 has too, are not rounded, in whatever layout they are copied.
// Memory is of exactly the matrix's extent, `shift` bytes off alignment.
void check_copies(int64_t m, int64_t n, int64_t shift) {
  const bool any = m > 0 && n > 0;
  const int64_t in_row = n + 5, out_column = m + 3;
  const int64_t in_last = any ? (m - 1) * in_row + n : 0, out_last = any ? m + (n - 1) * out_column : 0;
  std::vector<char> in(static_cast<size_t>(4 * in_last + shift));
  std::vector<char> out(static_cast<size_t>(2 * out_last + shift));
  const auto value = [](int64_t i, int64_t j) { return static_cast<float>((7 * i + 3 * j) % 100); };
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const float x = value(i, j);
      std::memcpy(in.data() + shift + 4 * (i * in_row + j), &x, sizeof x);
    }
  const sculpt_matrix to{out.data() + shift, 1, out_column}, from{in.data() + shift, in_row, 1};
  expect(sculpt_cpu_round(&to, SCULPT_BFLOAT16, &from, m, n, 3, 9, 2) == 0, "round", m, n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const float x = value(i, j);
      const char *high = reinterpret_cast<const char *>(&x) + 2;
      const char *found = out.data() + shift + 2 * (i + j * out_column);
      expect(std::memcmp(found, high, 2) == 0, "value", m, n);
    }
}

void check_random_bits() {
  // The first call of the generator with key 0 and counter 0 is a published test vector.
  const uint32_t words[4] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  float x[8];
  uint16_t out[8], halves[8];
  std::memcpy(halves, words, sizeof halves);
  for (float &value : x) value = 1.0f + 0x1p-8f;  // half-way between two bfloat16
  const sculpt_matrix from{x, 8, 1}, to{out, 8, 1};
  expect(sculpt_cpu_round(&to, SCULPT_BFLOAT16, &from, 1, 8, 0, 0, 1) == 0, "round", 1, 8);
  for (int i = 0; i < 8; ++i)
    expect(out[i] == (halves[i] >= 0x8000u ? 0x3F81u : 0x3F80u), "random bits", 1, i);
}

}  // namespace

int main() {
  expect(sculpt_cpu_abi() == SCULPT_CPU_ABI, "abi", 0, 0);
  for (const int64_t m : {0, 1, 2, 17, 40})
    for (const int64_t n : {0, 1, 9, 33, 530})
      for (const int64_t shift : {0, 1, 2}) check_copies(m, n, shift);
  check_random_bits();
  if (failures == 0) std::puts("all right");
  return failures == 0 ? 0 : 1;
}
