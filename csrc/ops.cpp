// The operators: schemas, checks and registration. The mathematics is described in rows.h.
// Each sees the shard of one rank and calls no collective; merging the shards of several ranks is left to the caller.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cfloat>
#include <cstdlib>
#include <optional>
#include <tuple>

#include "cpu/row_loops.h"
#include "cpu/segment_loops.h"
#include "params.h"

#ifdef GFT_MEGATRON_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"
#endif

namespace gft_megatron {
namespace {

using at::Tensor;

struct Cpu {
  explicit Cpu(const Tensor&) {}
  void row_stats(const StatsParams& params) const { cpu::row_stats(params); }
  void merge_stats(const MergeParams& params) const { cpu::merge_stats(params); }
  void combine_stats(const CombineParams& params) const { cpu::combine_stats(params); }
  void row_grad(const GradParams& params) const { cpu::row_grad(params); }
  void rectified_sweep(const SweepParams& params) const { cpu::rectified_sweep(params); }
  void segment_sums(const SegmentSumParams& params) const { cpu::segment_sums(params); }
  void group_advantages(const GroupAdvantageParams& params) const { cpu::group_advantages(params); }
};

#ifdef GFT_MEGATRON_WITH_CUDA
struct Cuda {
  explicit Cuda(const Tensor& tensor) : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
  void row_stats(const StatsParams& params) const {
    const int64_t num_rows = params.shard.num_rows;
    const int64_t splits = cuda::row_stats_splits(num_rows, params.shard.valid_width);
    if (splits == 1) {
      C10_CUDA_CHECK(cuda::row_stats(params, splits, stream));
      return;
    }
    // Given back to torch's allocator on return; kernels of this stream that follow run after this one.
    const Tensor parts = at::empty({splits, num_rows, 4}, at::device(guard.current_device()).dtype(at::kFloat));
    StatsParams in_parts = params;
    in_parts.stats = parts.mutable_data_ptr<float>();
    C10_CUDA_CHECK(cuda::row_stats(in_parts, splits, stream));
    merge_stats({in_parts.stats, splits, num_rows, params.stats});
  }
  void merge_stats(const MergeParams& params) const { C10_CUDA_CHECK(cuda::merge_stats(params, stream)); }
  void combine_stats(const CombineParams& params) const { C10_CUDA_CHECK(cuda::combine_stats(params, stream)); }
  void row_grad(const GradParams& params) const { C10_CUDA_CHECK(cuda::row_grad(params, stream)); }
  void rectified_sweep(const SweepParams& params) const { C10_CUDA_CHECK(cuda::rectified_sweep(params, stream)); }
  void segment_sums(const SegmentSumParams& params) const { C10_CUDA_CHECK(cuda::segment_sums(params, stream)); }
  void group_advantages(const GroupAdvantageParams& params) const {
    C10_CUDA_CHECK(cuda::group_advantages(params, stream));
  }
  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream stream;
};
#endif

Dtype dtype_of(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_VALUE(false, "logits must be float32, bfloat16 or float16, got ", logits.scalar_type());
  }
}

void check_rows(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, " must be [n, width], got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, " must have adjacent columns, got strides ",
                    tensor.strides());
}

// One value a row, next to each other in memory.
Tensor row_vector(const char* name, const Tensor& tensor, const Tensor& logits, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == logits.size(0) && tensor.scalar_type() == dtype &&
                        tensor.device() == logits.device(),
                    name, " must be [", logits.size(0), "] ", dtype, " on ", logits.device(), ", got ", tensor.sizes(),
                    " ", tensor.scalar_type(), " on ", tensor.device());
  return tensor.contiguous();
}

