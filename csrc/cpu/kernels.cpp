// Entry points of one instruction set: this file is compiled once for each, with LINATTN_ISA naming the namespace.
#include "backward.h"
#include "step.h"

namespace linattn::LINATTN_ISA {

static size_t scratch(const Call& a, bool backward) {
  return backward ? Gradients::floats(static_cast<const Backward&>(a)) : Tiles::floats(a);
}

#define LINATTN_NAME(isa) #isa
#define LINATTN_STRING(isa) LINATTN_NAME(isa)
extern const Kernels kernels;
const Kernels kernels = {LINATTN_STRING(LINATTN_ISA), scratch, forward_job, forward_aggregate, backward_job, backward_aggregate, step_scratch, step};

}  // namespace linattn::LINATTN_ISA
