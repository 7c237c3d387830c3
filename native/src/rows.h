// Elementwise work on a segment of one row, for one instruction set.
//
// `rows.cpp` is compiled once per instruction set and fills one table each; all of them give the
// same bits, because no operation is contracted, reordered or reduced.
#pragma once

#include <cstdint>

namespace sculpt {

// Columns that are staged at a time: buffers of this size stay in the first cache.
constexpr int64_t SEGMENT = 512;
// Elements of a row that one call of the generator serves; see sculpt_kernels/rounding.py.
constexpr int64_t LANES = 8;

struct Rows {
  const char *name;
  // out <- x, `stride` in elements; x needs no alignment.
  void (*load)(float *out, const void *x, int64_t stride, int32_t dtype, int64_t n);
  // out <- x, rounded to nearest even.
  void (*store)(void *out, int64_t stride, int32_t dtype, const float *x, int64_t n);
  // x <- x on the grid of `dtype`, up or down by 16 random bits; a store of it is exact.
  void (*stochastic)(float *x, const uint16_t *bits, int32_t dtype, int64_t n);
  // Random bits of `groups` consecutive groups of LANES elements.
  void (*random_bits)(uint16_t *out, uint64_t first, int64_t groups, uint64_t seed);
};

// The table in use.
const Rows &rows();

// Take the instruction set of this name; false if there is none on this CPU.
bool use_isa(const char *name);

}  // namespace sculpt
