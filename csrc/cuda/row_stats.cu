// row_stats: one thread block reads one row, or one stretch of it, once and leaves four numbers.
#include "cuda/kernels.h"
#include "cuda/scan.cuh"

namespace gft_megatron::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksAtOnce = 3;  // on a processor: no more registers than that leaves

// Four blocks on each of 132 processors. A constant, so that a row gives the same bits on every device.
constexpr int64_t kEnoughBlocks = 528;
constexpr int64_t kSmallestStretch = 16384;  // elements that are worth a block

// A grid of (rows, stretches of a row). `params.stats` is [stretches, n, 4].
template <typename T, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    row_stats_kernel(const __grid_constant__ StatsParams params) {
  const Shard& shard = params.shard;
  const int64_t i = blockIdx.x;
  float* out = params.stats + 4 * (blockIdx.y * shard.num_rows + i);
  const int64_t label = shard.labels[i];
  if (label < 0) {
    if (threadIdx.x == 0) write_ignored_stats(out, shard.vocab_start + blockIdx.y);
    return;
  }
  const Stretch stretch =
      stretch_of(static_cast<int>(shard.valid_width), static_cast<int>(gridDim.y), static_cast<int>(blockIdx.y));
  const T* row = static_cast<const T*>(shard.logits) + i * shard.row_stride + stretch.begin;
  const int column = in_stretch(label - shard.vocab_start, stretch);
  const bool owned = column >= 0 && column < stretch.width;
  const float label_logit = owned && threadIdx.x == 0 ? to_float(row[column]) : 0.0f;
  Stats<float> stats = scan<kThreads, kEntropy, false, T>(row, stretch.width, shard.inv_temperature, nullptr);
  stats = merge_block<kThreads>(stats, reinterpret_cast<Stats<float>*>(block_memory()));
  if (threadIdx.x > 0) return;
  const float label_delta = owned ? below_max(label_logit, shard.inv_temperature, finite_shift(stats.max)) : kNotOwned;
  write_stats(out, stats.max, stats.sum, kEntropy ? stats.weighted : NAN, label_delta);
}

}  // namespace

int64_t row_stats_splits(int64_t num_rows, int64_t width) {
  const int64_t wanted = kEnoughBlocks / num_rows;
  const int64_t most = width / kSmallestStretch;
  const int64_t splits = wanted < most ? wanted : most;
  return splits > 1 ? splits : 1;
}

cudaError_t row_stats(const StatsParams& params, int64_t splits, cudaStream_t stream) {
  const Launch shape = {params.shard.num_rows, splits, kThreads, 1, kThreads / kWarp * int64_t{sizeof(Stats<float>)}};
  return with_element(params.shard, [&](auto zero) {
    using T = decltype(zero);
    return launch(params.want_entropy ? row_stats_kernel<T, true> : row_stats_kernel<T, false>, shape, params, stream);
  });
}

}  // namespace gft_megatron::cuda