Shard make_shard(const Tensor& logits, const Tensor& labels, int64_t vocab_start, int64_t valid_vocab,
                 double inv_temperature) {
  check_rows("logits", logits);
  TORCH_CHECK_VALUE(vocab_start >= 0, "vocab_start must not be negative, got ", vocab_start);
  TORCH_CHECK_VALUE(0 <= valid_vocab && valid_vocab <= logits.size(1), "valid_vocab must be in [0, ", logits.size(1),
                    "], got ", valid_vocab);
  TORCH_CHECK_VALUE(inv_temperature >= FLT_MIN && inv_temperature <= FLT_MAX,
                    "inv_temperature must be positive and finite in fp32, got ", inv_temperature);
  return {logits.const_data_ptr(),
          labels.const_data_ptr<int64_t>(),
          logits.size(0),
          logits.stride(0),
          logits.size(1),
          valid_vocab,
          vocab_start,
          static_cast<float>(inv_temperature),
          dtype_of(logits)};
}

template <typename Device>
Tensor row_stats(const Tensor& logits, const Tensor& labels, int64_t vocab_start, int64_t valid_vocab,
                 double inv_temperature, bool want_entropy) {
  const Device device(logits);
  const Tensor rows = row_vector("labels", labels, logits, at::kLong);
  const Shard shard = make_shard(logits, rows, vocab_start, valid_vocab, inv_temperature);
  Tensor stats = at::empty({logits.size(0), 4}, logits.options().dtype(at::kFloat));
  if (shard.num_rows > 0) device.row_stats({shard, want_entropy, stats.mutable_data_ptr<float>()});
  return stats;
}

void check_parts(const Tensor& stats) {
  TORCH_CHECK_VALUE(stats.dim() == 3 && stats.size(0) > 0 && stats.size(2) == 4 && stats.scalar_type() == at::kFloat,
                    "stats must be [num_shards, n, 4] float32, got ", stats.sizes(), " ", stats.scalar_type());
}

