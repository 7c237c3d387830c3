/* CPU kernels of sculpt_kernels behind a plain C ABI.
 *
 * Matrices are described, never owned. Every function checks what it is given before it writes;
 * a function that returns int32_t returns 0 on success, otherwise sculpt_cpu_error() says, on the
 * same thread, which argument was wrong, what it was and what was expected.
 *
 * Results depend on the arguments alone: not on `threads`, not on the instruction set that was
 * chosen at run time.
 */
#ifndef SCULPT_KERNELS_CPU_H
#define SCULPT_KERNELS_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or a function below changes; a caller refuses any other number. */
#define SCULPT_CPU_ABI 3

enum { SCULPT_FLOAT32 = 0, SCULPT_BFLOAT16 = 1, SCULPT_FLOAT16 = 2 };

/* Strides in elements, any sign. `data` may be aligned to nothing at all. */
typedef struct sculpt_matrix {
  void *data;
  int64_t stride_row;
  int64_t stride_column;
  int32_t dtype;
  int32_t reserved;
} sculpt_matrix;

/* Rounding of a stored matrix: to nearest even, or stochastically by (seed, row0 + row, column). */
typedef struct sculpt_rounding {
  int64_t row0;
  uint64_t seed;
  int32_t stochastic;
  int32_t reserved;
} sculpt_rounding;

int32_t sculpt_cpu_abi(void);

/* What went wrong in the last call on this thread. */
const char *sculpt_cpu_error(void);

/* Instruction set in use: "avx512", "avx2" or "scalar"; the best that this CPU has by default. */
const char *sculpt_cpu_isa(void);
int32_t sculpt_cpu_use_isa(const char *name);

/* out <- in, an m x n matrix, converted and rounded. */
int32_t sculpt_cpu_round(const sculpt_matrix *out, const sculpt_matrix *in, int64_t m, int64_t n,
                         const sculpt_rounding *rounding, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
