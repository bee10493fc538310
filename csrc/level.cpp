#include "kernels.h"

#if defined(VLCORE_X86_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vlcore {

#if defined(VLCORE_X86_LEVELS)
static bool may_use_tiles() {
#if defined(VLCORE_X86_TILES)
  // Linux gives a process the state of tiles, 8 KiB a thread, only when it asks for it.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Level best_level() {
#if defined(VLCORE_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (bf16 && may_use_tiles()) return Level::amx;
  if (bf16) return Level::avx512_bf16;
  if (avx512) return Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::generic;
}

bool memory_serves_streams() {
#if defined(VLCORE_X86_LEVELS)
  static const bool is_intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return is_intel;
#else
  return false;
#endif
}

}  // namespace vlcore
