// The few functions of the CUDA driver API that are needed, looked up at run time.
#pragma once

#include <cstddef>

namespace sculpt {

// Types and numbers as in cuda.h, whose ABI is stable.
using Result = int;
using Handle = void *;  // CUcontext, CUmodule, CUfunction, CUstream
constexpr int CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76;
constexpr int MAX_DYNAMIC_SHARED = 8;
constexpr unsigned DEFAULT_SHARED = 48 * 1024;

struct Driver {
  Result (*context)(Handle *);
  Result (*device)(int *);
  Result (*attribute)(int *, int, int);
  Result (*load)(Handle *, const void *);
  Result (*function)(Handle *, Handle, const char *);
  Result (*set)(Handle, int, int);
  Result (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   Handle, void **, void **);
  Result (*text)(Result, const char **);
};

// The driver; null, with a reason, where there is none.
const Driver *driver(const char **reason);

}  // namespace sculpt
