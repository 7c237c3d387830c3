// What went wrong in the last call on this thread.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace sculpt {

inline thread_local char message[512] = "";

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
inline bool refuse(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return false;
}

}  // namespace sculpt
