// The products of an operation in two sweeps over tiles, and what it does with a tile.
#pragma once

#include <cstdint>

#include "sculpt_kernels/cpu.h"

namespace sculpt {

// A tile stays in the second cache. Its width is also the step in which products over a row are
// summed, so it depends on the shape of the matrix alone.
constexpr int64_t TILE_COLUMNS = 512;
constexpr int64_t PANEL_ROWS = 256;
// Rows and columns of a product of bases that one thread computes, about.
constexpr int64_t BLOCK = 512;

// Columns of a right factor that `row_gemm` sees at once: they stay in the second cache.
constexpr int64_t BAND = 128;
// Ranks up to which it is used: of deeper products the bands outgrow the cache.
constexpr int64_t DEPTH = 512;

struct Tile {
  int64_t row, column, rows, columns;
};

// The matrix that an operation works on, one float32 tile at a time.
class Operation {
 public:
  virtual ~Operation() = default;
  // What is projected, where it is a matrix in memory; else `fill` gives it, tile by tile.
  virtual const sculpt_matrix *source() const { return nullptr; }
  // Write the tile that is projected into `out`, row-major without gaps; `again` from the second
  // time on.
  virtual void fill(const Tile &, float *, bool) {}
  // Finish the tile, given its low-rank product; null stands for zero.
  virtual void finish(const Tile &tile, const float *product) = 0;
};

// Floats of workspace for these products.
int64_t workspace(const sculpt_products &p);

// Remove from the matrix what the form names: `finish` receives U(U'DV)V', or the like.
void project(const sculpt_products &p, Operation &operation);

// `finish` receives U C V' for C given, r x s; `fill` is never called.
void expand(const sculpt_products &p, const float *C, Operation &operation);

}  // namespace sculpt
