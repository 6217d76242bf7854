// tile.inc for every CPU; the files beside this one are the builds for newer x86-64.
#include "cpu/attention/tile.inc"

namespace depthprune::attention {

void attend_generic(const Problem& problem, const Task& task, Scratch& scratch, float* partials) {
  attend<4, false>(problem, task, scratch, partials);
}

}  // namespace depthprune::attention
