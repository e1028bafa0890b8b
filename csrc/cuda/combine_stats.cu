// combine_stats: one thread merges the shards of one row, in rank order.
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

}  // namespace

cudaError_t combine_stats(const CombineParams& params, cudaStream_t stream) {
  const Launch shape = {(params.num_rows + kThreads - 1) / kThreads, 1, kThreads, 1, 0};
  return launch(combine_stats_kernel, shape, params, stream);
}

}  // namespace gft_megatron::cuda
