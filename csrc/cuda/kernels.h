// Launchers of the CUDA kernels. No torch header: they compile wherever nvcc is, also beside a CPU torch.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace gft_megatron::cuda {

// Thread blocks that share one row of row_stats, so that few long rows still fill the GPU. Its stats are then
// [splits, n, 4], for merge_stats.
int64_t row_stats_splits(int64_t num_rows, int64_t width);

// Each returns the launch error. The number of rows, segments or samples must be positive. Every run gives the same
// bits for the same values at the same alignment; rectified_sweep also asks the device how much of a row it has room
// for.
cudaError_t row_stats(const StatsParams& params, int64_t splits, cudaStream_t stream);
cudaError_t merge_stats(const MergeParams& params, cudaStream_t stream);
cudaError_t combine_stats(const CombineParams& params, cudaStream_t stream);
cudaError_t row_grad(const GradParams& params, cudaStream_t stream);
cudaError_t rectified_sweep(const SweepParams& params, cudaStream_t stream);
cudaError_t segment_sums(const SegmentSumParams& params, cudaStream_t stream);
cudaError_t group_advantages(const GroupAdvantageParams& params, cudaStream_t stream);

}  // namespace gft_megatron::cuda
