// The second pass: logits become their gradient, each element in the hands of one thread.
#pragma once

#include "cuda/vector.cuh"
#include "rows.h"

namespace gft_megatron::cuda {

// What a thread needs to know of its row.
struct Row {
  Coefficients c;
  float max;
  float log_sum;
  float inv_temperature;
  int label_column;  // of the stretch at hand, and so is the next; may lie outside
  int valid_width;
};

// expf and not the quick exp of the first pass: an element may be arbitrarily unlikely, and its relative error counts.
template <bool kEntropy>
__device__ __forceinline__ float element_grad(const Row& row, float logit) {
  constexpr float kLogFloor = -104.0f;  // p is 0 there in fp32; 0 * -inf would be NaN
  const float log_prob = below_max(logit, row.inv_temperature, row.max) - row.log_sum;
  float factor = row.c.constant;
  if (kEntropy) factor += row.c.slope * fmaxf(log_prob, kLogFloor);
  return expf(log_prob) * factor;
}

// N neighbouring elements. Few of them are the label or padding, so only those ask which.
template <bool kEntropy, int N, typename T>
__device__ __forceinline__ void to_grads(const Row& row, T (&values)[N], int column) {
  float grads[N];
#pragma unroll
  for (int k = 0; k < N; ++k) grads[k] = element_grad<kEntropy>(row, to_float(values[k]));
  const bool has_label = row.label_column >= column && row.label_column < column + N;
  if (has_label || column + N > row.valid_width) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (column + k == row.label_column) grads[k] += row.c.label;
      if (column + k >= row.valid_width) grads[k] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) values[k] = from_float<T>(grads[k]);
}

// Overwrite grad[0, width) with zeros, whatever the logits hold.
template <int kThreads, typename T>
__device__ __forceinline__ void erase(T* grad, int width) {
  const int thread = static_cast<int>(threadIdx.x);
  const RowSplit split = split_row(grad, width);
  const T zero = from_float<T>(0.0f);
  Vector<T> zeros;
#pragma unroll
  for (int k = 0; k < kVectorWidth<T>; ++k) zeros.values[k] = zero;
  if (thread < split.head) grad[thread] = zero;
  for (int i = split.head + thread * kVectorWidth<T>; i < split.tail; i += kThreads * kVectorWidth<T>) {
    store_vector(grad + i, zeros);
  }
  if (split.tail + thread < width) grad[split.tail + thread] = zero;
}

// logits[0, width), a stretch of `row` whose columns are counted from the stretch's own start, to grad[0, width), which
// may be the same memory. kVectors: both have the same alignment; otherwise elements move one by one. kUnroll: vectors
// in flight.
template <int kThreads, int kUnroll, bool kEntropy, bool kVectors, typename T>
__device__ __forceinline__ void rewrite(const Row& row, const T* logits, T* grad, int width) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto rewrite_one = [&](int column) {
    T values[1] = {logits[column]};
    to_grads<kEntropy>(row, values, column);
    grad[column] = values[0];
  };
  if (!kVectors) {
    for (int j = thread; j < width; j += kThreads) rewrite_one(j);
    return;
  }
  constexpr int kStep = kThreads * kVectorWidth<T>;
  const RowSplit split = split_row(grad, width);
  if (thread < split.head) rewrite_one(thread);
  for (int i = split.head + thread * kVectorWidth<T>; i < split.tail; i += kUnroll * kStep) {
    Vector<T> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * kStep < split.tail) vectors[u] = load_vector(logits + i + u * kStep);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * kStep >= split.tail) break;
      to_grads<kEntropy>(row, vectors[u].values, i + u * kStep);
      store_vector(grad + i + u * kStep, vectors[u]);
    }
  }
  if (split.tail + thread < width) rewrite_one(split.tail + thread);
}

// Whether every row of the gradient is aligned as its logits are.
template <typename T>
bool same_alignment(const Shard& shard, const void* grad, int64_t grad_row_stride) {
  const int64_t stride_difference = (shard.row_stride - grad_row_stride) * int64_t{sizeof(T)};
  return misalignment(static_cast<const T*>(shard.logits)) == misalignment(static_cast<const T*>(grad)) &&
         stride_difference % kVectorBytes == 0;
}

}  // namespace gft_megatron::cuda
