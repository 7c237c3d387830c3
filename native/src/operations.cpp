// What happens in the epilogue of the products, tile by tile.
#include "operations.h"

#include <algorithm>

#include "segment.h"

namespace sculpt {
namespace {

struct Place {
  int64_t row, column, n;
  int64_t offset;  // in the tile
  int64_t next;    // the row after, or this one if it is the last
};

// Call `function(place)` for each segment of a tile.
template <typename Function>
void segments(const Tile &tile, Function function) {
  for (int64_t i = 0; i < tile.rows; ++i)
    for (int64_t j = 0; j < tile.columns; j += SEGMENT)
      function(Place{tile.row + i, tile.column + j, std::min(SEGMENT, tile.columns - j),
                     i * tile.columns + j, tile.row + std::min(i + 1, tile.rows - 1)});
}

void fetch(const Ahead &next, int64_t n) {
  for (int64_t byte = 0; byte < n * next.element; byte += 64)
    __builtin_prefetch(next.at + byte, 0, 2);
}

class ExpandAdd final : public Operation {
 public:
  explicit ExpandAdd(const sculpt_expand_add &job) : job_(job), rows_(rows()) {}

  void finish(const Tile &tile, const float *product) override {
    alignas(64) float total[SEGMENT];
    Bits bits(rows_, job_.rounding, job_.products.n);
    segments(tile, [&](const Place &at) {
      fetch(ahead(job_.base, at.next, at.column), at.n);
      Segment base(rows_, job_.base, at.row, at.column, at.n);
      Segment out(rows_, job_.W, at.row, at.column, at.n);
      const float *x = base.load();
      if (product != nullptr) {
        rows_.add(total, x, product + at.offset, at.n);
        x = total;
      }
      out.store(x, bits.at(at.row, at.column, at.n));
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
        exact_(job.exp_avg.dtype == SCULPT_FLOAT32 && job.exp_avg_sq.dtype == SCULPT_FLOAT32) {
    step_.scalars = {job.lr, job.rest1, job.rest2, job.eps, job.weight_decay, job.lift, job.root};
  }

  const sculpt_matrix *source() const override { return job_.gradient ? &job_.G : nullptr; }

  void fill(const Tile &tile, float *out, bool again) override {
    segments(tile, [&](const Place &at) {
      if (job_.gradient) {
        fetch(ahead(job_.G, at.next, at.column), at.n);
        Segment(rows_, job_.G, at.row, at.column, at.n).load_into(out + at.offset);
        return;
      }
      Segment w(rows_, job_.W, at.row, at.column, at.n);
      step(at, !again, Out::DIRECTION, nullptr, w, out + at.offset);
    });
  }

  void finish(const Tile &tile, const float *product) override {
    Bits bits(rows_, job_.rounding, job_.products.n);
    segments(tile, [&](const Place &at) {
      Segment w(rows_, job_.W, at.row, at.column, at.n);
      float *out = w.values();
      step(at, job_.gradient, Out::WEIGHTS, product, w, out);
      // W and its copy from one float32 value; only one of them is rounded stochastically.
      const bool copied = job_.copy.data != nullptr;
      const uint16_t *random = bits.at(at.row, at.column, at.n);
      if (copied) Segment(rows_, job_.copy, at.row, at.column, at.n).store(out, random);
      w.store(out, copied ? nullptr : random);
    });
  }

 private:
  // One pass; two where the moments are rounded before they are used.
  void step(const Place &at, bool take, Out kind, const float *product, Segment &w, float *out) {
    Segment m(rows_, job_.exp_avg, at.row, at.column, at.n);
    Segment v(rows_, job_.exp_avg_sq, at.row, at.column, at.n);
    Segment g(rows_, job_.G, at.row, at.column, at.n);
    Step a = step_;
    a.take = take, a.kind = kind, a.out = out, a.m = m.load(), a.v = v.load();
    a.product = product == nullptr ? nullptr : product + at.offset;
    a.ahead[0] = ahead(job_.exp_avg, at.next, at.column);
    a.ahead[1] = ahead(job_.exp_avg_sq, at.next, at.column);
    a.ahead[2] = a.ahead[3] = {a.ahead[0].at, 0};
    if (take) {
      a.g = g.load();
      a.ahead[2] = ahead(job_.G, at.next, at.column);
    }
    if (kind == Out::WEIGHTS || a.scalars.weight_decay != 0) {
      a.w = w.load();
      a.ahead[3] = ahead(job_.W, at.next, at.column);
    }
    if (take && !exact_) {
      a.kind = Out::NONE;
      rows_.step(a, at.n);
      m.store_and_load();
      v.store_and_load();
      a.take = take = false, a.kind = kind, a.product = nullptr;
    }
    rows_.step(a, at.n);
    if (take) {
      m.store();
      v.store();
    }
  }

  const sculpt_adamw &job_;
  const Rows &rows_;
  const bool exact_;  // the moments are stored as they were computed
  Step step_{};
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
    segments({i, 0, 1, n}, [&](const Place &at) {
      Segment from(table, in, at.row, at.column, at.n), to(table, out, at.row, at.column, at.n);
      to.store(from.load(), bits.at(at.row, at.column, at.n));
    });
  }
}

}  // namespace sculpt