template <typename Device>
Tensor merge_stats(const Tensor& stats) {
  check_parts(stats);
  const Device device(stats);
  const Tensor all = stats.contiguous();
  Tensor merged = at::empty({all.size(1), 4}, all.options());
  if (all.size(1) > 0) {
    device.merge_stats({all.const_data_ptr<float>(), all.size(0), all.size(1), merged.mutable_data_ptr<float>()});
  }
  return merged;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> combine_stats(const Tensor& stats) {
  check_parts(stats);
  const Device device(stats);
  const Tensor all = stats.contiguous();
  const int64_t num_rows = all.size(1);
  const auto vector = [&] { return at::empty({num_rows}, all.options()); };
  Tensor log_prob = vector(), entropy = vector(), max = vector(), log_sum = vector();
  if (num_rows > 0) {
    device.combine_stats({all.const_data_ptr<float>(), all.size(0), num_rows, log_prob.mutable_data_ptr<float>(),
                          entropy.mutable_data_ptr<float>(), max.mutable_data_ptr<float>(),
                          log_sum.mutable_data_ptr<float>()});
  }
  return {log_prob, entropy, max, log_sum};
}

// Whether a row of one shares memory with a row of the other. Rows of different strides count as if they did as soon as
// the stretches from the first row to the last meet.
bool rows_overlap(const Tensor& a, const Tensor& b) {
  if (!a.is_alias_of(b)) return false;
  const int64_t rows = a.size(0), width = a.size(1);
  const auto end = [&](const Tensor& t) { return t.storage_offset() + (rows - 1) * t.stride(0) + width; };
  if (a.storage_offset() >= end(b) || b.storage_offset() >= end(a)) return false;
  if (rows == 1 || a.stride(0) != b.stride(0)) return true;
  const int64_t shift = std::abs(a.storage_offset() - b.storage_offset()) % a.stride(0);
  return shift < width || a.stride(0) - shift < width;
}

// Overwriting the logits is allowed, overwriting a part of them that is still to be read is not.
void check_grad(const Tensor& grad, const Tensor& logits) {
  check_rows("grad", grad);
  TORCH_CHECK_VALUE(
      grad.sizes() == logits.sizes() && grad.scalar_type() == logits.scalar_type() && grad.device() == logits.device(),
      "grad must match logits: ", logits.sizes(), " ", logits.scalar_type(), " on ", logits.device(), ", got ",
      grad.sizes(), " ", grad.scalar_type(), " on ", grad.device());
  TORCH_CHECK_VALUE(grad.size(0) <= 1 || grad.stride(0) >= grad.size(1), "the rows of grad overlap: strides ",
                    grad.strides());
  if (logits.numel() == 0) return;  // null pointers, equal by accident
  if (grad.const_data_ptr() == logits.const_data_ptr()) {
    TORCH_CHECK_VALUE(grad.strides() == logits.strides(),
                      "grad starts where logits does with other strides: ", grad.strides(), " and ", logits.strides());
  } else {
    TORCH_CHECK_VALUE(!rows_overlap(grad, logits), "grad and logits overlap, and do not start at the same place");
  }
}

template <typename Device>
void row_grad_(const Tensor& logits, Tensor grad, const Tensor& labels, int64_t vocab_start, int64_t valid_vocab,
               double inv_temperature, const Tensor& max, const Tensor& log_sum, const Tensor& entropy,
               const Tensor& grad_log_prob, const std::optional<Tensor>& grad_entropy) {
  const Device device(logits);
  const Tensor rows = row_vector("labels", labels, logits, at::kLong);
  const Shard shard = make_shard(logits, rows, vocab_start, valid_vocab, inv_temperature);
  check_grad(grad, logits);
  const Tensor row_max = row_vector("max", max, logits, at::kFloat);
  const Tensor row_log_sum = row_vector("log_sum", log_sum, logits, at::kFloat);
  const Tensor row_entropy = row_vector("entropy", entropy, logits, at::kFloat);
  const Tensor row_grad_log_prob = row_vector("grad_log_prob", grad_log_prob, logits, at::kFloat);
  const Tensor row_grad_entropy =
      grad_entropy ? row_vector("grad_entropy", *grad_entropy, logits, at::kFloat) : Tensor();
  if (shard.num_rows == 0) return;
  device.row_grad({shard, grad.mutable_data_ptr(), grad.stride(0), row_max.const_data_ptr<float>(),
                   row_log_sum.const_data_ptr<float>(), row_entropy.const_data_ptr<float>(),
                   row_grad_log_prob.const_data_ptr<float>(),
                   grad_entropy ? row_grad_entropy.const_data_ptr<float>() : nullptr});
}

template <typename Device>
Tensor rectified_sweep_(const Tensor& logits, Tensor grad, const Tensor& labels, int64_t valid_vocab,
                        double inv_temperature, const Tensor& weight, const Tensor& tau) {
  const Device device(logits);
  const Tensor rows = row_vector("labels", labels, logits, at::kLong);
  const Shard shard = make_shard(logits, rows, 0, valid_vocab, inv_temperature);
  check_grad(grad, logits);
  const Tensor row_weight = row_vector("weight", weight, logits, at::kFloat);
  const Tensor row_tau = row_vector("tau", tau, logits, at::kFloat);
  Tensor log_prob = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  if (shard.num_rows > 0) {
    device.rectified_sweep({shard, grad.mutable_data_ptr(), grad.stride(0), row_weight.const_data_ptr<float>(),
                            row_tau.const_data_ptr<float>(), log_prob.mutable_data_ptr<float>()});
  }
  return log_prob;
}

void check_reference(const Tensor& ref_logits, const Tensor& logits) {
  check_rows("ref_logits", ref_logits);
  TORCH_CHECK_VALUE(ref_logits.sizes() == logits.sizes() && ref_logits.scalar_type() == logits.scalar_type() &&
                        ref_logits.device() == logits.device(),
                    "ref_logits must match logits: ", logits.sizes(), " ", logits.scalar_type(), " on ",
                    logits.device(), ", got ", ref_logits.sizes(), " ", ref_logits.scalar_type(), " on ",
                    ref_logits.device());
}

// The KL has no CUDA kernels: ops/kl.py takes the plain PyTorch of ops/reference.py there.
Tensor kl_stats(const Tensor& logits, const Tensor& ref_logits, const Tensor& labels, int64_t valid_vocab,
                double inv_temperature) {
  const Tensor rows = row_vector("labels", labels, logits, at::kLong);
  const Shard shard = make_shard(logits, rows, 0, valid_vocab, inv_temperature);
  check_reference(ref_logits, logits);
  Tensor stats = at::empty({logits.size(0), 5}, logits.options().dtype(at::kDouble));
  cpu::kl_stats({shard, ref_logits.const_data_ptr(), ref_logits.stride(0), stats.mutable_data_ptr<double>()});
  return stats;
}

void kl_grad_(const Tensor& logits, const Tensor& ref_logits, Tensor grad, const Tensor& labels, int64_t valid_vocab,
              double inv_temperature, const Tensor& max, const Tensor& log_sum, const Tensor& ref_max,
              const Tensor& ref_log_sum, const Tensor& grad_kl) {
  const Tensor rows = row_vector("labels", labels, logits, at::kLong);
  const Shard shard = make_shard(logits, rows, 0, valid_vocab, inv_temperature);
  check_reference(ref_logits, logits);
  check_grad(grad, logits);
  TORCH_CHECK_VALUE(grad.numel() == 0 || !rows_overlap(grad, ref_logits), "grad and ref_logits overlap");
  const Tensor row_max = row_vector("max", max, logits, at::kFloat);
  const Tensor row_log_sum = row_vector("log_sum", log_sum, logits, at::kFloat);
  const Tensor row_ref_max = row_vector("ref_max", ref_max, logits, at::kFloat);
  const Tensor row_ref_log_sum = row_vector("ref_log_sum", ref_log_sum, logits, at::kFloat);
  const Tensor row_grad_kl = row_vector("grad_kl", grad_kl, logits, at::kFloat);
  cpu::kl_grad({shard, ref_logits.const_data_ptr(), ref_logits.stride(0), grad.mutable_data_ptr(), grad.stride(0),
                row_max.const_data_ptr<float>(), row_log_sum.const_data_ptr<float>(),
                row_ref_max.const_data_ptr<float>(), row_ref_log_sum.const_data_ptr<float>(),
                row_grad_kl.const_data_ptr<float>()});
}

template <typename Device>
std::tuple<Tensor, Tensor> segment_sums(const Tensor& values, const std::optional<Tensor>& mask,
                                        const Tensor& segment_ids, int64_t num_segments) {
  TORCH_CHECK_VALUE(values.dim() == 1 && values.scalar_type() == at::kFloat, "values must be [n] float32, got ",
                    values.sizes(), " ", values.scalar_type());
  TORCH_CHECK_VALUE(num_segments >= 0, "num_segments must not be negative, got ", num_segments);
  const Device device(values);
  const Tensor all = values.contiguous();
  const Tensor ids = row_vector("segment_ids", segment_ids, values, at::kLong);
  const Tensor live = mask ? row_vector("mask", *mask, values, at::kBool) : Tensor();
  Tensor sums = at::empty({num_segments}, values.options());
  Tensor counts = at::empty({num_segments}, values.options());
  if (num_segments > 0) {
    device.segment_sums({all.const_data_ptr<float>(), mask ? live.const_data_ptr<bool>() : nullptr,
                         ids.const_data_ptr<int64_t>(), all.size(0), num_segments, sums.mutable_data_ptr<float>(),
                         counts.mutable_data_ptr<float>()});
  }
  return {sums, counts};
}

template <typename Device>
Tensor group_advantages(const Tensor& rewards, const Tensor& group_ids, bool divide_by_deviation, int64_t ddof,
                        double eps) {
  TORCH_CHECK_VALUE(rewards.dim() == 1 && rewards.scalar_type() == at::kDouble, "rewards must be [n] float64, got ",
                    rewards.sizes(), " ", rewards.scalar_type());
  const Device device(rewards);
  const Tensor all = rewards.contiguous();
  const Tensor ids = row_vector("group_ids", group_ids, rewards, at::kLong);
  Tensor advantages = at::empty({all.size(0)}, all.options().dtype(at::kFloat));
  if (all.size(0) > 0) {
    device.group_advantages({all.const_data_ptr<double>(), ids.const_data_ptr<int64_t>(), all.size(0),
                             divide_by_deviation, ddof, eps, advantages.mutable_data_ptr<float>()});
  }
  return advantages;
}

}  // namespace

