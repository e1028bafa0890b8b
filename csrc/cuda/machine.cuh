// All that only a GPU has: launches, the memory of a thread block, clusters of blocks, three instructions. The tests
// put an emulation of this file in its place (tests/cuda_on_host) and run the rest of this folder without a GPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace gft_megatron::cuda {

constexpr int kWarp = 32;

// Blocks of a row are neighbours along x, which alone reaches 2^31.
struct Launch {
  int64_t blocks;
  int64_t blocks_y;
  int threads;
  int cluster;           // blocks along x that see each other's memory; `blocks` is a multiple of it
  int64_t memory_bytes;  // of each block
};

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Launch& shape, const Params& params, cudaStream_t stream) {
  // Beyond a grid's limits; the casts below would make a small grid of a vast one.
  if (shape.blocks > 0x7fffffff || shape.blocks_y > 65535) return cudaErrorInvalidConfiguration;
  constexpr int64_t kFreeMemory = 48 * 1024;  // more has to be asked for
  if (shape.memory_bytes > kFreeMemory) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shape.memory_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.memory_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  return error != cudaSuccess ? error : cudaGetLastError();
}

// What `kernel` may ask for on the current device.
struct Limits {
  int cluster;
  int64_t memory_bytes;
};

template <typename Params>
cudaError_t limits(void (*kernel)(Params), Limits* out) {
  int device = 0;
  int memory_bytes = 0;
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&memory_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  // Not the device's capability: a newer device runs code for sm_80, which has no cluster instructions in it.
  *out = {attributes.ptxVersion >= 90 ? 8 : 1, memory_bytes};
  return error;
}

// 16-byte aligned.
__device__ __forceinline__ unsigned char* block_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
}

// A cluster is a block alone in code for sm_80.
__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

// Every thread of the cluster arrives, then waits: what was written to block memory before the arrival of all can be
// read after the wait, and what was read before it may be given up.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#else
  __syncthreads();
#endif
}

// Where `rank`, a block of this cluster, keeps what this one keeps at `p` in block memory.
template <typename T>
__device__ __forceinline__ const T* memory_of_block(const T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
  return p;
#endif
}

// 2^x with a relative error of at most 2^-22; 0 where the result would be subnormal.
__device__ __forceinline__ float approximate_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ uint4 load_16_bytes(const void* p) { return *static_cast<const uint4*>(p); }

// In assembly: nvcc 13.0 breaks an ordinary 16-byte store up where the last element is ready later than the others.
__device__ __forceinline__ void store_16_bytes_global(void* p, uint4 raw) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(raw.x), "r"(raw.y),
               "r"(raw.z), "r"(raw.w)
               : "memory");
}

}  // namespace gft_megatron::cuda
