// The Python module gft_megatron._C: host-side helpers that have nothing to do with tensors. Importing it also
// registers the operators of ops.cpp.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "cpu/row_loops.h"

#define GFT_STRING_(x) #x
#define GFT_STRING(x) GFT_STRING_(x)

namespace gft_megatron {
namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["torch"] = GFT_STRING(GFT_MEGATRON_TORCH_VERSION);
#ifdef GFT_MEGATRON_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["compiler"] = __VERSION__;
  info["isa"] = cpu::row_loops().isa;
  return info;
}

// Longest first, each into the lightest bin that has room (LPT). Equal lengths keep their order and of equally light
// bins the first is taken, so every rank that calls this with the same lengths gets the same bins.
std::vector<std::vector<int64_t>> balanced_partition(const std::vector<int64_t>& lengths, int64_t num_bins,
                                                     std::optional<int64_t> max_items) {
  const auto num_items = static_cast<int64_t>(lengths.size());
  if (num_bins < 1) throw py::value_error("num_bins must be at least 1, got " + std::to_string(num_bins));
  if (max_items && (*max_items < 0 || (num_items + num_bins - 1) / num_bins > *max_items)) {
    throw py::value_error(std::to_string(num_items) + " items do not fit into " + std::to_string(num_bins) +
                          " bins of at most " + std::to_string(*max_items));
  }
  for (const int64_t length : lengths) {
    if (length < 0) throw py::value_error("a length is negative: " + std::to_string(length));
  }
  std::vector<int64_t> order(num_items);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  using LoadAndBin = std::pair<int64_t, int64_t>;
  std::priority_queue<LoadAndBin, std::vector<LoadAndBin>, std::greater<>> lightest;
  for (int64_t bin = 0; bin < num_bins; ++bin) lightest.push({0, bin});
  std::vector<std::vector<int64_t>> bins(num_bins);
  for (const int64_t item : order) {
    const auto [load, bin] = lightest.top();
    lightest.pop();
    bins[bin].push_back(item);
    // A full bin does not return to the queue.
    if (!max_items || static_cast<int64_t>(bins[bin].size()) < *max_items) lightest.push({load + lengths[item], bin});
  }
  for (std::vector<int64_t>& bin : bins) std::sort(bin.begin(), bin.end());
  return bins;
}

}  // namespace
}  // namespace gft_megatron

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &gft_megatron::build_info,
        "What this extension was built with: torch (version), cuda (bool), compiler; and isa, the CPU loops in use.");
  m.def("balanced_partition", &gft_megatron::balanced_partition, pybind11::arg("lengths"), pybind11::arg("num_bins"),
        pybind11::arg("max_items") = pybind11::none(),
        "Split items of the given lengths into num_bins lists of indices with sums as equal as longest-first greedy\n"
        "makes them, at most max_items in each. Deterministic. Raises ValueError where they cannot fit.");
}
