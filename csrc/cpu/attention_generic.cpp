// attention_tile.h for every CPU; attention_v3.cpp and attention_v4.cpp are the builds for newer x86-64.
#include "cpu/attention_tile.h"

namespace depthprune::attention {

void attend_generic(const Problem& problem, const Task& task, Scratch& scratch, float* partials) {
  attend<4, false>(problem, task, scratch, partials);
}

}  // namespace depthprune::attention
