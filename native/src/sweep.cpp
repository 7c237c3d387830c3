#include "sweep.h"

#include <omp.h>

#include <algorithm>

#include "segment.h"

namespace sculpt {
namespace {

// A float32 matrix in memory; one of the strides is 1.
struct View {
  const float *data;
  int64_t row, column;
};

View view(const sculpt_matrix &x) {
  return {static_cast<const float *>(x.data), x.stride_row, x.stride_column};
}

View turned(View x) { return {x.data, x.column, x.row}; }

View at(View x, int64_t row, int64_t column) {
  return {x.data + row * x.row + column * x.column, x.row, x.column};
}

int64_t align(int64_t floats) { return (floats + 15) / 16 * 16; }

// Equal parts of `size`, in whole units; a last part of one row would be a different product.
struct Parts {
  Parts(int64_t size, int64_t target, int64_t unit) : size(size) {
    count = std::max<int64_t>(1, size / target + (size % target > target / 2 ? 1 : 0));
    const int64_t units = (size + unit - 1) / unit;
    width = std::max<int64_t>(1, (units + count - 1) / count) * unit;
    count = std::max<int64_t>(1, (size + width - 1) / width);
    if (count > 1 && size - (count - 1) * width < 2) --count;
  }
  int64_t start(int64_t i) const { return i * width; }
  int64_t length(int64_t i) const { return i + 1 == count ? size - start(i) : width; }
  // The most that `length` can be.
  int64_t largest() const { return std::min(size, width + 1); }

  int64_t size, count, width;
};

class Sweep {
 public:
  Sweep(const sculpt_products &p)
      : p_(p),
        rows_(p.m, p.panel_rows > 0 ? p.panel_rows : PANEL_ROWS, 1),
        // Random bits come in groups of eight columns, and cache lines in sixteen.
        columns_(p.n, TILE_COLUMNS, 16),
        // A narrow matrix has work for several threads too.
        thin_(p.n, std::clamp<int64_t>(p.n / 8, 128, TILE_COLUMNS), 16),
        across_(p.s, BLOCK, 16),
        fixed_rows_(p.m, PANEL_ROWS, 1),
        tall_rows_(p.m, (p.panel_rows > 0 ? p.panel_rows : PANEL_ROWS) * (p.m < 4096 ? 1 : 2), 1) {
    const bool core = p.form == SCULPT_CORE;
    needs_y_ = p.form == SCULPT_STRICT || p.form == SCULPT_RIGHT || (core && !p.left_first);
    needs_x_ = p.form == SCULPT_STRICT || p.form == SCULPT_LEFT || (core && p.left_first);
    y_size_ = needs_y_ ? align(p.m * p.s) : 0;
    x_size_ = needs_x_ ? align(p.r * p.n) : 0;
    c_size_ = align(p.r * p.s);
    const int64_t height =
        std::max({rows_.largest(), fixed_rows_.largest(), tall_rows_.largest()});
    tile_size_ = align(height * columns_.largest());
    Y_ = p.workspace;
    X_ = Y_ + y_size_;
    C_ = X_ + x_size_;
    tiles_ = C_ + c_size_;
  }

  int64_t floats() const {
    return y_size_ + x_size_ + c_size_ + tile_size_ * std::max<int32_t>(1, p_.threads);
  }

  void gather(Operation &operation) {
    if (needs_y_) gather_right(operation);
    if (needs_x_) gather_left(operation, needs_y_);
    if (p_.form == SCULPT_CORE || p_.form == SCULPT_STRICT) small_product();
  }

  // Y <- U C, or Y <- Y - U C where Y is kept; X <- C V' where the left side is expanded last.
  void spread(const float *C) {
    if (p_.form == SCULPT_CORE && p_.left_first) {
      for_each(thin_.count, [&](int64_t j) {
        gemm(p_.r, thin_.length(j), p_.s, 1, {C, p_.s, 1},
             at(turned(view(p_.V)), 0, thin_.start(j)), 0, X_ + thin_.start(j), p_.n);
      });
    } else {
      const bool keep = p_.form == SCULPT_STRICT;
      for_each(tall_rows_.count * across_.count, [&](int64_t index) {
        const Tile t = tile_at(tall_rows_, across_, index);
        gemm(t.rows, t.columns, p_.r, keep ? -1 : 1, at(view(p_.U), t.row, 0),
             at({C, p_.s, 1}, 0, t.column), keep ? 1 : 0, Y_ + t.row * p_.s + t.column, p_.s);
      });
    }
  }

  const float *core() const { return C_; }

  void finish(Operation &operation) {
    for_each(rows_.count * columns_.count, [&](int64_t index) {
      const Tile tile = tile_at(rows_, columns_, index);
      float *out = scratch();
      float beta = 0;
      if (needs_x_ && p_.r > 0) {
        gemm(tile.rows, tile.columns, p_.r, 1, at(view(p_.U), tile.row, 0),
             at({X_, p_.n, 1}, 0, tile.column), beta, out, tile.columns);
        beta = 1;
      }
      if (needs_y_ && p_.s > 0) {
        gemm(tile.rows, tile.columns, p_.s, 1, at({Y_, p_.s, 1}, tile.row, 0),
             at(turned(view(p_.V)), 0, tile.column), beta, out, tile.columns);
        beta = 1;
      }
      operation.finish(tile, beta == 0 ? nullptr : out);
    });
  }

