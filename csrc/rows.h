// The mathematics of one row, shared by the CPU loops and the CUDA kernels. No torch, no STL.
//
// x_j = logit_j * inv_temperature. One pass over a shard leaves four numbers (the columns of the stats tensor):
//   max       m = max_j x_j
//   sum       s = sum_j exp(x_j - m)
//   weighted  w = sum_j exp(x_j - m) (x_j - m)      NaN where the entropy was not asked for
//   label     x_label - m                           +inf (kNotOwned) where the label is in another shard
// Shards are merged into
//   log_sum = log s     log p_label = (x_label - m) - log_sum     entropy = log_sum - w / s
// and the second pass writes, with u_j = log p_j = (x_j - m) - log_sum,
//   dL/dx_j = exp(u_j) (A + B u_j) + dL/dlogp [j = label],   A = -dL/dlogp - dL/dH * H,   B = -dL/dH
// Everything is relative to m: a logit near 1e4 has an fp32 spacing of 1e-3, so neither m + log_sum nor x_label alone
// is good enough. m needs no accuracy of its own (any shift gives the same softmax) as long as all use the same bits.
//
// NaN and +inf reach the sum and through it every result. A row whose logits are all -inf gives NaN, as log_softmax.
// An ignored row is a certain event: shard 0 reports one column of logit 0 that is the label, the others nothing.
//
// KL(reference || policy), with y_j the reference's scaled logits and q its softmax, leaves five numbers in float64,
// because their sum is small beside them where the two are nearly equal:
//   max x, sum exp(x_j - max x), max y, sum exp(y_j - max y),
//   sum exp(y_j - max y) ((y_j - max y) - (x_j - max x))      a term is 0 where its exp is, even beside x_j = -inf
// and dKL/dx_j = p_j - q_j. An ignored row reports 0, 1, 0, 1, 0 in every shard: two equal distributions.
//
// All functions are static: the CPU files compile them for different instruction sets, and a linker that merged the
// copies would run AVX-512 code on a machine without it.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define GFT_INLINE __host__ __device__ static inline
#else
#define GFT_INLINE static inline
#endif

namespace gft_megatron {

constexpr float kNotOwned = INFINITY;

template <typename Real>
struct Stats {
  float max;
  Real sum;
  Real weighted;
};

// logit * inv_temperature - max, rounded once.
GFT_INLINE float below_max(float logit, float inv_temperature, float max) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(GFT_TARGET_HAS_FMA)
  return __builtin_fmaf(logit, inv_temperature, -max);
#else
  return static_cast<float>(static_cast<double>(logit) * inv_temperature - max);
#endif
}

// The shift that a row may subtract: a maximum of -inf (nothing but -inf so far) would turn -inf logits into NaN.
GFT_INLINE float finite_shift(float max) { return max == -INFINITY ? 0.0f : max; }

// The same statistics relative to a larger maximum. An empty sum stays empty and a NaN one stays NaN.
template <typename Real>
GFT_INLINE Stats<Real> relative_to(Stats<Real> stats, float max) {
  if (!(stats.sum > 0)) return {max, stats.sum, stats.weighted};
  const Real delta = static_cast<Real>(stats.max) - max;
  const Real scale = exp(delta);
  const Real weighted = scale > 0 ? scale * (stats.weighted + stats.sum * delta) : Real(0);
  return {max, stats.sum * scale, weighted};
}

template <typename Real>
GFT_INLINE Stats<Real> merge(Stats<Real> a, Stats<Real> b) {
  const float max = a.max > b.max ? a.max : b.max;
  a = relative_to(a, max);
  b = relative_to(b, max);
  return {max, a.sum + b.sum, a.weighted + b.weighted};
}

GFT_INLINE void write_stats(float* out, float max, float sum, float weighted, float label) {
  out[0] = max;
  out[1] = sum;
  out[2] = weighted;
  out[3] = label;
}

GFT_INLINE void write_ignored_stats(float* out, int64_t vocab_start) {
  if (vocab_start == 0) {
    write_stats(out, 0.0f, 1.0f, 0.0f, 0.0f);
  } else {
    write_stats(out, -INFINITY, 0.0f, 0.0f, kNotOwned);
  }
}

struct Token {
  float log_prob;
  float entropy;
  float max;
  float log_sum;
};

// Disjoint parts of one row as a whole: their statistics, and the label relative to the common maximum (kNotOwned where
// no part has it).
struct Merged {
  Stats<double> stats;
  double label;
};

// Merge one row's parts in their order, so that whoever does it gets the same bits; `stride` floats lie between parts.
GFT_INLINE Merged merge_parts(const float* parts, int64_t num_parts, int64_t stride) {
  float max = -INFINITY;
  for (int64_t i = 0; i < num_parts; ++i) max = parts[i * stride] > max ? parts[i * stride] : max;
  Merged merged = {{max, 0.0, 0.0}, kNotOwned};
  for (int64_t i = 0; i < num_parts; ++i) {
    const float* part = parts + i * stride;
    const Stats<double> moved = relative_to(Stats<double>{part[0], part[1], part[2]}, max);
    merged.stats.sum += moved.sum;
    merged.stats.weighted += moved.weighted;
    if (part[3] != kNotOwned) merged.label = part[3] + (static_cast<double>(finite_shift(part[0])) - finite_shift(max));
  }
  return merged;
}

GFT_INLINE void write_merged(float* out, Merged merged) {
  write_stats(out, merged.stats.max, static_cast<float>(merged.stats.sum), static_cast<float>(merged.stats.weighted),
              static_cast<float>(merged.label));
}

// One row's shards, in rank order, to its results. A label that no shard owns gives NaN.
GFT_INLINE Token combine(const float* stats, int64_t num_shards, int64_t stride) {
  const Merged merged = merge_parts(stats, num_shards, stride);
  const Stats<double> total = merged.stats;
  const double label = merged.label == kNotOwned ? NAN : merged.label;
  const double log_sum = log(total.sum);
  const double entropy = log_sum - total.weighted / total.sum;
  return {static_cast<float>(label - log_sum), static_cast<float>(entropy < 0 ? 0 : entropy), finite_shift(total.max),
          static_cast<float>(log_sum)};
}

// A and B of the gradient, already times inv_temperature (the gradient is taken in the logits, not in x).
struct Coefficients {
  float constant;
  float slope;
  float label;
};

GFT_INLINE Coefficients coefficients(float grad_log_prob, float grad_entropy, float entropy, float inv_temperature) {
  return {(-grad_log_prob - grad_entropy * entropy) * inv_temperature, -grad_entropy * inv_temperature,
          grad_log_prob * inv_temperature};
}

// dL/dlogp of a rectified token: the weight, and below tau also the probability, which counts as a constant.
GFT_INLINE float rectified_upstream(float log_prob, float weight, float tau) {
  const float prob = expf(log_prob);
  return -weight * (prob < tau ? prob : 1.0f);
}

}  // namespace gft_megatron
