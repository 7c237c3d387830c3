// Elementwise work on a segment of one row, for one instruction set.
//
// `rows.cpp` is compiled once per instruction set and fills one table each; all of them give the
// same bits, because no operation is contracted, reordered or reduced.
#pragma once

#include <cstdint>

namespace sculpt {

// Columns that are staged at a time: five float32 buffers of this size stay in the first cache.
constexpr int64_t SEGMENT = 512;
// Elements of a row that one call of the generator serves; see sculpt_kernels/rounding.py.
constexpr int64_t LANES = 8;

struct AdamW {
  float lr, rest1, rest2, eps, weight_decay, lift, root;
};

// What a step writes beside the moments.
enum class Out { NONE, DIRECTION, WEIGHTS };

// The operands of the next row, fetched into the second cache while this one is worked on.
struct Ahead {
  const char *at;
  int64_t element;  // bytes
};

// A step, or a part of it, on one segment. `w` may be null without weight decay and weights.
struct Step {
  AdamW scalars;
  bool take;             // the gradient into the moments
  Out kind;
  float *out, *m, *v;    // `out` may be `w`
  const float *w, *g;
  const float *product;  // leaves the gradient where it is taken, else the direction; or null
  Ahead ahead[4];
};

struct Rows {
  const char *name;
  // out <- x, `stride` in elements; x needs no alignment.
  void (*load)(float *out, const void *x, int64_t stride, int32_t dtype, int64_t n);
  // out <- x, rounded to nearest even.
  void (*store)(void *out, int64_t stride, int32_t dtype, const float *x, int64_t n);
  // out <- x on the grid of `dtype`, up or down by 16 random bits; a store of it is exact.
  void (*stochastic)(float *out, const float *x, const uint16_t *bits, int32_t dtype, int64_t n);
  // Random bits of `groups` consecutive groups of LANES elements.
  void (*random_bits)(uint16_t *out, uint64_t first, int64_t groups, uint64_t seed);
  // out <- x + t.
  void (*add)(float *out, const float *x, const float *t, int64_t n);
  void (*step)(const Step &step, int64_t n);
};

// The table in use.
const Rows &rows();

}  // namespace sculpt