 private:
  // Y <- D V, each panel of rows on its own, summed over the columns in order.
  void gather_right(Operation &operation) {
    for_each(tall_rows_.count, [&](int64_t i) {
      for (int64_t j = 0; j < columns_.count; ++j) {
        const Tile tile = tile_at(tall_rows_, columns_, i * columns_.count + j);
        gemm(tile.rows, p_.s, tile.columns, 1, loaded(operation, tile, false),
             at(view(p_.V), tile.column, 0), j > 0 ? 1 : 0, Y_ + tile.row * p_.s, p_.s);
      }
    });
  }

  // X <- U' D, each panel of columns on its own, summed over fixed blocks of rows in order.
  void gather_left(Operation &operation, bool again) {
    for_each(thin_.count, [&](int64_t j) {
      for (int64_t i = 0; i < fixed_rows_.count; ++i) {
        const Tile tile = tile_at(fixed_rows_, thin_, i * thin_.count + j);
        gemm(p_.r, tile.columns, tile.rows, 1, turned(at(view(p_.U), tile.row, 0)),
             loaded(operation, tile, again), i > 0 ? 1 : 0, X_ + tile.column, p_.n);
      }
    });
  }

  // C <- U' Y or X V, block by block.
  void small_product() {
    if (p_.r == 0 || p_.s == 0) return;
    const auto target = [](int64_t size) { return std::clamp<int64_t>(size / 2, 32, BLOCK); };
    const Parts down(p_.r, target(p_.r), 1), across(p_.s, target(p_.s), 1);
    for_each(down.count * across.count, [&](int64_t index) {
      const int64_t i = index / across.count, j = index % across.count;
      const int64_t row = down.start(i), column = across.start(j);
      const bool from_y = needs_y_;
      gemm(down.length(i), across.length(j), from_y ? p_.m : p_.n, 1,
           from_y ? at(turned(view(p_.U)), row, 0) : View{X_ + row * p_.n, p_.n, 1},
           from_y ? View{Y_ + column, p_.s, 1} : at(view(p_.V), 0, column), 0,
           C_ + row * p_.s + column, p_.s);
    });
  }

  // What is projected: where it lies, if the BLAS can read it there, else in the scratch.
  View loaded(Operation &operation, const Tile &tile, bool again) const {
    const sculpt_matrix *source = operation.source();
    if (source != nullptr && readable(*source)) return at(view(*source), tile.row, tile.column);
    operation.fill(tile, scratch(), again);
    return {scratch(), tile.columns, 1};
  }

  bool readable(const sculpt_matrix &x) const {
    return in_place(x) && (p_.m == 1 || (x.stride_row >= p_.n && x.stride_row <= INT32_MAX));
  }

  static Tile tile_at(const Parts &rows, const Parts &columns, int64_t index) {
    const int64_t i = index / columns.count, j = index % columns.count;
    return {rows.start(i), columns.start(j), rows.length(i), columns.length(j)};
  }

  float *scratch() const { return tiles_ + tile_size_ * omp_get_thread_num(); }

  // Which thread does which part is open; what a part does is not.
  template <typename Function>
  void for_each(int64_t count, Function function) {
#pragma omp parallel for schedule(dynamic) num_threads(std::max<int32_t>(1, p_.threads))
    for (int64_t i = 0; i < count; ++i) function(i);
  }

  // out (m x n, row-major) <- alpha A B + beta out, on this thread: a BLAS opens no threads inside
  // of a parallel region.
  void gemm(int64_t m, int64_t n, int64_t k, float alpha, View A, View B, float beta, float *out,
            int64_t ld) const {
    if (m == 0 || n == 0) return;
    if (k == 0) {
      for (int64_t i = 0; beta == 0 && i < m; ++i) std::fill_n(out + i * ld, n, 0.0f);
      return;
    }
    // The BLAS counts by columns: it computes out' = B' A'.
    const char *turn_a = A.column == 1 ? "N" : "T", *turn_b = B.column == 1 ? "N" : "T";
    const auto leading = [](const View &x, int64_t rows, int64_t columns) {
      const bool by_rows = x.column == 1;
      return static_cast<int32_t>(std::max({by_rows ? x.row : x.column,
                                            by_rows ? columns : rows, int64_t{1}}));
    };
    const int32_t mm = static_cast<int32_t>(m), nn = static_cast<int32_t>(n),
                  kk = static_cast<int32_t>(k), lda = leading(A, m, k), ldb = leading(B, k, n),
                  ldc = static_cast<int32_t>(std::max<int64_t>(ld, n));
    p_.sgemm(turn_b, turn_a, &nn, &mm, &kk, &alpha, B.data, &ldb, A.data, &lda, &beta, out, &ldc);
  }

  const sculpt_products &p_;
  Parts rows_, columns_, thin_, across_, fixed_rows_, tall_rows_;
  bool needs_y_, needs_x_;
  int64_t y_size_, x_size_, c_size_, tile_size_;
  float *Y_, *X_, *C_, *tiles_;
};

}  // namespace

int64_t workspace(const sculpt_products &p) { return Sweep(p).floats(); }

void project(const sculpt_products &p, Operation &operation) {
  Sweep sweep(p);
  sweep.gather(operation);
  if (p.form == SCULPT_CORE || p.form == SCULPT_STRICT) sweep.spread(sweep.core());
  sweep.finish(operation);
}

void expand(const sculpt_products &p, const float *C, Operation &operation) {
  Sweep sweep(p);
  sweep.spread(C);
  sweep.finish(operation);
}

}  // namespace sculpt
