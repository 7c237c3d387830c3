// The operations on arguments that have been checked.
#pragma once

#include "sculpt_kernels/cpu.h"
#include "sweep.h"

namespace sculpt {

void expand_add(const sculpt_expand_add &job);
void project_adamw(const sculpt_adamw &job);
void round(const sculpt_matrix &out, const sculpt_matrix &in, int64_t m, int64_t n,
           const sculpt_rounding &rounding, int32_t threads);

// Take the instruction set of this name; false if there is none on this CPU.
bool use_isa(const char *name);

}  // namespace sculpt
