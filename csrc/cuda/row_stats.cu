// row_stats: one thread block reads one row once, 16 bytes at a time, and leaves four numbers.
#include "cuda/kernels.h"
#include "cuda/vector.cuh"
#include "rows.h"

namespace gft_megatron::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;  // vectors in flight per thread

// exp() of anything below this is 0 in fp32; 0 * -inf would be NaN.
constexpr float kExpFloor = -104.0f;

__device__ __forceinline__ Stats<float> no_stats() { return {-INFINITY, 0.0f, 0.0f}; }

// Take N logits into a thread's running statistics. fmaxf skips NaN, but the sum keeps it.
template <bool kEntropy, int N>
__device__ __forceinline__ void absorb(Stats<float>& stats, const float (&logits)[N], float inv_temperature) {
  float largest = logits[0];
#pragma unroll
  for (int k = 1; k < N; ++k) largest = fmaxf(largest, logits[k]);
  largest *= inv_temperature;
  if (largest > stats.max) stats = relative_to(stats, largest);
  const float shift = finite_shift(stats.max);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float delta = below_max(logits[k], inv_temperature, shift);
    const float e = __expf(delta);
    stats.sum += e;
    if (kEntropy) stats.weighted += e * fmaxf(delta, kExpFloor);
  }
}

template <bool kEntropy, typename T>
__device__ __forceinline__ void absorb_one(Stats<float>& stats, T logit, float inv_temperature) {
  const float logits[1] = {to_float(logit)};
  absorb<kEntropy>(stats, logits, inv_temperature);
}

template <bool kEntropy, typename T>
__device__ __forceinline__ void absorb_vector(Stats<float>& stats, const Vector<T>& vector, float inv_temperature) {
  float logits[kVectorWidth<T>];
#pragma unroll
  for (int k = 0; k < kVectorWidth<T>; ++k) logits[k] = to_float(vector.values[k]);
  absorb<kEntropy>(stats, logits, inv_temperature);
}

template <typename T, bool kEntropy>
__device__ __forceinline__ Stats<float> scan_row(const T* row, int64_t width, float inv_temperature) {
  Stats<float> stats = no_stats();
  const RowSplit split = split_row(row, width);
  if (threadIdx.x < split.head) absorb_one<kEntropy>(stats, row[threadIdx.x], inv_temperature);
  constexpr int64_t kStep = int64_t{kThreads} * kVectorWidth<T>;
  int64_t i = split.head + int64_t{threadIdx.x} * kVectorWidth<T>;
  for (; i + (kUnroll - 1) * kStep < split.tail; i += kUnroll * kStep) {
    Vector<T> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) vectors[u] = load_vector(row + i + u * kStep);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) absorb_vector<kEntropy>(stats, vectors[u], inv_temperature);
  }
  for (; i < split.tail; i += kStep) absorb_vector<kEntropy>(stats, load_vector(row + i), inv_temperature);
  if (split.tail + threadIdx.x < width) absorb_one<kEntropy>(stats, row[split.tail + threadIdx.x], inv_temperature);
  return stats;
}

__device__ __forceinline__ Stats<float> merge_warp(Stats<float> stats) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Stats<float> other = {__shfl_xor_sync(~0u, stats.max, offset), __shfl_xor_sync(~0u, stats.sum, offset),
                                __shfl_xor_sync(~0u, stats.weighted, offset)};
    stats = merge(stats, other);
  }
  return stats;
}

template <typename T, bool kEntropy>
__global__ void __launch_bounds__(kThreads) row_stats_kernel(const __grid_constant__ StatsParams params) {
  const Shard& shard = params.shard;
  const int64_t i = blockIdx.x;
  float* out = params.stats + 4 * i;
  const int64_t label = shard.labels[i];
  if (label < 0) {
    if (threadIdx.x == 0) write_ignored_stats(out, shard.vocab_start);
    return;
  }
  const T* row = static_cast<const T*>(shard.logits) + i * shard.row_stride;
  Stats<float> stats = merge_warp(scan_row<T, kEntropy>(row, shard.valid_width, shard.inv_temperature));

  __shared__ Stats<float> warps[kWarps];
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = stats;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  stats = merge_warp(threadIdx.x < kWarps ? warps[threadIdx.x] : no_stats());
  if (threadIdx.x > 0) return;
  const int64_t column = label - shard.vocab_start;
  const bool owned = column >= 0 && column < shard.valid_width;
  const float label_logit =
      owned ? below_max(to_float(row[column]), shard.inv_temperature, finite_shift(stats.max)) : kNotOwned;
  write_stats(out, stats.max, stats.sum, kEntropy ? stats.weighted : NAN, label_logit);
}

template <typename T>
cudaError_t launch(const StatsParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.shard.num_rows));
  if (params.want_entropy) {
    row_stats_kernel<T, true><<<grid, kThreads, 0, stream>>>(params);
  } else {
    row_stats_kernel<T, false><<<grid, kThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t row_stats(const StatsParams& params, cudaStream_t stream) {
  switch (params.shard.dtype) {
    case Dtype::kFloat32:
      return launch<float>(params, stream);
    case Dtype::kBFloat16:
      return launch<__nv_bfloat16>(params, stream);
    case Dtype::kFloat16:
      return launch<__half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace gft_megatron::cuda
