// One row segment of a matrix in memory: as float32, in place where that is possible.
#pragma once

#include "rows.h"
#include "sculpt_kernels/cpu.h"

namespace sculpt {

inline int64_t size_of(int32_t dtype) { return dtype == SCULPT_FLOAT32 ? 4 : 2; }

inline const char *address(const sculpt_matrix &x, int64_t row, int64_t column) {
  return static_cast<const char *>(x.data) +
         (row * x.stride_row + column * x.stride_column) * size_of(x.dtype);
}

// Whether every row is an array of this dtype as it lies in memory.
inline bool in_place(const sculpt_matrix &x, int32_t dtype = SCULPT_FLOAT32) {
  return x.dtype == dtype && x.stride_column == 1 &&
         reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(size_of(dtype)) == 0;
}

// What is fetched of a row that comes later: nothing where its elements are apart.
inline Ahead ahead(const sculpt_matrix &x, int64_t row, int64_t column) {
  return {address(x, row, column), x.stride_column == 1 ? size_of(x.dtype) : 0};
}

class Segment {
 public:
  Segment(const Rows &rows, const sculpt_matrix &x, int64_t row, int64_t column, int64_t n)
      : rows_(rows),
        at_(const_cast<char *>(address(x, row, column))),
        dtype_(x.dtype),
        stride_(x.stride_column),
        n_(n),
        direct_(in_place(x)) {
    values_ = direct_ ? reinterpret_cast<float *>(at_) : buffer_;
  }
  Segment(const Segment &) = delete;
  Segment &operator=(const Segment &) = delete;

  // The values as they are stored; what is changed in them counts only after `store`.
  float *load() {
    if (!direct_) rows_.load(values_, at_, stride_, dtype_, n_);
    return values_;
  }

  // As float32, into `out`.
  void load_into(float *out) const { rows_.load(out, at_, stride_, dtype_, n_); }

  // What was loaded, and where to put what `store` then rounds to nearest.
  float *values() { return values_; }

  void store() {
    if (!direct_) rows_.store(at_, stride_, dtype_, values_, n_);
  }

  // The values after rounding, as the next load would give them.
  void store_and_load() {
    store();
    if (dtype_ != SCULPT_FLOAT32) load();
  }

  // Store other values, rounded by the bits of their place where there are bits.
  void store(const float *x, const uint16_t *bits) {
    if (bits != nullptr) {
      rows_.stochastic(buffer_, x, bits, dtype_, n_);
      x = buffer_;
    }
    if (!direct_ || x != values_) rows_.store(at_, stride_, dtype_, x, n_);
  }

 private:
  const Rows &rows_;
  char *at_;
  int32_t dtype_;
  int64_t stride_, n_;
  bool direct_;
  float *values_;
  alignas(64) float buffer_[SEGMENT];
};

// Random bits for a segment that starts at a multiple of LANES; null for rounding to nearest.
class Bits {
 public:
  Bits(const Rows &rows, const sculpt_rounding &rounding, int64_t width)
      : rows_(rows), rounding_(rounding), groups_((width + LANES - 1) / LANES) {}

  const uint16_t *at(int64_t row, int64_t column, int64_t n) {
    if (!rounding_.stochastic) return nullptr;
    const uint64_t first = static_cast<uint64_t>(rounding_.row0 + row) *
                               static_cast<uint64_t>(groups_) +
                           static_cast<uint64_t>(column / LANES);
    rows_.random_bits(bits_, first, (n + LANES - 1) / LANES, rounding_.seed);
    return bits_;
  }

 private:
  const Rows &rows_;
  const sculpt_rounding &rounding_;
  int64_t groups_;
  alignas(64) uint16_t bits_[SEGMENT];
};

}  // namespace sculpt
