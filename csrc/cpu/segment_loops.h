// The CPU implementation of segment_sums and group_advantages, threaded over segments and samples.
#pragma once

#include "params.h"

namespace gft_megatron::cpu {

void segment_sums(const SegmentSumParams& params);
void group_advantages(const GroupAdvantageParams& params);

}  // namespace gft_megatron::cpu
