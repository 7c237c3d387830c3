// The C ABI against formulas in double, on exactly allocated memory: a sanitizer sees every overrun.
#include <cmath>
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

// A plain SGEMM, column-major, as the ABI asks for.
void sgemm(const char *ta, const char *tb, const int32_t *m, const int32_t *n, const int32_t *k,
           const float *alpha, const float *a, const int32_t *lda, const float *b,
           const int32_t *ldb, const float *beta, float *c, const int32_t *ldc) {
  const auto at = [](char turn, int32_t ld, int64_t i, int64_t j) {
    return turn == 'N' ? i + j * ld : j + i * ld;
  };
  for (int64_t i = 0; i < *m; ++i)
    for (int64_t j = 0; j < *n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < *k; ++p)
        sum += static_cast<double>(a[at(*ta, *lda, i, p)]) * b[at(*tb, *ldb, p, j)];
      float &out = c[i + j * *ldc];
      out = static_cast<float>(*alpha * sum + (*beta == 0 ? 0 : *beta * out));
    }
}

// The same for rows, with operands of either kind.
void row_gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
              const void *a, const void *b, float *c, bool paired) {
  const auto low = [](const void *x, int64_t i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t *>(x)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  const auto wide = [](const void *x, int64_t i) { return static_cast<const float *>(x)[i]; };
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = add ? c[i * ldc + j] : 0;
      for (int64_t p = 0; p < k; ++p)
        sum += paired ? low(a, i * lda + p) * low(b, 2 * (p / 2 * ldb + j) + p % 2)
                      : static_cast<double>(wide(a, i * lda + p)) * wide(b, p * ldb + j);
      c[i * ldc + j] = static_cast<float>(sum);
    }
}

void row_gemm_that_throws(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const void *,
                          const void *, float *, bool) {
  throw 1;
}

void row_gemm_that_does_nothing(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                                const void *, const void *, float *, bool) {}

float random_value() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

// A float32 matrix with any strides, in memory of exactly its extent, `shift` bytes off alignment.
class Dense {
 public:
  Dense(int64_t m, int64_t n, int64_t row, int64_t column, int64_t shift = 0)
      : row_(row), column_(column), shift_(shift) {
    const int64_t last = m > 0 && n > 0 ? (m - 1) * row + (n - 1) * column + 1 : 0;
    bytes_.resize(static_cast<size_t>(last * 4 + shift));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) set(i, j, random_value());
  }
  float get(int64_t i, int64_t j) const {
    float x;
    std::memcpy(&x, bytes_.data() + offset(i, j), sizeof x);
    return x;
  }
  void set(int64_t i, int64_t j, float x) { std::memcpy(bytes_.data() + offset(i, j), &x, sizeof x); }
  sculpt_matrix matrix() {
    return {bytes_.data() + shift_, row_, column_, SCULPT_FLOAT32, 0};
  }

 private:
  size_t offset(int64_t i, int64_t j) const {
    return static_cast<size_t>((i * row_ + j * column_) * 4 + shift_);
  }
  int64_t row_, column_, shift_;
  std::vector<char> bytes_;
};

struct Workspace {
  explicit Workspace(sculpt_products &p) {
    const int64_t floats = sculpt_cpu_workspace(&p);
    memory = std::aligned_alloc(64, static_cast<size_t>((floats * 4 + 63) / 64 * 64));
    p.workspace = static_cast<float *>(memory);
    p.workspace_floats = floats;
  }
  ~Workspace() { std::free(memory); }
  void *memory;
};

sculpt_products products(int64_t m, int64_t n, int64_t r, int64_t s, Dense &U, Dense &V,
                         int32_t form, int32_t threads) {
  sculpt_products p{};
  p.m = m, p.n = n, p.r = r, p.s = s;
  p.U = U.matrix(), p.V = V.matrix();
  p.sgemm = sgemm;
  p.form = form;
  p.left_first = form == SCULPT_CORE && m > n;
  p.threads = threads;
  p.panel_rows = 16;
  return p;
}

void check_expand_add(int64_t m, int64_t n, int64_t r, int64_t s, int64_t shift, int32_t threads,
                      bool by_rows) {
  Dense U(m, r, r > 0 ? r : 1, 1), V(n, s, 1, n), W(m, n, 1, m + 3, shift), C(r, s, s, 1);
  std::vector<double> want;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = W.get(i, j);
      for (int64_t a = 0; a < r; ++a)
        for (int64_t b = 0; b < s; ++b)
          sum += static_cast<double>(U.get(i, a)) * C.get(a, b) * V.get(j, b);
      want.push_back(sum);
    }
  sculpt_expand_add job{};
  job.products = products(m, n, r, s, U, V, SCULPT_CORE, threads);
  job.products.row_gemm = by_rows ? row_gemm : nullptr;
  Workspace workspace(job.products);
  job.W = job.base = W.matrix();
  job.C = static_cast<const float *>(C.matrix().data);
  expect(sculpt_cpu_expand_add(&job) == 0, "expand_add", m, n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      expect(std::fabs(W.get(i, j) - want[static_cast<size_t>(i * n + j)]) < 1e-4, "value", m, n);
}

