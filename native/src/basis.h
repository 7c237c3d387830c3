// A basis as products take it: by rows and turned, both row-major where they must be.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "sculpt_kernels/cpu.h"

namespace sculpt {

// A float32 matrix in memory; one of the strides is 1.
struct View {
  const float *data;
  int64_t row, column;
};

inline View view(const sculpt_matrix &x) {
  return {static_cast<const float *>(x.data), x.stride_row, x.stride_column};
}

inline View turned(View x) { return {x.data, x.column, x.row}; }

inline View at(View x, int64_t row, int64_t column) {
  return {x.data + row * x.row + column * x.column, x.row, x.column};
}

inline int64_t align(int64_t floats) { return (floats + 15) / 16 * 16; }

// Stride of rows that are made here: rows a power of two apart would share few lines of a cache.
inline int64_t apart(int64_t columns) { return align(columns) + 16; }

struct Basis {
  View rows, turned;

  // Floats that a copy takes, of the basis or of its transpose.
  static int64_t floats(int64_t rows, int64_t columns) {
    return std::max(rows * apart(columns), columns * apart(rows));
  }
};

// out (rows x columns) <- x' in blocks, x row-major; those that start in rows first to last.
inline void transpose(float *out, int64_t ld, View x, int64_t first, int64_t last, int64_t columns) {
  constexpr int64_t SIDE = 16;
  float block[SIDE][SIDE];
  for (int64_t i = first; i < last; i += SIDE)
    for (int64_t j = 0; j < columns; j += SIDE) {
      const int64_t height = std::min(SIDE, last - i), width = std::min(SIDE, columns - j);
      for (int64_t b = 0; b < width; ++b)
        std::memcpy(block[b], x.data + (j + b) * x.row + i, static_cast<size_t>(height) * 4);
      for (int64_t a = 0; a < height; ++a)
        for (int64_t b = 0; b < width; ++b) out[(i + a) * ld + j + b] = block[b][a];
    }
}

// Two rows of float32 as a row of pairs of bfloat16; false if a value is none.
inline bool pair_rows(uint16_t *out, const float *even, const float *odd, int64_t n) {
  uint32_t rest = 0;
  for (int64_t j = 0; j < n; ++j) {
    uint32_t low, high;
    std::memcpy(&low, even + j, sizeof low);
    std::memcpy(&high, odd + j, sizeof high);
    rest |= (low | high) & 0xFFFFu;
    out[2 * j] = static_cast<uint16_t>(low >> 16);
    out[2 * j + 1] = static_cast<uint16_t>(high >> 16);
  }
  return rest == 0;
}

}  // namespace sculpt
