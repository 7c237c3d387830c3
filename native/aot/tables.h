// What pack.cpp, made by python -m sculpt_kernels.aot, tells the launcher.
#pragma once

#include <cstdint>

enum SculptAotArgument : int32_t {
  SCULPT_AOT_TENSOR,     // tensors[index] + value bytes
  SCULPT_AOT_WORKSPACE,  // workspace + value bytes
  SCULPT_AOT_BITS32,     // value, as it is
  SCULPT_AOT_BITS64,
};

namespace sculpt {

struct Argument {
  SculptAotArgument kind;
  int32_t index;
  int64_t value;
};

struct Launch {
  int32_t kernel;
  uint32_t programs;
  const Argument *arguments;
  int32_t count;
};

struct Kernel {
  const char *function;
  const void *image;
  uint32_t threads, shared;
};

struct Operation {
  const char *name;
  int32_t arch, tensors;
  int64_t workspace;
  const Launch *launches;
  int32_t count;
};

struct Tables {
  const Kernel *kernels;
  int32_t kernel_count;
  const Operation *operations;
  int32_t operation_count;
};

extern const Tables tables;

}  // namespace sculpt
