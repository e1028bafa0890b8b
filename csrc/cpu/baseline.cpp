// The row loops for whatever the compiler targets by default (SSE2 on x86-64, NEON on aarch64).
#include <math.h>
#include <stdint.h>

#include "cpu/row_loops.h"
#include "rows.h"

namespace gft_megatron::cpu {
namespace {
// clang-format off
#include "element.inc"
#include "vector_portable.inc"
#include "row_loops.inc"
#include "kl_loops.inc"
// clang-format on
}  // namespace

const RowLoops kBaseline = {"baseline", stats_rows, grad_rows, sweep_rows, kl_stats_rows, kl_grad_rows};

}  // namespace gft_megatron::cpu
