// Reductions over stretches of equal ids, shared by the CPU loops and the CUDA kernels: one call computes one result,
// in a fixed order, whoever calls it.
#pragma once

#include <math.h>
#include <stdint.h>

#include "rows.h"

namespace gft_megatron {

// Index of the first id that is not below `id`; ids do not decrease.
GFT_INLINE int64_t first_at_least(const int64_t* ids, int64_t size, int64_t id) {
  int64_t low = 0;
  int64_t high = size;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (ids[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The advantage of sample i among rewards[begin, end), its group. Equal rewards give exactly 0 (rounding of the mean
// would leave residues that a small eps does not tame), and a group of one keeps its reward (the official GFT code).
GFT_INLINE float group_advantage(const double* rewards, int64_t begin, int64_t end, int64_t i, bool divide_by_deviation,
                                 int64_t ddof, double eps) {
  const double size = static_cast<double>(end - begin);
  if (end - begin == 1) return static_cast<float>(rewards[i]);
  double sum = 0.0;
  bool equal = true;
  for (int64_t j = begin; j < end; ++j) {
    sum += rewards[j];
    equal = equal && rewards[j] == rewards[begin];
  }
  if (equal) return 0.0f;
  const double mean = sum / size;
  if (!divide_by_deviation) return static_cast<float>(rewards[i] - mean);
  double squares = 0.0;
  for (int64_t j = begin; j < end; ++j) squares += (rewards[j] - mean) * (rewards[j] - mean);
  const double divisor = size - static_cast<double>(ddof);
  return static_cast<float>((rewards[i] - mean) / (sqrt(squares / (divisor > 1.0 ? divisor : 1.0)) + eps));
}

}  // namespace gft_megatron
