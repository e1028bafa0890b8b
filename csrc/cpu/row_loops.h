// The CPU implementation of the row operators: one table of loops for each instruction set, chosen at run time.
#pragma once

#include "params.h"

namespace gft_megatron::cpu {

// Each runs rows [begin, end) on the calling thread.
struct RowLoops {
  const char* isa;
  void (*stats)(const StatsParams& params, int64_t begin, int64_t end);
  void (*grad)(const GradParams& params, int64_t begin, int64_t end);
  void (*sweep)(const SweepParams& params, int64_t begin, int64_t end);
  void (*kl_stats)(const KlStatsParams& params, int64_t begin, int64_t end);
  void (*kl_grad)(const KlGradParams& params, int64_t begin, int64_t end);
};

extern const RowLoops kBaseline;
extern const RowLoops kAvx2;
extern const RowLoops kAvx512;
extern const RowLoops kAvx512Bf16;

// The widest that this processor has; the environment variable GFT_MEGATRON_ISA=baseline|avx2|avx512|avx512_bf16
// overrides it.
const RowLoops& row_loops();

// Threaded over rows.
void row_stats(const StatsParams& params);
void merge_stats(const MergeParams& params);
void combine_stats(const CombineParams& params);
void row_grad(const GradParams& params);
void rectified_sweep(const SweepParams& params);
void kl_stats(const KlStatsParams& params);
void kl_grad(const KlGradParams& params);

}  // namespace gft_megatron::cpu
