// Kernels that are wrong on purpose: the emulation has to say so.
#include "cuda/machine.cuh"

namespace gft_megatron::cuda {
namespace {

struct Nothing {
  float* out;
};

void barrier_in_a_branch(Nothing) {
  if (threadIdx.x < 40) __syncthreads();
}

void shuffle_in_a_branch(Nothing) {
  if (threadIdx.x % 2 == 0) __shfl_xor_sync(~0u, 1.0f, 2);
}

void different_shuffles(Nothing) { __shfl_xor_sync(~0u, 1.0f, threadIdx.x % 2 ? 1 : 2); }

void one_block_waits_for_its_cluster(Nothing) {
  if (blockIdx.x == 0) {
    cluster_arrive();
    cluster_wait();
  }
}

void misaligned_vector(Nothing params) { load_16_bytes(params.out + 1); }

void outside_of_block_memory(Nothing) { block_memory()[64] = 1; }

void unwritten_block_memory(Nothing params) {
  if (threadIdx.x == 0) *params.out = reinterpret_cast<const float*>(block_memory())[3];
}

void memory_of_a_block_that_ended(Nothing params) {
  float* mine = reinterpret_cast<float*>(block_memory());
  if (threadIdx.x == 0) *mine = 1.0f;
  cluster_arrive();
  cluster_wait();
  if (blockIdx.x == 1 && threadIdx.x == 0) *params.out = *memory_of_block(mine, 0);
}

}  // namespace
}  // namespace gft_megatron::cuda

extern "C" int faulty_kernel(int which, float* out) {
  using namespace gft_megatron::cuda;
  void (*const kernels[])(Nothing) = {
      barrier_in_a_branch, shuffle_in_a_branch,     different_shuffles,     one_block_waits_for_its_cluster,
      misaligned_vector,   outside_of_block_memory, unwritten_block_memory, memory_of_a_block_that_ended};
  return launch(kernels[which], Launch{2, 1, 64, 2, 64}, Nothing{out}, nullptr);
}
