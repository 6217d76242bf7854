// tile.inc for AVX-512 BF16. The pragma rather than DEPTHPRUNE_CLONES: GCC lowers vectors that are
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

#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define DEPTHPRUNE_BF16_PAIRS  // GCC 12 does not define __AVX512BF16__ after the pragma
#define DEPTHPRUNE_TARGET      // the pragma names it
#include "cpu/attention/tile.inc"

namespace depthprune::attention {

void attend_avx512_bf16(const Problem& problem, const Task& task, Scratch& scratch, float* partials) {
  attend<16, true>(problem, task, scratch, partials);
}

}  // namespace depthprune::attention

#endif
