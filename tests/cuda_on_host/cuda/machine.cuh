// Stands in for csrc/cuda/machine.cuh, so that the kernels run on the host: every CUDA thread is a fiber
// (emulator.cpp).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __launch_bounds__(...)

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 gridDim;

namespace gft_megatron::cuda {

constexpr int kWarp = 32;

struct Launch {
  int64_t blocks;
  int64_t blocks_y;
  int threads;
  int cluster;
  int64_t memory_bytes;
};

struct Limits {
  int cluster;
  int64_t memory_bytes;
};

}  // namespace gft_megatron::cuda

namespace emulator {

using gft_megatron::cuda::Launch;
using gft_megatron::cuda::Limits;

extern Limits device_limits;

// All blocks, one cluster after the other. False: the kernel did something that a GPU would not forgive.
bool run(const Launch& shape, void (*thread)(const void* closure), const void* closure);

[[noreturn]] void fail(const char* format, ...);
uint64_t exchange(uint64_t bits, unsigned mask, int lane_xor);
void block_barrier();
void cluster_arrive();
void cluster_wait();
int cluster_size();
unsigned char* block_memory(int rank);  // -1: of the calling thread's block
void check_alignment(const void* p);

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_xor) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulator::exchange(bits, mask, lane_xor);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

namespace gft_megatron::cuda {

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Launch& shape, const Params& params, cudaStream_t) {
  struct Closure {
    void (*kernel)(Params);
    const Params& params;
  };
  const Closure closure = {kernel, params};
  const auto thread = [](const void* p) {
    const Closure& closure = *static_cast<const Closure*>(p);
    closure.kernel(closure.params);
  };
  return emulator::run(shape, thread, &closure) ? cudaSuccess : cudaErrorLaunchFailure;
}

template <typename Params>
cudaError_t limits(void (*)(Params), Limits* out) {
  *out = emulator::device_limits;
  return cudaSuccess;
}

inline unsigned char* block_memory() { return emulator::block_memory(-1); }
inline int cluster_size() { return emulator::cluster_size(); }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }

template <typename T>
const T* memory_of_block(const T* p, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(p) - block_memory();
  return reinterpret_cast<const T*>(emulator::block_memory(rank) + offset);
}

// As far off as the instruction may be, up for one argument and down for the next.
inline float approximate_exp2(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const float error = x == 0.0f ? 0.0f : (bits * 2654435761u) >> 31 ? 0x1p-22f : -0x1p-22f;
  const float result = exp2f(x) * (1.0f + error);
  return fabsf(result) < 0x1p-126f ? 0.0f : result;
}

inline uint4 load_16_bytes(const void* p) {
  emulator::check_alignment(p);
  return *static_cast<const uint4*>(p);
}

inline void store_16_bytes_global(void* p, uint4 raw) {
  emulator::check_alignment(p);
  *static_cast<uint4*>(p) = raw;
}

}  // namespace gft_megatron::cuda