TORCH_LIBRARY(gft_megatron, m) {
  // logits [n, v/p], labels [n] int64 global ids -> [n, 4] fp32: max, sum, weighted, label (rows.h)
  m.def(
      "row_stats(Tensor logits, Tensor labels, int vocab_start, int valid_vocab, float inv_temperature, "
      "bool want_entropy) -> Tensor");
  // Parts of one shard [num_parts, n, 4], in the order of their columns -> [n, 4], as row_stats of the whole shard
  m.def("merge_stats(Tensor stats) -> Tensor");
  // stats [p, n, 4], in shard order -> four [n] fp32; entropy is NaN where row_stats was not asked for it
  m.def("combine_stats(Tensor stats) -> (Tensor log_prob, Tensor entropy, Tensor max, Tensor log_sum)");
  // Writes dL/dlogits [n, v/p] from the per-token dL/dlog_prob and dL/dentropy [n] fp32; grad may be logits.
  m.def(
      "row_grad_(Tensor logits, Tensor(a!) grad, Tensor labels, int vocab_start, int valid_vocab, "
      "float inv_temperature, Tensor max, Tensor log_sum, Tensor entropy, Tensor grad_log_prob, "
      "Tensor? grad_entropy) -> ()");
  // Both in one sweep, where one shard is the whole row and dL/dlog_prob = -weight * (p < tau ? p : 1) -> log_prob [n]
  m.def(
      "rectified_sweep_(Tensor logits, Tensor(a!) grad, Tensor labels, int valid_vocab, float inv_temperature, "
      "Tensor weight, Tensor tau) -> Tensor");
  // Two logits [n, v/p] of one dtype -> [n, 5] fp64 (rows.h)
  m.def(
      "kl_stats(Tensor logits, Tensor ref_logits, Tensor labels, int valid_vocab, float inv_temperature) -> Tensor");
  // Writes dL/dlogits [n, v/p] from dL/dKL [n] fp32; grad may be logits.
  m.def(
      "kl_grad_(Tensor logits, Tensor ref_logits, Tensor(a!) grad, Tensor labels, int valid_vocab, "
      "float inv_temperature, Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum, Tensor grad_kl) -> ()");
  // values [n] fp32, mask [n] bool, segment_ids [n] int64 non-decreasing -> sums, counts [num_segments] fp32
  m.def(
      "segment_sums(Tensor values, Tensor? mask, Tensor segment_ids, SymInt num_segments) -> (Tensor sums, Tensor "
      "counts)");
  // rewards [n] fp64, group_ids [n] int64 non-decreasing -> [n] fp32
  m.def("group_advantages(Tensor rewards, Tensor group_ids, bool divide_by_deviation, int ddof, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(gft_megatron, CPU, m) {
  m.impl("row_stats", row_stats<Cpu>);
  m.impl("merge_stats", merge_stats<Cpu>);
  m.impl("combine_stats", combine_stats<Cpu>);
  m.impl("row_grad_", row_grad_<Cpu>);
  m.impl("rectified_sweep_", rectified_sweep_<Cpu>);
  m.impl("kl_stats", kl_stats);
  m.impl("kl_grad_", kl_grad_);
  m.impl("segment_sums", segment_sums<Cpu>);
  m.impl("group_advantages", group_advantages<Cpu>);
}

#ifdef GFT_MEGATRON_WITH_CUDA
TORCH_LIBRARY_IMPL(gft_megatron, CUDA, m) {
  m.impl("row_stats", row_stats<Cuda>);
  m.impl("merge_stats", merge_stats<Cuda>);
  m.impl("combine_stats", combine_stats<Cuda>);
  m.impl("row_grad_", row_grad_<Cuda>);
  m.impl("rectified_sweep_", rectified_sweep_<Cuda>);
  m.impl("segment_sums", segment_sums<Cuda>);
  m.impl("group_advantages", group_advantages<Cuda>);
}
#endif

}  // namespace gft_megatron
