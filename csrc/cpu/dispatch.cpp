// Chooses the row loops for this processor and runs them on torch's threads.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/row_loops.h"
#include "rows.h"

namespace gft_megatron::cpu {
namespace {

// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;

// Narrowest first.
std::vector<const RowLoops*> supported_loops() {
  std::vector<const RowLoops*> loops = {&kBaseline};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    loops.push_back(&kAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    loops.push_back(&kAvx512);
    if (__builtin_cpu_supports("avx512bf16")) loops.push_back(&kAvx512Bf16);
  }
#endif
  return loops;
}

const RowLoops& choose_loops() {
  const std::vector<const RowLoops*> loops = supported_loops();
  const char* wish = std::getenv("GFT_MEGATRON_ISA");
  if (wish == nullptr || *wish == '\0') return *loops.back();
  std::string names;
  for (const RowLoops* candidate : loops) {
    if (std::string(wish) == candidate->isa) return *candidate;
    names += std::string(" ") + candidate->isa;
  }
  TORCH_CHECK_VALUE(false, "GFT_MEGATRON_ISA=", wish, ": this processor and build have", names);
}

template <typename Loop>
void for_rows(int64_t num_rows, int64_t width, const Loop& loop) {
  at::parallel_for(0, num_rows, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width)), loop);
}

}  // namespace

const RowLoops& row_loops() {
  static const RowLoops& loops = choose_loops();
  return loops;
}

void row_stats(const StatsParams& params) {
  const auto stats = row_loops().stats;
  for_rows(params.shard.num_rows, params.shard.width, [&](int64_t begin, int64_t end) { stats(params, begin, end); });
}

void merge_stats(const MergeParams& params) {
  for_rows(params.num_rows, params.num_parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      write_merged(params.stats + 4 * i, merge_parts(params.parts + 4 * i, params.num_parts, 4 * params.num_rows));
    }
  });
}

void combine_stats(const CombineParams& params) {
  for_rows(params.num_rows, params.num_shards, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Token token = combine(params.stats + 4 * i, params.num_shards, 4 * params.num_rows);
      params.log_prob[i] = token.log_prob;
      params.entropy[i] = token.entropy;
      params.max[i] = token.max;
      params.log_sum[i] = token.log_sum;
    }
  });
}

void row_grad(const GradParams& params) {
  const auto grad = row_loops().grad;
  for_rows(params.shard.num_rows, params.shard.width, [&](int64_t begin, int64_t end) { grad(params, begin, end); });
}

void rectified_sweep(const SweepParams& params) {
  const auto sweep = row_loops().sweep;
  for_rows(params.shard.num_rows, params.shard.width, [&](int64_t begin, int64_t end) { sweep(params, begin, end); });
}

void kl_stats(const KlStatsParams& params) {
  const auto stats = row_loops().kl_stats;
  for_rows(params.shard.num_rows, params.shard.width, [&](int64_t begin, int64_t end) { stats(params, begin, end); });
}

void kl_grad(const KlGradParams& params) {
  const auto grad = row_loops().kl_grad;
  for_rows(params.shard.num_rows, params.shard.width, [&](int64_t begin, int64_t end) { grad(params, begin, end); });
}

}  // namespace gft_megatron::cpu
