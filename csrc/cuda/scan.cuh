// The first pass: the threads of a block read a stretch of a row once and merge what they found.
#pragma once

#include "cuda/vector.cuh"
#include "rows.h"

namespace gft_megatron::cuda {

// exp() of anything below this is 0 in fp32; 0 * -inf would be NaN.
constexpr float kExpFloor = -104.0f;

__device__ __forceinline__ Stats<float> no_stats() { return {-INFINITY, 0.0f, 0.0f}; }

// exp(delta) in two instructions, for sums. The product's rounding costs |delta| 2^-24 and ex2.approx 2^-22, relative.
// Terms that weigh something have delta > -13 (e^-13 * 300,000 < 1), so a sum is off by 1e-6 at most, log p by as much
// (it may be 1e-5) and the entropy by twice that (5e-6). expf costs eight instructions, and at 2 bytes a logit this
// pass has time for about fourteen.
__device__ __forceinline__ float quick_exp(float delta) {
  constexpr float kLog2E = 1.44269504f;
  return approximate_exp2(delta * kLog2E);
}

// Take N neighbouring logits into a thread's running statistics. fmaxf skips NaN, but the sum keeps it.
template <bool kEntropy, int N, typename T>
__device__ __forceinline__ void absorb(Stats<float>& stats, const T (&logits)[N], float inv_temperature) {
  float largest = to_float(logits[0]);
#pragma unroll
  for (int k = 1; k < N; ++k) largest = fmaxf(largest, to_float(logits[k]));
  largest *= inv_temperature;
  if (largest > stats.max) stats = relative_to(stats, largest);
  const float shift = finite_shift(stats.max);
  // One addition to each long sum: fewer roundings that may all go the same way.
  float sum = 0.0f;
  float weighted = 0.0f;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float delta = below_max(to_float(logits[k]), inv_temperature, shift);
    const float e = quick_exp(delta);
    sum += e;
    if (kEntropy) weighted += e * fmaxf(delta, kExpFloor);
  }
  stats.sum += sum;
  if (kEntropy) stats.weighted += weighted;
}

// What this thread finds of row[0, width). kKeep: every logit also goes to `kept`, which is aligned as the row is.
template <int kThreads, bool kEntropy, bool kKeep, typename T>
__device__ __forceinline__ Stats<float> scan(const T* row, int width, float inv_temperature, T* kept) {
  constexpr int kUnroll = 4;  // vectors in flight
  constexpr int kStep = kThreads * kVectorWidth<T>;
  Stats<float> stats = no_stats();
  const int thread = static_cast<int>(threadIdx.x);
  const RowSplit split = split_row(row, width);
  const auto absorb_one = [&](int column) {
    const T logits[1] = {row[column]};
    if (kKeep) kept[column] = logits[0];
    absorb<kEntropy>(stats, logits, inv_temperature);
  };
  if (thread < split.head) absorb_one(thread);
  int i = split.head + thread * kVectorWidth<T>;
  for (; i + (kUnroll - 1) * kStep < split.tail; i += kUnroll * kStep) {
    Vector<T> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) vectors[u] = load_vector(row + i + u * kStep);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (kKeep) *reinterpret_cast<Vector<T>*>(kept + i + u * kStep) = vectors[u];
      absorb<kEntropy>(stats, vectors[u].values, inv_temperature);
    }
  }
  for (; i < split.tail; i += kStep) {
    const Vector<T> vector = load_vector(row + i);
    if (kKeep) *reinterpret_cast<Vector<T>*>(kept + i) = vector;
    absorb<kEntropy>(stats, vector.values, inv_temperature);
  }
  if (split.tail + thread < width) absorb_one(split.tail + thread);
  return stats;
}

// Known to every lane afterwards.
__device__ __forceinline__ Stats<float> merge_warp(Stats<float> stats) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Stats<float> other = {__shfl_xor_sync(~0u, stats.max, offset), __shfl_xor_sync(~0u, stats.sum, offset),
                                __shfl_xor_sync(~0u, stats.weighted, offset)};
    stats = merge(stats, other);
  }
  return stats;
}

// Known to the first warp afterwards. `warps` is block memory for kThreads / kWarp of them.
template <int kThreads>
__device__ __forceinline__ Stats<float> merge_block(Stats<float> stats, Stats<float>* warps) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp, "one warp merges what each warp found");
  stats = merge_warp(stats);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = stats;
  __syncthreads();
  if (threadIdx.x < kWarp) stats = merge_warp(threadIdx.x < kThreads / kWarp ? warps[threadIdx.x] : no_stats());
  return stats;
}

}  // namespace gft_megatron::cuda
