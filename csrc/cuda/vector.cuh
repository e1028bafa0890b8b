// Sixteen-byte loads and stores, and the split of a row into what they can reach and what they cannot.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace gft_megatron::cuda {

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
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  Vector<T> vector;
  memcpy(&vector, &raw, kVectorBytes);
  return vector;
}

// In assembly: nvcc 13.0 breaks an ordinary 16-byte store up where the last element is ready later than the others.
template <typename T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& vector) {
  uint4 raw;
  memcpy(&raw, &vector, kVectorBytes);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(raw.x), "r"(raw.y),
               "r"(raw.z), "r"(raw.w)
               : "memory");
}

// [0, head) and [tail, width) are reached one element at a time; [head, tail) is aligned and whole vectors long.
struct RowSplit {
  int64_t head;
  int64_t tail;
};

// With an odd vocabulary every row of a matrix starts at another alignment.
template <typename T>
__device__ __forceinline__ RowSplit split_row(const T* row, int64_t width) {
  const int64_t misaligned = reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(T);
  const int64_t to_boundary = misaligned == 0 ? 0 : kVectorWidth<T> - misaligned;
  const int64_t head = to_boundary < width ? to_boundary : width;
  return {head, head + (width - head) / kVectorWidth<T> * kVectorWidth<T>};
}

}  // namespace gft_megatron::cuda
