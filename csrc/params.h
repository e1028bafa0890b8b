// What an operator hands to its implementation: plain pointers and sizes, the same for CPU and CUDA.
#pragma once

#include <stdint.h>

namespace gft_megatron {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// The rows of one vocabulary shard. Columns are adjacent in memory; rows are a stride apart (in elements).
struct Shard {
  const void* logits;     // [n, width]
  const int64_t* labels;  // [n] global ids; a negative one marks an ignored row, whose logits are never read
  int64_t num_rows;
  int64_t row_stride;
  int64_t width;
  int64_t valid_width;  // columns from here on are padding
  int64_t vocab_start;  // global id of column 0
  float inv_temperature;
  Dtype dtype;
};

struct StatsParams {
  Shard shard;
  bool want_entropy;
  float* stats;  // [n, 4], see rows.h
};

struct CombineParams {
  const float* stats;  // [num_shards, n, 4]
  int64_t num_shards;
  int64_t num_rows;
  float* log_prob;  // [n], and so the other three
  float* entropy;
  float* max;
  float* log_sum;
};

struct GradParams {
  Shard shard;
  void* grad;  // [n, width], may be shard.logits itself
  int64_t grad_row_stride;
  const float* max;  // [n], and so all below
  const float* log_sum;
  const float* entropy;
  const float* grad_log_prob;
  const float* grad_entropy;  // null: no gradient flows into the entropy
};

}  // namespace gft_megatron
