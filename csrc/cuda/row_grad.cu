// row_grad: a grid of (rows, stretches of a row); each thread rewrites elements that only it touches.
#include "cuda/kernels.h"
#include "cuda/rewrite.cuh"

namespace gft_megatron::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

template <typename T>
constexpr int kStretch = kThreads * kUnroll * kVectorWidth<T>;

template <typename T, bool kEntropy, bool kVectors>
__global__ void __launch_bounds__(kThreads) row_grad_kernel(const __grid_constant__ GradParams params) {
  const Shard& shard = params.shard;
  const int64_t i = blockIdx.x;
  const int begin = static_cast<int>(blockIdx.y) * kStretch<T>;
  const int rest = static_cast<int>(shard.width) - begin;
  const Stretch stretch = {begin, rest < kStretch<T> ? rest : kStretch<T>};
  T* grad = static_cast<T*>(params.grad) + i * params.grad_row_stride + stretch.begin;
  const int64_t label = shard.labels[i];
  const float grad_log_prob = params.grad_log_prob[i];
  const float grad_entropy = kEntropy ? params.grad_entropy[i] : 0.0f;
  // Also a row without upstream gradient: its logits may hold anything, and 0 * NaN would reach the model.
  if (label < 0 || (grad_log_prob == 0.0f && grad_entropy == 0.0f)) {
    erase<kThreads>(grad, stretch.width);
    return;
  }
  const float entropy = kEntropy && grad_entropy != 0.0f ? params.entropy[i] : 0.0f;
  const Row row = {coefficients(grad_log_prob, grad_entropy, entropy, shard.inv_temperature),
                   params.max[i],
                   params.log_sum[i],
                   shard.inv_temperature,
                   in_stretch(label - shard.vocab_start, stretch),
                   in_stretch(shard.valid_width, stretch)};
  const T* logits = static_cast<const T*>(shard.logits) + i * shard.row_stride + stretch.begin;
  rewrite<kThreads, kUnroll, kEntropy, kVectors>(row, logits, grad, stretch.width);
}

template <typename T, bool kEntropy>
cudaError_t launch_row_grad(const GradParams& params, cudaStream_t stream) {
  const Shard& shard = params.shard;
  const Launch shape = {shard.num_rows, (shard.width + kStretch<T> - 1) / kStretch<T>, kThreads, 1, 0};
  const bool vectors = same_alignment<T>(shard, params.grad, params.grad_row_stride);
  return launch(vectors ? row_grad_kernel<T, kEntropy, true> : row_grad_kernel<T, kEntropy, false>, shape, params,
                stream);
}

}  // namespace

cudaError_t row_grad(const GradParams& params, cudaStream_t stream) {
  if (params.shard.width == 0) return cudaSuccess;
  return with_element(params.shard, [&](auto zero) {
    using T = decltype(zero);
    return params.grad_entropy != nullptr ? launch_row_grad<T, true>(params, stream)
                                          : launch_row_grad<T, false>(params, stream);
  });
}

}  // namespace gft_megatron::cuda
