/* CPU kernels of sculpt_kernels behind a plain C ABI.
 *
 * Matrices are described, never owned. Every function checks what it is given before it writes;
 * a function that returns int32_t returns 0 on success, otherwise sculpt_cpu_error() says, on the
 * same thread, which argument was wrong, what it was and what was expected.
 *
 * Results depend on the arguments alone: not on `threads`, not on `panel_rows`, not on the
 * instruction set that was chosen at run time.
 */
#ifndef SCULPT_KERNELS_CPU_H
#define SCULPT_KERNELS_CPU_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or a function below changes; a caller refuses any other number. */
#define SCULPT_CPU_ABI 2

enum { SCULPT_FLOAT32 = 0, SCULPT_BFLOAT16 = 1, SCULPT_FLOAT16 = 2 };
enum { SCULPT_CORE = 0, SCULPT_STRICT = 1, SCULPT_LEFT = 2, SCULPT_RIGHT = 3 };

/* Strides in elements, any sign. `data` may be aligned to nothing at all. */
typedef struct sculpt_matrix {
  void *data;
  int64_t stride_row;
  int64_t stride_column;
  int32_t dtype;
  int32_t reserved;
} sculpt_matrix;

/* Fortran SGEMM with 32-bit integers, as every BLAS has it. */
typedef void (*sculpt_sgemm)(const char *transa, const char *transb, const int32_t *m,
                             const int32_t *n, const int32_t *k, const float *alpha,
                             const float *a, const int32_t *lda, const float *b,
                             const int32_t *ldb, const float *beta, float *c, const int32_t *ldc);

/* c (+)= a b on the calling thread, row-major, `c` float32. `paired` is false for float32 operands.
 * For bfloat16 ones it is true: `b` has its rows in pairs, element (i, j) of b at 2 (i/2 ldb + j) +
 * i % 2, and `k` is even.
 */
typedef void (*sculpt_row_gemm)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                                int64_t ldc, bool add, const void *a, const void *b, float *c,
                                bool paired);

/* The products of an operation on an `m x n` matrix.
 *
 * U is m x r and V is n x s, float32, with one stride of 1; NULL data where the form has no such
 * side. `left_first` contracts (and expands last) the left side. The products of one panel run on
 * one thread each; `panel_rows` is the height of a panel, 0 for the default. `workspace` holds
 * sculpt_cpu_workspace() floats, aligned to 64 bytes. `row_gemm` and `row_gemm_bfloat16`, which
 * may be NULL, take over from `sgemm` what they can.
 */
typedef struct sculpt_products {
  int64_t m, n, r, s;
  sculpt_matrix U, V;
  sculpt_sgemm sgemm;
  sculpt_row_gemm row_gemm, row_gemm_bfloat16;
  float *workspace;
  int64_t workspace_floats;
  int32_t form;
  int32_t left_first;
  int32_t threads;
  int32_t panel_rows;
} sculpt_products;

/* Rounding of a stored matrix: to nearest even, or stochastically by (seed, row0 + row, column). */
typedef struct sculpt_rounding {
  int64_t row0;
  uint64_t seed;
  int32_t stochastic;
  int32_t reserved;
} sculpt_rounding;

/* W <- round(base + U C V'); C is r x s, float32, row-major and contiguous; form is ignored. */
typedef struct sculpt_expand_add {
  sculpt_products products;
  sculpt_matrix W, base; /* base may be W itself */
  const float *C;
  sculpt_rounding rounding;
} sculpt_expand_add;

/* One projected AdamW step; `copy.data` is NULL where no copy of W is wanted.
 *
 *   exp_avg    += rest1 (g - exp_avg),  exp_avg_sq += rest2 (g g - exp_avg_sq)
 *   D = lift exp_avg / (sqrt(exp_avg_sq) root + eps) + weight_decay W
 *
 * gradient = 0: g = G, W -= lr P(D). gradient = 1: g = P(G), W -= lr D.
 * Rounding is that of `copy` if there is one, else of W; the other is rounded to nearest.
 */
typedef struct sculpt_adamw {
  sculpt_products products;
  sculpt_matrix W, G, exp_avg, exp_avg_sq, copy;
  float lr, rest1, rest2, eps, weight_decay;
  float lift; /* 1 / (1 - beta1^step) */
  float root; /* 1 / sqrt(1 - beta2^step) */
  int32_t gradient;
  sculpt_rounding rounding;
} sculpt_adamw;

int32_t sculpt_cpu_abi(void);

/* What went wrong in the last call on this thread. */
const char *sculpt_cpu_error(void);

/* Instruction set in use: "avx512", "avx2" or "scalar"; the best that this CPU has by default. */
const char *sculpt_cpu_isa(void);
int32_t sculpt_cpu_use_isa(const char *name);

/* Floats of workspace that these products need, or -1. */
int64_t sculpt_cpu_workspace(const sculpt_products *products);

/* Whether `multiply` gives right results here, without throwing; float32 or, if `paired`, bfloat16. */
int32_t sculpt_cpu_multiplies(sculpt_row_gemm multiply, bool paired);

int32_t sculpt_cpu_expand_add(const sculpt_expand_add *job);
int32_t sculpt_cpu_project_adamw(const sculpt_adamw *job);

/* out <- in, an m x n matrix, converted and rounded. */
int32_t sculpt_cpu_round(const sculpt_matrix *out, const sculpt_matrix *in, int64_t m, int64_t n,
                         const sculpt_rounding *rounding, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
