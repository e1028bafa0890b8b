// merge_stats and combine_stats: one thread merges the parts of one row, in their order.
#include "cuda/kernels.h"
#include "cuda/machine.cuh"
#include "rows.h"

namespace gft_megatron::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) combine_stats_kernel(const __grid_constant__ CombineParams params) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= params.num_rows) return;
  const Token token = combine(params.stats + 4 * i, params.num_shards, 4 * params.num_rows);
  params.log_prob[i] = token.log_prob;
  params.entropy[i] = token.entropy;
  params.max[i] = token.max;
  params.log_sum[i] = token.log_sum;
}

__global__ void __launch_bounds__(kThreads) merge_stats_kernel(const __grid_constant__ MergeParams params) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= params.num_rows) return;
  write_merged(params.stats + 4 * i, merge_parts(params.parts + 4 * i, params.num_parts, 4 * params.num_rows));
}

Launch shape_for(int64_t num_rows) { return {(num_rows + kThreads - 1) / kThreads, 1, kThreads, 1, 0}; }

}  // namespace

cudaError_t merge_stats(const MergeParams& params, cudaStream_t stream) {
  return launch(merge_stats_kernel, shape_for(params.num_rows), params, stream);
}

cudaError_t combine_stats(const CombineParams& params, cudaStream_t stream) {
  return launch(combine_stats_kernel, shape_for(params.num_rows), params, stream);
}

}  // namespace gft_megatron::cuda
