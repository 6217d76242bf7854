// Instruction levels of kernels that are written once a level with intrinsics, one build for all (where plain loops
// do, the clones of clones.h are simpler). A level contains the ones before it.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 11 && !defined(__clang__)
#define DEPTHPRUNE_HAS_LEVELS 1
#else
#define DEPTHPRUNE_HAS_LEVELS 0
#endif

namespace depthprune {

enum class Level { generic, avx2, avx512, avx512_bf16, amx };

// The highest level of this machine, or the lower one that set_level asked for.
Level level();

// Products of bytes in one instruction, beside AVX-512 (level avx512 and above).
bool has_vnni();

const char* level_name(Level level);

// Names of the levels that this machine runs, lowest first.
std::vector<std::string> level_names();

// Runs all later calls at a level of level_names(), for tests and benchmarks; ValueError otherwise.
void set_level(const std::string& name);

}  // namespace depthprune
