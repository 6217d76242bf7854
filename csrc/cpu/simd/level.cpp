#include "cpu/simd/level.h"

#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/check.h"

namespace depthprune {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

// Whether there are tiles of bfloat16, and the kernel lets this process use them: it has to be asked once, for the
// registers are 8 KB that it saves only then.
bool allows_amx() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;  // cpuid 7, edx
  constexpr long kRequest = 0x1023, kTileData = 18;        // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTiles) == 0 || (d & kBf16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Level detect() {
#if DEPTHPRUNE_HAS_LEVELS
  // Also false where the operating system does not save the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return allows_amx() ? Level::amx : Level::avx512_bf16;
  if (avx2 && avx512) return Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::generic;
}

Level highest() {
  static const Level found = detect();
  return found;
}

std::atomic<Level>& current() {
  static std::atomic<Level> value{highest()};
  return value;
}

}  // namespace

Level level() { return current().load(std::memory_order_relaxed); }

bool has_vnni() {
#if DEPTHPRUNE_HAS_LEVELS
  static const bool found = __builtin_cpu_supports("avx512vnni");
  return found;
#else
  return false;
#endif
}

const char* level_name(Level level) { return kNames[static_cast<int>(level)]; }

std::vector<std::string> level_names() { return {kNames, kNames + static_cast<int>(highest()) + 1}; }

void set_level(const std::string& name) {
  const std::vector<std::string> names = level_names();
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) {
      current().store(static_cast<Level>(i), std::memory_order_relaxed);
      return;
    }
  }
  DEPTHPRUNE_CHECK(false, "set_cpu_level", "name", c10::str("one of ", c10::Join(", ", names)), name);
}

}  // namespace depthprune