// Without ranks the step is AdamW itself, whatever the form.
void check_adamw(int64_t m, int64_t n, int32_t form, int32_t gradient, int64_t shift) {
  Dense U(m, 0, 1, 1), V(n, 0, 1, 1), W(m, n, n, 1, shift), G(m, n, n + 5, 1), M(m, n, 1, m),
      S(m, n, n, 1, shift), K(m, n, 2 * n, 2);
  std::vector<double> want;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      S.set(i, j, S.get(i, j) * S.get(i, j) + 0.1f);
      const double g = G.get(i, j), a = M.get(i, j) + 0.1 * (g - M.get(i, j)),
                   b = S.get(i, j) + 0.01 * (g * g - S.get(i, j));
      want.push_back(W.get(i, j) -
                     0.1 * (2 * a / (std::sqrt(b) * 3 + 1e-6) + 0.25 * W.get(i, j)));
    }
  sculpt_adamw job{};
  job.products = products(m, n, 0, 0, U, V, form, 2);
  Workspace workspace(job.products);
  job.W = W.matrix(), job.G = G.matrix(), job.exp_avg = M.matrix(), job.exp_avg_sq = S.matrix();
  job.copy = K.matrix();
  job.lr = 0.1f, job.rest1 = 0.1f, job.rest2 = 0.01f, job.eps = 1e-6f, job.weight_decay = 0.25f;
  job.lift = 2, job.root = 3, job.gradient = gradient;
  expect(sculpt_cpu_project_adamw(&job) == 0, "project_adamw", m, n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      expect(std::fabs(W.get(i, j) - want[static_cast<size_t>(i * n + j)]) < 1e-4, "W", m, n);
      expect(W.get(i, j) == K.get(i, j), "copy", m, n);
    }
}

float to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0xFFFF0000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Products by rows, of bfloat16 where the gradient and the bases are, are those of the SGEMM.
void check_products(int64_t m, int64_t n, int32_t form, int32_t gradient, bool low, bool u_by_rows,
                    bool v_by_rows) {
  const int64_t r = m < 3 ? m : 3, s = n < 2 ? n : 2;
  Dense U(m, r, u_by_rows ? r : 1, u_by_rows ? 1 : m), V(n, s, v_by_rows ? s : 1, v_by_rows ? 1 : n);
  const Dense W(m, n, n, 1), M(m, n, n, 1), S(m, n, n, 1);
  Dense G(m, n, n, 1);
  std::vector<uint16_t> G_low(static_cast<size_t>(m * n));
  sculpt_matrix G_matrix = G.matrix();
  if (low) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t a = 0; a < r; ++a) U.set(i, a, to_bfloat16(U.get(i, a)));
    for (int64_t j = 0; j < n; ++j)
      for (int64_t b = 0; b < s; ++b) V.set(j, b, to_bfloat16(V.get(j, b)));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const float g = G.get(i, j);
        uint32_t bits;
        std::memcpy(&bits, &g, sizeof bits);
        G_low[static_cast<size_t>(i * n + j)] = static_cast<uint16_t>(bits >> 16);
      }
    G_matrix = {G_low.data(), n, 1, SCULPT_BFLOAT16, 0};
  }
  std::vector<Dense> results;
  for (const bool by_rows : {false, true}) {
    Dense w = W, a = M, b = S;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) b.set(i, j, S.get(i, j) * S.get(i, j) + 0.1f);
    sculpt_adamw job{};
    job.products = products(m, n, r, s, U, V, form, 2);
    if (by_rows) job.products.row_gemm = job.products.row_gemm_bfloat16 = row_gemm;
    Workspace workspace(job.products);
    job.W = w.matrix(), job.G = G_matrix, job.exp_avg = a.matrix(), job.exp_avg_sq = b.matrix();
    job.lr = 0.1f, job.rest1 = 0.1f, job.rest2 = 0.01f, job.eps = 1e-6f, job.lift = 2, job.root = 3;
    job.gradient = gradient;
    expect(sculpt_cpu_project_adamw(&job) == 0, "products", m, n);
    results.push_back(w);
    results.push_back(a);
  }
  for (size_t k : {size_t{0}, size_t{1}})
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j)
        expect(std::fabs(results[k].get(i, j) - results[k + 2].get(i, j)) < 1e-4, "by rows", m, n);
}

void check_multiplies() {
  for (const bool paired : {false, true}) {
    expect(sculpt_cpu_multiplies(row_gemm, paired) == 1, "a right product is taken", 0, paired);
    expect(sculpt_cpu_multiplies(nullptr, paired) == 0, "no product", 0, paired);
    expect(sculpt_cpu_multiplies(row_gemm_that_throws, paired) == 0, "one that throws", 0, paired);
    expect(sculpt_cpu_multiplies(row_gemm_that_does_nothing, paired) == 0, "a wrong one", 0, paired);
  }
}

void check_rounding() {
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
      for (const int64_t n : {0, 1, 9, 33, 530}) {
        for (const int64_t shift : {0, 1, 2}) {
          for (const bool by_rows : {false, true})
            check_expand_add(m, n, m < 3 ? m : 3, n < 2 ? n : 2, shift, 2, by_rows);
          check_expand_add(m, n, 0, 0, shift, 1, true);
        }
        for (int32_t form = SCULPT_CORE; form <= SCULPT_RIGHT; ++form)
          for (const int32_t gradient : {0, 1}) check_adamw(m, n, form, gradient, gradient);
      }
    check_rounding();
  }
  check_multiplies();
  for (const int64_t m : {1, 2, 17, 40})
    for (const int64_t n : {1, 9, 34, 530})
      for (int32_t form = SCULPT_CORE; form <= SCULPT_RIGHT; ++form)
        for (int bits = 0; bits < 16; ++bits)
          check_products(m, n, form, bits & 1, bits & 2, bits & 4, bits & 8);
  if (failures == 0) std::puts("all right");
  return failures == 0 ? 0 : 1;
}
