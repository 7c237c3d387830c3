// Which instruction set runs: the best that the CPU has, or the one that was asked for.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "rows.h"

namespace sculpt {

extern const Rows rows_scalar;
#ifdef SCULPT_X86
extern const Rows rows_avx2;
extern const Rows rows_avx512;
#endif

namespace {

bool has(const char *name) {
#ifdef SCULPT_X86
  if (std::strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2");
  if (std::strcmp(name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return std::strcmp(name, "scalar") == 0;
}

const Rows *find(const char *name) {
#ifdef SCULPT_X86
  for (const Rows *table : {&rows_avx512, &rows_avx2})
    if (std::strcmp(name, table->name) == 0 && has(name)) return table;
#endif
  return std::strcmp(name, "scalar") == 0 ? &rows_scalar : nullptr;
}

const Rows *best() {
#ifdef SCULPT_X86
  __builtin_cpu_init();
#endif
  for (const char *name : {"avx512", "avx2"})
    if (const Rows *table = find(name)) return table;
  return &rows_scalar;
}

std::atomic<const Rows *> &current() {
  static std::atomic<const Rows *> table{best()};
  return table;
}

}  // namespace

const Rows &rows() { return *current().load(std::memory_order_relaxed); }

bool use_isa(const char *name) {
  const Rows *table = name == nullptr ? nullptr : find(name);
  if (table != nullptr) current().store(table);
  return table != nullptr;
}

}  // namespace sculpt
