#include "sweep.h"

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "basis.h"
#include "segment.h"

namespace sculpt {
namespace {

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
    x_ld_ = apart(p.n);
    const int64_t y_size = needs_y_ ? align(p.m * p.s) : 0;
    const int64_t x_size = needs_x_ ? p.r * x_ld_ : 0;
    const bool copies = p.row_gemm != nullptr && std::max(p.r, p.s) <= DEPTH;
    row_gemm_ = copies ? p.row_gemm : nullptr;
    const bool turns_u = p.form != SCULPT_RIGHT && (p.U.stride_column != 1 || needs_x_);
    const bool turns_v = p.form != SCULPT_LEFT && (p.V.stride_column == 1 || needs_y_);
    const int64_t u_size = copies && turns_u ? Basis::floats(p.m, p.r) : 0;
    const int64_t v_size = copies && turns_v ? Basis::floats(p.n, p.s) : 0;
    pairs_ld_ = apart(p.s);
    const bool pairs = copies && p.row_gemm_bfloat16 != nullptr && needs_y_ && p.n % 2 == 0;
    const int64_t pairs_size = pairs ? p.n / 2 * pairs_ld_ : 0;
    const int64_t height =
        std::max({rows_.largest(), fixed_rows_.largest(), tall_rows_.largest()});
    tile_size_ = align(height * columns_.largest());
    Y_ = p.workspace;
    X_ = Y_ + y_size;
    C_ = X_ + x_size;
    U_copy_ = C_ + align(p.r * p.s);
    V_copy_ = U_copy_ + u_size;
    pairs_ = V_copy_ + v_size;
    tiles_ = pairs_ + pairs_size;
    floats_ = y_size + x_size + align(p.r * p.s) + u_size + v_size + pairs_size +
              tile_size_ * std::max<int32_t>(1, p.threads);
    paired_ = pairs;
  }

  int64_t floats() const { return floats_; }

