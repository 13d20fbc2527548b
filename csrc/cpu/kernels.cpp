// Entry points of one instruction set: this file is compiled once for each, with LINATTN_ISA naming the namespace.
#include "backward.h"
#include "step.h"

namespace linattn::LINATTN_ISA {

static size_t scratch(const Call& a, bool backward) {
  const size_t tiles = Tiles::floats(widened(a)), gradients = backward ? Gradients::floats(static_cast<const Backward&>(a)) : 0;
  return tiles > gradients ? tiles : gradients;
}

#define LINATTN_NAME(isa) #isa
#define LINATTN_STRING(isa) LINATTN_NAME(isa)
extern const Kernels kernels;
const Kernels kernels = {
    LINATTN_STRING(LINATTN_ISA), scratch, forward_job, forward_aggregate, backward_job, backward_aggregate, turn_scratch, turn, step_scratch, step};

}  // namespace linattn::LINATTN_ISA
