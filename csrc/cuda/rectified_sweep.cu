// rectified_sweep: the statistics and the gradient of a row while it is on the chip: one read and one write of a logit.
//
// A cluster of thread blocks holds a row in the blocks' own memory, a stretch in each. The blocks tell each other what
// they found, come to the same result in the same order, and rewrite their stretches. Where a row does not fit (or the
// code is for sm_80, which has no clusters, and the row is long), one block reads it twice instead.
#include "cuda/kernels.h"
#include "cuda/rewrite.cuh"
#include "cuda/scan.cuh"

namespace gft_megatron::cuda {
namespace {

constexpr int kThreads = 256;

// On a processor, so that one reads while another writes: no more registers and memory than that leaves.
constexpr int kBlocksAtOnce = 5;
constexpr int64_t kComfortableMemory = 44 * 1024;

// What the threads of a block tell each other; the block's stretch of the row lies behind it.
struct alignas(kVectorBytes) Board {
  Stats<float> warps[kThreads / kWarp];
  Stats<float> found;  // in this stretch; read by the other blocks
  Token token;         // of the row, and so is the next
  float upstream;      // dL/dlogp
};

template <typename T, bool kOnChip, bool kVectors>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    rectified_sweep_kernel(const __grid_constant__ SweepParams params) {
  const Shard& shard = params.shard;
  const int blocks = cluster_size();
  const int64_t i = blockIdx.x / blocks;
  const int rank = static_cast<int>(blockIdx.x % blocks);
  const Stretch stretch = stretch_of(static_cast<int>(shard.width), blocks, rank);
  T* grad = static_cast<T*>(params.grad) + i * params.grad_row_stride + stretch.begin;
  const int64_t label = shard.labels[i];
  if (label < 0) {  // all blocks of the cluster leave here
    if (rank == 0 && threadIdx.x == 0) params.log_prob[i] = 0.0f;
    erase<kThreads>(grad, stretch.width);
    return;
  }
  const T* row = static_cast<const T*>(shard.logits) + i * shard.row_stride;
  const T* logits = row + stretch.begin;
  const bool owned = label < shard.valid_width;
  float label_logit = 0.0f;
  float weight = 0.0f;
  float tau = 0.0f;
  if (threadIdx.x == 0) {  // early: reads are slow, and after the first barrier a block may write its gradient
    if (owned) label_logit = to_float(row[label]);
    weight = params.weight[i];
    tau = params.tau[i];
  }

  Board& board = *reinterpret_cast<Board*>(block_memory());
  T* kept = reinterpret_cast<T*>(block_memory() + sizeof(Board)) + misalignment(logits);
  const int valid = in_stretch(shard.valid_width, stretch);
  Stats<float> stats = scan<kThreads, false, kOnChip>(logits, valid < 0 ? 0 : valid, shard.inv_temperature, kept);
  stats = merge_block<kThreads>(stats, board.warps);
  if (threadIdx.x == 0) board.found = stats;
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < kWarp) {
    const int other = static_cast<int>(threadIdx.x);
    stats = merge_warp(other < blocks ? *memory_of_block(&board.found, other) : no_stats());
    if (threadIdx.x == 0) {
      float columns[4];
      write_stats(columns, stats.max, stats.sum, NAN,
                  owned ? below_max(label_logit, shard.inv_temperature, finite_shift(stats.max)) : kNotOwned);
      const Token token = combine(columns, 1, 4);
      board.token = token;
      board.upstream = rectified_upstream(token.log_prob, weight, tau);
      if (rank == 0) params.log_prob[i] = token.log_prob;
    }
  }
  __syncthreads();
  cluster_arrive();  // has read the others' boards
  const Token token = board.token;
  const float upstream = board.upstream;
  if (upstream == 0.0f) {  // its logits may hold anything
    erase<kThreads>(grad, stretch.width);
  } else {
    const Row place = {coefficients(upstream, 0.0f, 0.0f, shard.inv_temperature),
                       token.max,
                       token.log_sum,
                       shard.inv_temperature,
                       in_stretch(label, stretch),
                       valid};
    constexpr int kUnroll = kOnChip ? 1 : 2;  // block memory is near
    rewrite<kThreads, kUnroll, false, kVectors>(place, kOnChip ? kept : logits, grad, stretch.width);
  }
  cluster_wait();  // a block that ends takes its board with it
}

// The fewest blocks that hold a row comfortably, or else at all; no blocks: the row does not fit.
template <typename T>
Launch on_chip_shape(const Shard& shard, const Limits& limits) {
  for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
    const int64_t stretch_bytes =
        stretch_width(static_cast<int>(shard.width), cluster) * int64_t{sizeof(T)} + kVectorBytes;
    const int64_t memory_bytes = int64_t{sizeof(Board)} + stretch_bytes;
    if (memory_bytes > limits.memory_bytes) continue;
    if (memory_bytes <= kComfortableMemory || cluster == limits.cluster) {
      return {shard.num_rows * cluster, 1, kThreads, cluster, memory_bytes};
    }
  }
  return {};
}

template <typename T, bool kVectors>
cudaError_t launch_sweep(const SweepParams& params, cudaStream_t stream) {
  Limits limit = {};
  const cudaError_t error = limits(rectified_sweep_kernel<T, true, kVectors>, &limit);
  if (error != cudaSuccess) return error;
  const Launch shape = on_chip_shape<T>(params.shard, limit);
  if (shape.blocks > 0) return launch(rectified_sweep_kernel<T, true, kVectors>, shape, params, stream);
  const Launch one_block = {params.shard.num_rows, 1, kThreads, 1, sizeof(Board)};
  return launch(rectified_sweep_kernel<T, false, kVectors>, one_block, params, stream);
}

}  // namespace

cudaError_t rectified_sweep(const SweepParams& params, cudaStream_t stream) {
  return with_element(params.shard, [&](auto zero) {
    using T = decltype(zero);
    return same_alignment<T>(params.shard, params.grad, params.grad_row_stride)
               ? launch_sweep<T, true>(params, stream)
               : launch_sweep<T, false>(params, stream);
  });
}

}  // namespace gft_megatron::cuda
