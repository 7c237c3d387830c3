// The C ABI on exactly allocated memory: a sanitizer sees every overrun.
#include <cstdio>
#include <cstdlib>
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

// A matrix of small integers with any strides, in memory of exactly its extent, `shift` bytes off
// alignment: float32, or bfloat16, which has these integers too.
class Dense {
 public:
  Dense(int64_t m, int64_t n, int64_t row, int64_t column, int32_t dtype, int64_t shift)
      : row_(row), column_(column), shift_(shift), dtype_(dtype), size_(dtype ? 2 : 4) {
    const int64_t last = m > 0 && n > 0 ? (m - 1) * row + (n - 1) * column + 1 : 0;
    bytes_.resize(static_cast<size_t>(last * size_ + shift));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) set(i, j, static_cast<float>((7 * i + 3 * j) % 100));
  }
  float get(int64_t i, int64_t j) const {
    uint32_t bits = 0;
    char *low = reinterpret_cast<char *>(&bits) + (dtype_ ? 2 : 0);
    std::memcpy(low, bytes_.data() + offset(i, j), static_cast<size_t>(size_));
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  void set(int64_t i, int64_t j, float x) {
    char bits[4];
    std::memcpy(bits, &x, sizeof bits);
    std::memcpy(bytes_.data() + offset(i, j), bits + (dtype_ ? 2 : 0), static_cast<size_t>(size_));
  }
  sculpt_matrix matrix() { return {bytes_.data() + shift_, row_, column_, dtype_, 0}; }

 private:
  size_t offset(int64_t i, int64_t j) const {
    return static_cast<size_t>((i * row_ + j * column_) * size_ + shift_);
  }
  int64_t row_, column_, shift_;
  int32_t dtype_;
  int64_t size_;
  std::vector<char> bytes_;
};

// What both dtypes hold is not rounded, in whatever direction and layout it is copied.
void check_copies(int64_t m, int64_t n, int64_t shift, int32_t stochastic) {
  for (const int32_t from : {SCULPT_FLOAT32, SCULPT_BFLOAT16}) {
    Dense in(m, n, n + 5, 1, from, shift), out(m, n, 1, m + 3, SCULPT_BFLOAT16, shift);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) out.set(i, j, -1);
    const sculpt_matrix x = in.matrix(), y = out.matrix();
    const sculpt_rounding rounding{3, 9, stochastic, 0};
    expect(sculpt_cpu_round(&y, &x, m, n, &rounding, 2) == 0, "round", m, n);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) expect(out.get(i, j) == in.get(i, j), "value", m, n);
  }
}

void check_random_bits() {
  // The first call of the generator with key 0 and counter 0 is a published test vector.
  const uint32_t words[4] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  float x[8];
  uint16_t out[8], halves[8];
  std::memcpy(halves, words, sizeof halves);
  for (float &value : x) value = 1.0f + 0x1p-8f;  // half-way between two bfloat16
  const sculpt_matrix from{x, 8, 1, SCULPT_FLOAT32, 0}, to{out, 8, 1, SCULPT_BFLOAT16, 0};
  const sculpt_rounding rounding{0, 0, 1, 0};
  expect(sculpt_cpu_round(&to, &from, 1, 8, &rounding, 1) == 0, "round", 1, 8);
  for (int i = 0; i < 8; ++i)
    expect(out[i] == (halves[i] >= 0x8000u ? 0x3F81u : 0x3F80u), "random bits", 1, i);
}

}  // namespace

int main() {
  expect(sculpt_cpu_abi() == SCULPT_CPU_ABI, "abi", 0, 0);
  for (const char *isa : {"scalar", "avx2", "avx512"}) {
    if (sculpt_cpu_use_isa(isa) != 0) continue;
    for (const int64_t m : {0, 1, 2, 17, 40})
      for (const int64_t n : {0, 1, 9, 33, 530})
        for (const int64_t shift : {0, 1, 2})
          for (const int32_t stochastic : {0, 1}) check_copies(m, n, shift, stochastic);
    check_random_bits();
  }
  if (failures == 0) std::puts("all right");
  return failures == 0 ? 0 : 1;
}
