// What happens in the epilogue of the products, tile by tile.
#include "operations.h"

#include <algorithm>

#include "segment.h"

namespace sculpt {
namespace {

// Call `function(row, column, n, offset)` for each segment of a tile; `offset` counts in the tile.
template <typename Function>
void segments(const Tile &tile, Function function) {
  for (int64_t i = 0; i < tile.rows; ++i)
    for (int64_t j = 0; j < tile.columns; j += SEGMENT)
      function(tile.row + i, tile.column + j, std::min(SEGMENT, tile.columns - j),
               i * tile.columns + j);
}

class ExpandAdd final : public Operation {
 public:
  explicit ExpandAdd(const sculpt_expand_add &job) : job_(job), rows_(rows()) {}

  void fill(const Tile &, float *, bool) override {}

  void finish(const Tile &tile, const float *product) override {
    alignas(64) float total[SEGMENT];
    Bits bits(rows_, job_.rounding, job_.products.n);
    segments(tile, [&](int64_t row, int64_t column, int64_t n, int64_t offset) {
      Segment base(rows_, job_.base, row, column, n);
      Segment out(rows_, job_.W, row, column, n);
      const float *x = base.load();
      if (product != nullptr) {
        rows_.add(total, x, product + offset, n);
        x = total;
      }
      out.store(x, bits.at(row, column, n));
    });
  }

 private:
  const sculpt_expand_add &job_;
  const Rows &rows_;
};

class ProjectedStep final : public Operation {
 public:
  explicit ProjectedStep(const sculpt_adamw &job)
      : job_(job),
        rows_(rows()),
        scalars_{job.lr, job.rest1, job.rest2, job.eps, job.weight_decay, job.lift, job.root} {}

  void fill(const Tile &tile, float *out, bool again) override {
    segments(tile, [&](int64_t row, int64_t column, int64_t n, int64_t offset) {
      if (job_.gradient) {
        Segment(rows_, job_.G, row, column, n).load_into(out + offset);
        return;
      }
      Segment m(rows_, job_.exp_avg, row, column, n), v(rows_, job_.exp_avg_sq, row, column, n);
      if (again) {
        m.load();
        v.load();
      } else {
        Segment g(rows_, job_.G, row, column, n);
        take(m, v, g.load(), n);
      }
      direct(out + offset, m, v, row, column, n);
    });
  }

  void finish(const Tile &tile, const float *product) override {
    alignas(64) float step[SEGMENT];
    Bits bits(rows_, job_.rounding, job_.products.n);
    segments(tile, [&](int64_t row, int64_t column, int64_t n, int64_t offset) {
      Segment m(rows_, job_.exp_avg, row, column, n), v(rows_, job_.exp_avg_sq, row, column, n);
      if (job_.gradient) {
        Segment g(rows_, job_.G, row, column, n);
        const float *gradient = g.load();
        if (product != nullptr) {
          rows_.subtract(step, gradient, product + offset, n);
          gradient = step;
        }
        take(m, v, gradient, n);
        direct(step, m, v, row, column, n);
      } else {
        m.load();
        v.load();
        direct(step, m, v, row, column, n);
        if (product != nullptr) rows_.subtract(step, step, product + offset, n);
      }
      apply(step, bits, row, column, n);
    });
  }

 private:
  // A gradient into the moments; what follows uses them as they are stored.
  void take(Segment &m, Segment &v, const float *gradient, int64_t n) {
    rows_.moments(m.load(), v.load(), gradient, scalars_, n);
    m.store_and_load();
    v.store_and_load();
  }

  void direct(float *out, Segment &m, Segment &v, int64_t row, int64_t column, int64_t n) {
    Segment w(rows_, job_.W, row, column, n);
    const float *weights = scalars_.weight_decay == 0 ? nullptr : w.load();
    rows_.direction(out, m.values(), v.values(), weights, scalars_, n);
  }

  // W and its copy from one float32 value; only one of them is rounded stochastically.
  void apply(float *step, Bits &bits, int64_t row, int64_t column, int64_t n) {
    Segment w(rows_, job_.W, row, column, n);
    rows_.step(step, w.load(), step, scalars_.lr, n);
    const uint16_t *random = bits.at(row, column, n);
    if (job_.copy.data == nullptr) {
      w.store(step, random);
      return;
    }
    w.store(step, nullptr);
    Segment(rows_, job_.copy, row, column, n).store(step, random);
  }

  const sculpt_adamw &job_;
  const Rows &rows_;
  const AdamW scalars_;
};

}  // namespace

void expand_add(const sculpt_expand_add &job) {
  ExpandAdd operation(job);
  expand(job.products, job.C, operation);
}

void project_adamw(const sculpt_adamw &job) {
  ProjectedStep operation(job);
  project(job.products, operation);
}

void round(const sculpt_matrix &out, const sculpt_matrix &in, int64_t m, int64_t n,
           const sculpt_rounding &rounding, int32_t threads) {
  const Rows &table = rows();
#pragma omp parallel for num_threads(std::max<int32_t>(1, threads))
  for (int64_t i = 0; i < m; ++i) {
    Bits bits(table, rounding, n);
    segments({i, 0, 1, n}, [&](int64_t row, int64_t column, int64_t length, int64_t) {
      Segment from(table, in, row, column, length), to(table, out, row, column, length);
      to.store(from.load(), bits.at(row, column, length));
    });
  }
}

}  // namespace sculpt
