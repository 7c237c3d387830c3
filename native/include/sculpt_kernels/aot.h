/* GPU kernels of sculpt_kernels compiled ahead of time, behind a plain C ABI.
 *
 * pack.h, made with the kernels, has one function per operation and shape; all of them call
 * sculpt_aot_run. It works in the CUDA context that is current on the calling thread, launches on
 * `stream` and returns at once. The driver is found at run time: neither building nor linking
 * needs CUDA. A function that returns int32_t returns 0 on success, otherwise sculpt_aot_error()
 * says, on the same thread, what was wrong and what was expected, and nothing was launched by
 * this call unless the driver refused a launch half-way.
 */
#ifndef SCULPT_KERNELS_AOT_H
#define SCULPT_KERNELS_AOT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a function below changes. */
#define SCULPT_AOT_ABI 1

/* CUdeviceptr of the driver API. */
typedef unsigned long long sculpt_device_pointer;

int32_t sculpt_aot_abi(void);

/* What went wrong in the last call on this thread. */
const char *sculpt_aot_error(void);

/* Name of the operation with this number, from 0 on; NULL past the last one. An operation has one
 * number per architecture, which goes to `arch` unless that is NULL: 90 for compute capability 9.0.
 */
const char *sculpt_aot_operation(int32_t number, int32_t *arch);

/* Bytes of workspace that `operation` needs on the device of the current context, or -1. */
int64_t sculpt_aot_workspace(const char *operation);

/* Run `operation` on `count` tensors; `workspace` may be 0 if it needs none. Both are aligned to
 * 16 bytes. `stream` is a CUstream.
 */
int32_t sculpt_aot_run(const char *operation, const sculpt_device_pointer *tensors, int32_t count,
                       sculpt_device_pointer workspace, void *stream);

#ifdef __cplusplus
}
#endif

#endif
