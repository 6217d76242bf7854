// tile.inc for AVX2 (x86-64-v3). The pragma rather than DEPTHPRUNE_CLONES: GCC lowers vectors that are
// wider than the target's registers before it inlines, so the helpers too have to be compiled for this target. It
// comes after the standard headers, whose functions may be shared with code for every CPU.
#include "cpu/simd/clones.h"

#if DEPTHPRUNE_HAS_CLONES

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/attention/task.h"
#include "cpu/simd/formats.h"

#pragma GCC target("arch=x86-64-v3")
#include "cpu/attention/tile.inc"

namespace depthprune::attention {

void attend_avx2(const Problem& problem, const Task& task, Scratch& scratch, float* partials) {
  attend<8, false>(problem, task, scratch, partials);
}

}  // namespace depthprune::attention

#endif
