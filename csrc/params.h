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

// Parts of the rows of one shard, in the order of their columns, to that shard.
struct MergeParams {
  const float* parts;  // [num_parts, n, 4]
  int64_t num_parts;
  int64_t num_rows;
  float* stats;  // [n, 4]
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

// Statistics and gradient of whole rows (the only shard: vocab_start is 0) in one sweep, for a loss whose upstream
// gradient follows from the log-prob: loss = -weight * c * log p, c = p below tau and 1 from tau on, a constant.
struct SweepParams {
  Shard shard;
  void* grad;  // [n, width], may be shard.logits itself
  int64_t grad_row_stride;
  const float* weight;  // [n], and so all below
  const float* tau;
  float* log_prob;
};

// The rows of the policy (shard) and of a reference with the same columns.
struct KlStatsParams {
  Shard shard;
  const void* ref_logits;  // [n, width]
  int64_t ref_row_stride;
  double* stats;  // [n, 5], see rows.h
};

struct KlGradParams {
  Shard shard;
  const void* ref_logits;  // [n, width]
  int64_t ref_row_stride;
  void* grad;  // [n, width], may be shard.logits itself
  int64_t grad_row_stride;
  const float* max;  // [n], and so all below
  const float* log_sum;
  const float* ref_max;
  const float* ref_log_sum;
  const float* grad_kl;
};

// Sums over the tokens of each sequence. Segment ids do not decrease, so every segment is one stretch of values.
struct SegmentSumParams {
  const float* values;         // [n]
  const bool* mask;            // [n], or null: every value counts
  const int64_t* segment_ids;  // [n], non-decreasing
  int64_t num_values;
  int64_t num_segments;
  float* sums;    // [num_segments]
  float* counts;  // [num_segments] number of unmasked values
};

// (reward - mean) / (deviation + eps) inside each group of equal, adjacent group ids.
struct GroupAdvantageParams {
  const double* rewards;     // [n]
  const int64_t* group_ids;  // [n], non-decreasing
  int64_t num_samples;
  bool divide_by_deviation;
  int64_t ddof;
  double eps;
  float* advantages;  // [n]
};

}  // namespace gft_megatron
