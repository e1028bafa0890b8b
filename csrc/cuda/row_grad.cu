// row_grad: a grid of (rows, stretches of a row); each thread rewrites elements that only it touches.
#include "cuda/kernels.h"
#include "cuda/vector.cuh"
#include "rows.h"

namespace gft_megatron::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // vectors per thread

// exp() of anything below this is 0 in fp32; 0 * -inf would be NaN.
constexpr float kExpFloor = -104.0f;

template <typename T>
constexpr int64_t kStretch = int64_t{kThreads} * kUnroll * kVectorWidth<T>;

// What a thread needs to know of its row.
struct Row {
  Coefficients c;
  float max;
  float log_sum;
  float inv_temperature;
  int64_t label_column;
  int64_t valid_width;
};

template <bool kEntropy>
__device__ __forceinline__ float element_grad(const Row& row, float logit, int64_t column) {
  if (column >= row.valid_width) return 0.0f;
  const float log_prob = below_max(logit, row.inv_temperature, row.max) - row.log_sum;
  float factor = row.c.constant;
  if (kEntropy) factor += row.c.slope * fmaxf(log_prob, kExpFloor);
  const float grad = __expf(log_prob) * factor;
  return column == row.label_column ? grad + row.c.label : grad;
}

template <typename T, bool kEntropy>
__device__ __forceinline__ void write_one(const Row& row, const T* logits, T* grad, int64_t column) {
  grad[column] = from_float<T>(element_grad<kEntropy>(row, to_float(logits[column]), column));
}

template <typename T, bool kEntropy>
__device__ __forceinline__ void write_vector(const Row& row, Vector<T> vector, T* grad, int64_t column) {
#pragma unroll
  for (int k = 0; k < kVectorWidth<T>; ++k) {
    vector.values[k] = from_float<T>(element_grad<kEntropy>(row, to_float(vector.values[k]), column + k));
  }
  store_vector(grad + column, vector);
}

// kVectors: logits and grad share their alignment, row by row.
template <typename T, bool kEntropy, bool kVectors>
__global__ void __launch_bounds__(kThreads) row_grad_kernel(const __grid_constant__ GradParams params) {
  const Shard& shard = params.shard;
  const int64_t i = blockIdx.x;
  const float grad_log_prob = params.grad_log_prob[i];
  const float grad_entropy = kEntropy ? params.grad_entropy[i] : 0.0f;
  const T* logits = static_cast<const T*>(shard.logits) + i * shard.row_stride;
  T* grad = static_cast<T*>(params.grad) + i * params.grad_row_stride;
  const int64_t label = shard.labels[i];
  // Also a row without upstream gradient: its logits may hold anything, and 0 * NaN would reach the model.
  const bool dead = label < 0 || (grad_log_prob == 0.0f && grad_entropy == 0.0f);
  const float entropy = kEntropy && grad_entropy != 0.0f ? params.entropy[i] : 0.0f;
  const Row row = {coefficients(grad_log_prob, grad_entropy, entropy, shard.inv_temperature),
                   params.max[i],
                   params.log_sum[i],
                   shard.inv_temperature,
                   label - shard.vocab_start,
                   dead ? 0 : shard.valid_width};

  const RowSplit split = kVectors ? split_row(logits, shard.width) : RowSplit{shard.width, shard.width};
  const int64_t first = blockIdx.y * kStretch<T>;
  if (kVectors) {
    constexpr int64_t kStep = int64_t{kThreads} * kVectorWidth<T>;
    const int64_t begin = split.head + first + int64_t{threadIdx.x} * kVectorWidth<T>;
    Vector<T> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (begin + u * kStep < split.tail) vectors[u] = load_vector(logits + begin + u * kStep);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (begin + u * kStep < split.tail) write_vector<T, kEntropy>(row, vectors[u], grad, begin + u * kStep);
    }
    if (blockIdx.y == 0) {
      if (threadIdx.x < split.head) write_one<T, kEntropy>(row, logits, grad, threadIdx.x);
      if (split.tail + threadIdx.x < shard.width) {
        write_one<T, kEntropy>(row, logits, grad, split.tail + threadIdx.x);
      }
    }
  } else {
    const int64_t end = first + kStretch<T> < shard.width ? first + kStretch<T> : shard.width;
    for (int64_t j = first + threadIdx.x; j < end; j += kThreads) write_one<T, kEntropy>(row, logits, grad, j);
  }
}

template <typename T>
bool same_alignment(const GradParams& params) {
  const auto logits = reinterpret_cast<uintptr_t>(params.shard.logits);
  const auto grad = reinterpret_cast<uintptr_t>(params.grad);
  const int64_t stride_difference = (params.shard.row_stride - params.grad_row_stride) * int64_t{sizeof(T)};
  return logits % kVectorBytes == grad % kVectorBytes && stride_difference % kVectorBytes == 0;
}

template <typename T, bool kEntropy>
void launch_aligned(const GradParams& params, dim3 grid, cudaStream_t stream) {
  if (same_alignment<T>(params)) {
    row_grad_kernel<T, kEntropy, true><<<grid, kThreads, 0, stream>>>(params);
  } else {
    row_grad_kernel<T, kEntropy, false><<<grid, kThreads, 0, stream>>>(params);
  }
}

template <typename T>
cudaError_t launch(const GradParams& params, cudaStream_t stream) {
  // Rows along x, which alone reaches 2^31.
  const int64_t stretches = (params.shard.width + kStretch<T> - 1) / kStretch<T>;
  const dim3 grid(static_cast<unsigned>(params.shard.num_rows), static_cast<unsigned>(stretches));
  if (params.grad_entropy != nullptr) {
    launch_aligned<T, true>(params, grid, stream);
  } else {
    launch_aligned<T, false>(params, grid, stream);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t row_grad(const GradParams& params, cudaStream_t stream) {
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
