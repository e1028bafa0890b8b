// Launchers of the CUDA kernels. No torch header: they compile wherever nvcc is, also beside a CPU torch.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace gft_megatron::cuda {

// Each returns the launch error. num_rows must be positive.
cudaError_t row_stats(const StatsParams& params, cudaStream_t stream);
cudaError_t combine_stats(const CombineParams& params, cudaStream_t stream);
cudaError_t row_grad(const GradParams& params, cudaStream_t stream);

}  // namespace gft_megatron::cuda
