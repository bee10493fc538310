#include "kernels.h"
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace vlcore {

void prefer_huge_pages(void* memory, int64_t size) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(size)) / page * page;
  // A wish: a system that has none to give, or is not to give any, goes on with small ones.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace vlcore
