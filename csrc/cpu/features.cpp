#include "cpu/features.h"

#include <atomic>

#include "check.h"

namespace depthprune {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};

Level detect() {
#if DEPTHPRUNE_HAS_LEVELS
  // Also false where the operating system does not save the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Level::avx512_bf16;
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
