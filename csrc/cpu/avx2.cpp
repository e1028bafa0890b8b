// The row loops for AVX2 (Haswell and Zen, and later).
#include <math.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

// After the system headers: an inline function of theirs, compiled for this target, could be linked into other files.
#define GFT_TARGET_HAS_FMA
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/row_loops.h"
#include "rows.h"

namespace gft_megatron::cpu {
namespace {
// clang-format off
#include "element.inc"
#include "vector_avx2.inc"
#include "row_loops.inc"
#include "kl_loops.inc"
// clang-format on
}  // namespace

const RowLoops kAvx2 = {"avx2", stats_rows, grad_rows, sweep_rows, kl_stats_rows, kl_grad_rows};

}  // namespace gft_megatron::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
