// The operators: schemas, checks and registration. The mathematics is described in rows.h.
// Each sees the shard of one rank and calls no collective; merging the shards of several ranks is left to the caller.

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cpu/row_loops.h"
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
  void combine_stats(const CombineParams& params) const { cpu::combine_stats(params); }
  void row_grad(const GradParams& params) const { cpu::row_grad(params); }
};

#ifdef GFT_MEGATRON_WITH_CUDA
struct Cuda {
  explicit Cuda(const Tensor& tensor) : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
  void row_stats(const StatsParams& params) const { C10_CUDA_CHECK(cuda::row_stats(params, stream)); }
  void combine_stats(const CombineParams& params) const { C10_CUDA_CHECK(cuda::combine_stats(params, stream)); }
  void row_grad(const GradParams& params) const { C10_CUDA_CHECK(cuda::row_grad(params, stream)); }
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
  TORCH_CHECK_VALUE(inv_temperature > 0 && inv_temperature < HUGE_VALF,
                    "inv_temperature must be positive and finite, got ", inv_temperature);
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

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> combine_stats(const Tensor& stats) {
  TORCH_CHECK_VALUE(stats.dim() == 3 && stats.size(0) > 0 && stats.size(2) == 4 && stats.scalar_type() == at::kFloat,
                    "stats must be [num_shards, n, 4] float32, got ", stats.sizes(), " ", stats.scalar_type());
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

// Overwriting the logits is allowed, overwriting a part of them that is still to be read is not.
void check_grad(const Tensor& grad, const Tensor& logits) {
  check_rows("grad", grad);
  TORCH_CHECK_VALUE(
      grad.sizes() == logits.sizes() && grad.scalar_type() == logits.scalar_type() && grad.device() == logits.device(),
      "grad must match logits: ", logits.sizes(), " ", logits.scalar_type(), " on ", logits.device(), ", got ",
      grad.sizes(), " ", grad.scalar_type(), " on ", grad.device());
  TORCH_CHECK_VALUE(grad.size(0) <= 1 || grad.stride(0) >= grad.size(1), "the rows of grad overlap: strides ",
                    grad.strides());
  if (grad.const_data_ptr() == logits.const_data_ptr()) {
    TORCH_CHECK_VALUE(grad.strides() == logits.strides(),
                      "grad starts where logits does with other strides: ", grad.strides(), " and ", logits.strides());
  } else {
    at::assert_no_partial_overlap(grad, logits);
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

}  // namespace

TORCH_LIBRARY(gft_megatron, m) {
  // logits [n, v/p], labels [n] int64 global ids -> [n, 4] fp32: max, sum, weighted, label (rows.h)
  m.def(
      "row_stats(Tensor logits, Tensor labels, int vocab_start, int valid_vocab, float inv_temperature, "
      "bool want_entropy) -> Tensor");
  // stats [p, n, 4], in shard order -> four [n] fp32; entropy is NaN where row_stats was not asked for it
  m.def("combine_stats(Tensor stats) -> (Tensor log_prob, Tensor entropy, Tensor max, Tensor log_sum)");
  // Writes dL/dlogits [n, v/p] from the per-token dL/dlog_prob and dL/dentropy [n] fp32; grad may be logits.
  m.def(
      "row_grad_(Tensor logits, Tensor(a!) grad, Tensor labels, int vocab_start, int valid_vocab, "
      "float inv_temperature, Tensor max, Tensor log_sum, Tensor entropy, Tensor grad_log_prob, "
      "Tensor? grad_entropy) -> ()");
}

TORCH_LIBRARY_IMPL(gft_megatron, CPU, m) {
  m.impl("row_stats", row_stats<Cpu>);
  m.impl("combine_stats", combine_stats<Cpu>);
  m.impl("row_grad_", row_grad_<Cpu>);
}

#ifdef GFT_MEGATRON_WITH_CUDA
TORCH_LIBRARY_IMPL(gft_megatron, CUDA, m) {
  m.impl("row_stats", row_stats<Cuda>);
  m.impl("combine_stats", combine_stats<Cuda>);
  m.impl("row_grad_", row_grad_<Cuda>);
}
#endif

}  // namespace gft_megatron