  // The bases as the products of `gather`, if there is one, and of the rest take them.
  void lay_out(bool gathers) {
    if (p_.form != SCULPT_RIGHT)
      U_ = laid_out(p_.U, p_.m, p_.r, U_copy_, true, gathers && needs_x_);
    if (p_.form != SCULPT_LEFT)
      V_ = laid_out(p_.V, p_.n, p_.s, V_copy_, gathers && needs_y_, true);
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
        gemm(p_.r, thin_.length(j), p_.s, {C, p_.s, 1},
             at(V_.turned, 0, thin_.start(j)), 0, X_ + thin_.start(j), x_ld_);
      });
    } else {
      const bool keep = p_.form == SCULPT_STRICT;  // with -C
      for_each(tall_rows_.count * across_.count, [&](int64_t index) {
        const Tile t = tile_at(tall_rows_, across_, index);
        gemm(t.rows, t.columns, p_.r, at(U_.rows, t.row, 0),
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
        gemm(tile.rows, tile.columns, p_.r, at(U_.rows, tile.row, 0),
             at({X_, x_ld_, 1}, 0, tile.column), beta, out, tile.columns);
        beta = 1;
      }
      if (needs_y_ && p_.s > 0) {
        gemm(tile.rows, tile.columns, p_.s, at({Y_, p_.s, 1}, tile.row, 0),
             at(V_.turned, 0, tile.column), beta, out, tile.columns);
        beta = 1;
      }
      operation.finish(tile, beta == 0 ? nullptr : out);
    });
  }

 private:
  // Y <- D V, each panel of rows on its own, summed over the columns in order.
  void gather_right(Operation &operation) {
    const sculpt_matrix *low = low_source(operation);
    for_each(tall_rows_.count, [&](int64_t i) {
      for (int64_t j = 0; j < columns_.count; ++j) {
        const Tile tile = tile_at(tall_rows_, columns_, i * columns_.count + j);
        float *out = Y_ + tile.row * p_.s;
        if (low != nullptr)
          for (int64_t k = 0; k < p_.s; k += BAND)
            p_.row_gemm_bfloat16(tile.rows, std::min(BAND, p_.s - k), tile.columns,
                                 std::max(low->stride_row, p_.n), pairs_ld_, p_.s, j > 0,
                                 address(*low, tile.row, tile.column),
                                 pairs_ + tile.column / 2 * pairs_ld_ + k, out + k, true);
        else
          gemm(tile.rows, p_.s, tile.columns, loaded(operation, tile, false),
               at(V_.rows, tile.column, 0), j > 0 ? 1 : 0, out, p_.s);
      }
    });
  }

  // X <- U' D, each panel of columns on its own, summed over fixed blocks of rows in order.
  void gather_left(Operation &operation, bool again) {
    for_each(thin_.count, [&](int64_t j) {
      for (int64_t i = 0; i < fixed_rows_.count; ++i) {
        const Tile tile = tile_at(fixed_rows_, thin_, i * thin_.count + j);
        gemm(p_.r, tile.columns, tile.rows, at(U_.turned, 0, tile.row),
             loaded(operation, tile, again), i > 0 ? 1 : 0, X_ + tile.column, x_ld_);
      }
    });
  }

  // C <- U' Y or X V, block by block; -C where it is subtracted.
  void small_product() {
    if (p_.r == 0 || p_.s == 0) return;
    const auto target = [](int64_t size) { return std::clamp<int64_t>(size / 2, 32, BLOCK); };
    const Parts down(p_.r, target(p_.r), 1), across(p_.s, target(p_.s), 1);
    for_each(down.count * across.count, [&](int64_t index) {
      const int64_t i = index / across.count, j = index % across.count;
      const int64_t row = down.start(i), column = across.start(j);
      const bool from_y = needs_y_;
      float *out = C_ + row * p_.s + column;
      gemm(down.length(i), across.length(j), from_y ? p_.m : p_.n,
           from_y ? at(U_.turned, row, 0) : View{X_ + row * x_ld_, x_ld_, 1},
           from_y ? View{Y_ + column, p_.s, 1} : at(V_.rows, 0, column), 0, out, p_.s);
      for (int64_t a = 0; p_.form == SCULPT_STRICT && a < down.length(i); ++a)
        for (int64_t b = 0; b < across.length(j); ++b) out[a * p_.s + b] *= -1;
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
    return in_place(x) && spaced(x);
  }

  bool spaced(const sculpt_matrix &x) const {
    return p_.m == 1 || (x.stride_row >= p_.n && x.stride_row <= INT32_MAX);
  }

  // What is projected, where it and the basis are products in bfloat16: they lose nothing by it.
  const sculpt_matrix *low_source(Operation &operation) {
    const sculpt_matrix *source = operation.source();
    if (!paired_ || source == nullptr || !in_place(*source, SCULPT_BFLOAT16) || !spaced(*source))
      return nullptr;
    std::atomic<bool> exact{true};
    for_each((p_.n / 2 + BLOCK - 1) / BLOCK, [&](int64_t index) {
      for (int64_t i = index * BLOCK; exact && i < std::min(p_.n / 2, (index + 1) * BLOCK); ++i) {
        const float *even = at(V_.rows, 2 * i, 0).data, *odd = at(V_.rows, 2 * i + 1, 0).data;
        if (!pair_rows(reinterpret_cast<uint16_t *>(pairs_ + i * pairs_ld_), even, odd, p_.s))
          exact = false;
      }
    });
    return exact ? source : nullptr;
  }

  Basis laid_out(const sculpt_matrix &x, int64_t rows, int64_t columns, float *copy, bool by_rows,
                 bool by_columns) {
    const View given = view(x);
    Basis basis{given, turned(given)};
    const bool has_rows = given.column == 1;
    if (row_gemm_ == nullptr || columns == 0 || !(has_rows ? by_columns : by_rows)) return basis;
    View &wanted = has_rows ? basis.turned : basis.rows;
    const View source = has_rows ? basis.rows : basis.turned;
    const int64_t height = has_rows ? columns : rows, width = has_rows ? rows : columns;
    const int64_t ld = apart(width);
    for_each((height + 15) / 16, [&](int64_t i) {
      transpose(copy, ld, source, 16 * i, std::min(height, 16 * (i + 1)), width);
    });
    wanted = {copy, ld, 1};
    return basis;
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

  // out (m x n, row-major) <- A B + beta out, beta 0 or 1, on this thread: a BLAS opens no threads
  // inside of a parallel region.
  void gemm(int64_t m, int64_t n, int64_t k, View A, View B, float beta, float *out,
            int64_t ld) const {
    if (m == 0 || n == 0) return;
    if (k == 0) {
      for (int64_t i = 0; beta == 0 && i < m; ++i) std::fill_n(out + i * ld, n, 0.0f);
      return;
    }
    if (row_gemm_ != nullptr && A.column == 1 && B.column == 1) {
      for (int64_t j = 0; j < n; j += BAND)
        row_gemm_(m, std::min(BAND, n - j), k, std::max(A.row, k), std::max(B.row, n),
                  std::max(ld, n), beta != 0, A.data, B.data + j, out + j, false);
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
    const float alpha = 1;
    p_.sgemm(turn_b, turn_a, &nn, &mm, &kk, &alpha, B.data, &ldb, A.data, &lda, &beta, out, &ldc);
  }

  const sculpt_products &p_;
  Parts rows_, columns_, thin_, across_, fixed_rows_, tall_rows_;
  bool needs_y_, needs_x_;
  sculpt_row_gemm row_gemm_;  // null where the BLAS multiplies
  bool paired_;               // there is room for the right basis in pairs of rows
  int64_t x_ld_, pairs_ld_, tile_size_, floats_;
  float *Y_, *X_, *C_, *U_copy_, *V_copy_, *pairs_, *tiles_;
  Basis U_{}, V_{};
};

}  // namespace

int64_t workspace(const sculpt_products &p) { return Sweep(p).floats(); }

void project(const sculpt_products &p, Operation &operation) {
  Sweep sweep(p);
  sweep.lay_out(true);
  sweep.gather(operation);
  if (p.form == SCULPT_CORE || p.form == SCULPT_STRICT) sweep.spread(sweep.core());
  sweep.finish(operation);
}

void expand(const sculpt_products &p, const float *C, Operation &operation) {
  Sweep sweep(p);
  sweep.lay_out(false);
  sweep.spread(C);
  sweep.finish(operation);
}

}  // namespace sculpt
