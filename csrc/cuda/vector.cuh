// Elements of logits, sixteen bytes of them at a time, and the split of a row into what vectors reach and what not.
#pragma once

#include <string.h>

#include "cuda/machine.cuh"
#include "params.h"

namespace gft_megatron::cuda {

// Columns are counted in 32 bits, for the sake of registers; products of rows and strides need 64.
constexpr int64_t kMostColumns = int64_t{1} << 28;

// Calls `function` with a zero of the logits' element type.
template <typename Function>
cudaError_t with_element(const Shard& shard, const Function& function) {
  if (shard.width > kMostColumns) return cudaErrorInvalidValue;
  switch (shard.dtype) {
    case Dtype::kFloat32:
      return function(float{});
    case Dtype::kBFloat16:
      return function(__nv_bfloat16{});
    case Dtype::kFloat16:
      return function(__half{});
  }
  return cudaErrorInvalidValue;
}

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVectorWidth = kVectorBytes / sizeof(T);

template <typename T>
struct alignas(kVectorBytes) Vector {
  T values[kVectorWidth<T>];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  const uint4 raw = load_16_bytes(p);
  Vector<T> vector;
  memcpy(&vector, &raw, kVectorBytes);
  return vector;
}

// To global memory.
template <typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& vector) {
  uint4 raw;
  memcpy(&raw, &vector, kVectorBytes);
  store_16_bytes_global(p, raw);
}

template <typename T>
__host__ __device__ __forceinline__ int misalignment(const T* row) {  // in elements
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(T));
}

// [0, head) and [tail, width) are reached one element at a time; [head, tail) is aligned and whole vectors long.
struct RowSplit {
  int head;
  int tail;
};

// With an odd vocabulary every row of a matrix starts at another alignment.
template <typename T>
__device__ __forceinline__ RowSplit split_row(const T* row, int width) {
  const int misaligned = misalignment(row);
  const int to_boundary = misaligned == 0 ? 0 : kVectorWidth<T> - misaligned;
  const int head = to_boundary < width ? to_boundary : width;
  return {head, head + (width - head) / kVectorWidth<T> * kVectorWidth<T>};
}

// Stretches of a row start where a whole row may: full vectors, and the same alignment in all of them.
constexpr int kStretchAlignment = 64;  // elements

// One of `count` stretches that cover [0, width) in order; those at the end may be empty.
struct Stretch {
  int begin;
  int width;
};

__host__ __device__ __forceinline__ int stretch_width(int width, int count) {
  const int even = (width + count - 1) / count;
  return (even + kStretchAlignment - 1) / kStretchAlignment * kStretchAlignment;
}

__device__ __forceinline__ Stretch stretch_of(int width, int count, int index) {
  const int most = stretch_width(width, count);
  const int begin = index * most < width ? index * most : width;
  return {begin, most < width - begin ? most : width - begin};
}

// A global column, label or end of the valid ones, as counted from the stretch; -1 and width stand for what lies
// outside.
__device__ __forceinline__ int in_stretch(int64_t column, Stretch stretch) {
  const int64_t local = column - stretch.begin;
  return static_cast<int>(local < 0 ? -1 : local < stretch.width ? local : stretch.width);
}

}  // namespace gft_megatron::cuda
