#include "cpu/segment_loops.h"

#include <ATen/Parallel.h>

#include "segments.h"

namespace gft_megatron::cpu {
namespace {

// Segments and samples that are worth a thread of their own.
constexpr int64_t kGrain = 64;

}  // namespace

void segment_sums(const SegmentSumParams& params) {
  at::parallel_for(0, params.num_segments, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t segment = first; segment < last; ++segment) {
      const int64_t begin = first_at_least(params.segment_ids, params.num_values, segment);
      const int64_t end = first_at_least(params.segment_ids, params.num_values, segment + 1);
      double sum = 0.0;
      int64_t count = 0;
      for (int64_t i = begin; i < end; ++i) {
        if (params.mask != nullptr && !params.mask[i]) continue;
        sum += params.values[i];
        ++count;
      }
      params.sums[segment] = static_cast<float>(sum);
      params.counts[segment] = static_cast<float>(count);
    }
  });
}

void group_advantages(const GroupAdvantageParams& params) {
  at::parallel_for(0, params.num_samples, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = first_at_least(params.group_ids, params.num_samples, params.group_ids[i]);
      int64_t end = i + 1;
      while (end < params.num_samples && params.group_ids[end] == params.group_ids[i]) ++end;
      params.advantages[i] =
          group_advantage(params.rewards, begin, end, i, params.divide_by_deviation, params.ddof, params.eps);
    }
  });
}

}  // namespace gft_megatron::cpu
