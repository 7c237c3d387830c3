/* Stochastic rounding of float32 matrices on a CPU, behind a plain C ABI.
 *
 * Matrices are described, never owned. Every argument is checked before anything is written.
 * Results depend on the arguments alone: not on `threads`, not on the CPU's instruction set.
 */
#ifndef SCULPT_KERNELS_CPU_H
#define SCULPT_KERNELS_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or a function below changes; a caller refuses any other number. */
#define SCULPT_CPU_ABI 4

enum { SCULPT_BFLOAT16 = 1, SCULPT_FLOAT16 = 2 };

/* Strides in elements, any sign. `data` may be aligned to nothing at all. */
typedef struct sculpt_matrix {
  void *data;
  int64_t stride_row;
  int64_t stride_column;
} sculpt_matrix;

int32_t sculpt_cpu_abi(void);

/* What was wrong with the last call on this thread: which argument, what it was, what it must be. */
const char *sculpt_cpu_error(void);

/* out <- in, an m x n matrix of float32, rounded to `dtype` by the random bits of (seed, row0 + row,
 * column). Returns 0, or 1 if an argument is wrong. */
int32_t sculpt_cpu_round(const sculpt_matrix *out, int32_t dtype, const sculpt_matrix *in,
                         int64_t m, int64_t n, int64_t row0, uint64_t seed, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
