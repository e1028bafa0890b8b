// The row loops for AVX-512 with conversion to bfloat16 in hardware (Cooper Lake, Sapphire Rapids, Zen 4, and later).
#include <math.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

// After the system headers: an inline function of theirs, compiled for this target, could be linked into other files.
#define GFT_TARGET_HAS_FMA
#define GFT_TARGET_HAS_BF16
#if defined(__clang__)
#pragma clang attribute push(                                                                                  \
    __attribute__((target("avx512f,avx512bf16,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"))), \
    apply_to = function)
#else
// GCC's own header initialises the unused operand of an intrinsic with itself (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bf16,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif

#include "cpu/row_loops.h"
#include "rows.h"

namespace gft_megatron::cpu {
namespace {
// clang-format off
#include "element.inc"
#include "vector_avx512.inc"
#include "row_loops.inc"
#include "kl_loops.inc"
// clang-format on
}  // namespace

const RowLoops kAvx512Bf16 = {"avx512_bf16", stats_rows, grad_rows, sweep_rows, kl_stats_rows, kl_grad_rows};

}  // namespace gft_megatron::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
