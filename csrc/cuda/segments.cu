// Reductions over sequences and groups: segment_sums gives a block to each segment, group_advantages a thread to each
// sample. Orders of addition are fixed, so every run gives the same bits.
#include "cuda/kernels.h"
#include "cuda/machine.cuh"
#include "segments.h"

namespace gft_megatron::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int kAdvantageThreads = 128;

// The number of values is exact in a double as well.
struct Sum {
  double value;
  double count;
};

__device__ __forceinline__ Sum add_warp(Sum sum) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sum.value += __shfl_xor_sync(~0u, sum.value, offset);
    sum.count += __shfl_xor_sync(~0u, sum.count, offset);
  }
  return sum;
}

__global__ void __launch_bounds__(kSumThreads) segment_sums_kernel(const __grid_constant__ SegmentSumParams params) {
  const int64_t segment = blockIdx.x;
  const int odd = static_cast<int>(threadIdx.x % 2);
  // Even lanes look for the begin while odd ones look for the end: each search is a chain of slow reads.
  const int64_t mine = first_at_least(params.segment_ids, params.num_values, segment + odd);
  const int64_t neighbours = __shfl_xor_sync(~0u, static_cast<long long>(mine), 1);
  const int64_t begin = odd ? neighbours : mine;
  const int64_t end = odd ? mine : neighbours;
  Sum sum = {0.0, 0.0};
  for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) {
    if (params.mask != nullptr && !params.mask[i]) continue;  // may hold NaN
    sum.value += params.values[i];
    sum.count += 1.0;
  }
  Sum* warps = reinterpret_cast<Sum*>(block_memory());
  sum = add_warp(sum);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  sum = add_warp(threadIdx.x < kSumThreads / kWarp ? warps[threadIdx.x] : Sum{0.0, 0.0});
  if (threadIdx.x > 0) return;
  params.sums[segment] = static_cast<float>(sum.value);
  params.counts[segment] = static_cast<float>(sum.count);
}

__global__ void __launch_bounds__(kAdvantageThreads)
    group_advantages_kernel(const __grid_constant__ GroupAdvantageParams params) {
  const int64_t i = int64_t{blockIdx.x} * kAdvantageThreads + threadIdx.x;
  if (i >= params.num_samples) return;
  const int64_t id = params.group_ids[i];
  const int64_t begin = first_at_least(params.group_ids, params.num_samples, id);
  int64_t end = i + 1;
  while (end < params.num_samples && params.group_ids[end] == id) ++end;
  params.advantages[i] =
      group_advantage(params.rewards, begin, end, i, params.divide_by_deviation, params.ddof, params.eps);
}

}  // namespace

cudaError_t segment_sums(const SegmentSumParams& params, cudaStream_t stream) {
  const Launch shape = {params.num_segments, 1, kSumThreads, 1, kSumThreads / kWarp * int64_t{sizeof(Sum)}};
  return launch(segment_sums_kernel, shape, params, stream);
}

cudaError_t group_advantages(const GroupAdvantageParams& params, cudaStream_t stream) {
  const Launch shape = {(params.num_samples + kAdvantageThreads - 1) / kAdvantageThreads, 1, kAdvantageThreads, 1, 0};
  return launch(group_advantages_kernel, shape, params, stream);
}

}  // namespace gft_megatron::cuda
