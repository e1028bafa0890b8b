"""Builds csrc/cuda for the host, where emulator.cpp runs it, and calls it on CPU tensors.

Every tensor is copied into memory that ends, or starts, at a page which may not be touched.
"""

from __future__ import annotations

import ctypes
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_bool, c_double, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of params.h


class Shard(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("labels", c_void_p),
        ("num_rows", c_int64),
        ("row_stride", c_int64),
        ("width", c_int64),
        ("valid_width", c_int64),
        ("vocab_start", c_int64),
        ("inv_temperature", c_float),
        ("dtype", c_int),
    ]


class StatsParams(Structure):
    _fields_ = [("shard", Shard), ("want_entropy", c_bool), ("stats", c_void_p)]


class MergeParams(Structure):
    _fields_ = [("parts", c_void_p), ("num_parts", c_int64), ("num_rows", c_int64), ("stats", c_void_p)]


class CombineParams(Structure):
    _fields_ = [
        ("stats", c_void_p),
        ("num_shards", c_int64),
        ("num_rows", c_int64),
        *((name, c_void_p) for name in ("log_prob", "entropy", "max", "log_sum")),
    ]


class GradParams(Structure):
    _fields_ = [
        ("shard", Shard),
        ("grad", c_void_p),
        ("grad_row_stride", c_int64),
        *((name, c_void_p) for name in ("max", "log_sum", "entropy", "grad_log_prob", "grad_entropy")),
    ]


class SweepParams(Structure):
    _fields_ = [
        ("shard", Shard),
        ("grad", c_void_p),
        ("grad_row_stride", c_int64),
        *((name, c_void_p) for name in ("weight", "tau", "log_prob")),
    ]


class SegmentSumParams(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("values", "mask", "segment_ids")),
        ("num_values", c_int64),
        ("num_segments", c_int64),
        *((name, c_void_p) for name in ("sums", "counts")),
    ]


class GroupAdvantageParams(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("rewards", "group_ids")),
        ("num_samples", c_int64),
        ("divide_by_deviation", c_bool),
        ("ddof", c_int64),
        ("eps", c_double),
        ("advantages", c_void_p),
    ]


def build(csrc: Path, folder: Path) -> Path:
    """The library made of csrc/cuda and the emulator. nvcc only finds its own headers here: it compiles plain C++."""
    here = Path(__file__).parent
    library = folder / "cuda_on_host.so"
    sources = [*sorted(here.glob("*.cpp")), *sorted((csrc / "cuda").glob("*.cu"))]
    flags = ["-std=c++17", "-O2", "-shared", "-Xcompiler", "-fPIC,-Wall,-Werror,-Wno-unknown-pragmas,-U_FORTIFY_SOURCE"]
    command = ["nvcc", "-x", "c++", *flags, f"-I{here}", f"-I{csrc}", *map(str, sources), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return library


class EmulatedGpu:
    """The operators of torch.ops.gft_megatron, on what csrc/cuda makes of them. Outputs start as NaN."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_error.restype = ctypes.c_char_p
        self._library.emulator_order.argtypes = [ctypes.c_uint64, c_bool]
        self._library.emulator_limits.argtypes = [c_int, c_int64]
        self._library.guarded_alloc.argtypes = [c_size_t, c_bool]
        self._library.guarded_alloc.restype = c_void_p
        self._library.guarded_free.argtypes = [c_void_p, c_size_t]
        self._library.emulated_row_stats_splits.argtypes = [c_int64, c_int64]
        self._library.emulated_row_stats_splits.restype = c_int64
        self._library.emulated_row_stats.argtypes = [POINTER(StatsParams), c_int64]

    def guarded(self, tensor: Tensor, *, at_start: bool = False, row_stride: int | None = None) -> Tensor:
        """A copy between guards; `row_stride` elements from row to row, NaN in the gaps (0 in vast ones)."""
        rows, width = tensor.shape if tensor.dim() == 2 else (1, tensor.numel())
        stride = width if row_stride is None else row_stride
        size = max(rows - 1, 0) * stride + width
        num_bytes = max(size, 1) * tensor.element_size()
        pointer = self._library.guarded_alloc(num_bytes, at_start)
        memory = (ctypes.c_char * num_bytes).from_address(pointer)
        weakref.finalize(memory, self._library.guarded_free, pointer, num_bytes)
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=max(size, 1))[:size]
        if tensor.is_floating_point() and size < 2**24:  # pages that nobody touches do not exist
            flat.fill_(float("nan"))
        copy = flat if tensor.dim() == 1 else flat.as_strided((rows, width), (stride, 1))
        return copy.copy_(tensor)

    @contextmanager
    def order(self, seed: int, *, backwards: bool = False) -> Iterator[None]:
        """Run blocks and warps in another order."""
        self._library.emulator_order(seed, backwards)
        try:
            yield
        finally:
            self._library.emulator_order(0, False)

    @contextmanager
    def limits(self, cluster: int, memory_bytes: int) -> Iterator[None]:
        """Be another GPU."""
        self._library.emulator_limits(cluster, memory_bytes)
        try:
            yield
        finally:
            self._library.emulator_limits(8, 227 * 1024)

    def _call(self, name: str, params: Structure, *arguments: object) -> None:
        if getattr(self._library, f"emulated_{name}")(ctypes.byref(params), *arguments) != 0:
            raise RuntimeError(self._library.emulator_error().decode() or "invalid value")

    def _output(self, *shape: int) -> Tensor:
        size = 1
        for extent in shape:
            size *= extent
        return self.guarded(torch.full((size,), float("nan"))).view(shape)

    @staticmethod
    def _shard(logits: Tensor, labels: Tensor, vocab_start: int, valid_vocab: int, inv_temperature: float) -> Shard:
        place = (len(logits), logits.stride(0), logits.shape[1], valid_vocab, vocab_start, inv_temperature)
        return Shard(logits.data_ptr(), labels.data_ptr(), *place, DTYPES.index(logits.dtype))

    def run_faulty_kernel(self, which: int) -> float:
        """One of faulty_kernels.cpp; what it wrote."""
        out = self._output(8)
        if self._library.faulty_kernel(c_int(which), c_void_p(out.data_ptr())) != 0:
            raise RuntimeError(self._library.emulator_error().decode())
        return float(out[0])

    def splits(self, num_rows: int, width: int) -> int:
        return self._library.emulated_row_stats_splits(num_rows, width)

    def row_stats(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_start: int,
        valid_vocab: int,
        inv_temperature: float,
        want_entropy: bool,
        splits: int | None = None,
    ) -> Tensor:
        n = len(logits)
        splits = self.splits(n, valid_vocab) if splits is None else splits
        labels, parts = self.guarded(labels), self._output(splits, n, 4)
        shard = self._shard(logits, labels, vocab_start, valid_vocab, inv_temperature)
        self._call("row_stats", StatsParams(shard, want_entropy, parts.data_ptr()), splits)
        return parts[0] if splits == 1 else self.merge_stats(parts)

    def merge_stats(self, parts: Tensor) -> Tensor:
        num_parts, n, _ = parts.shape
        parts, stats = self.guarded(parts.reshape(-1)), self._output(n, 4)
        self._call("merge_stats", MergeParams(parts.data_ptr(), num_parts, n, stats.data_ptr()))
        return stats

    def combine_stats(self, stats: Tensor) -> tuple[Tensor, ...]:
        shards, n, _ = stats.shape
        stats = self.guarded(stats.reshape(-1))
        outputs = tuple(self._output(n) for _ in range(4))
        self._call("combine_stats", CombineParams(stats.data_ptr(), shards, n, *(x.data_ptr() for x in outputs)))
        return outputs

    def row_grad_(
        self,
        logits: Tensor,
        grad: Tensor,
        labels: Tensor,
        vocab_start: int,
        valid_vocab: int,
        inv_temperature: float,
        *vectors: Tensor | None,
    ) -> None:
        labels = self.guarded(labels)
        kept = [vector if vector is None else self.guarded(vector) for vector in vectors]
        shard = self._shard(logits, labels, vocab_start, valid_vocab, inv_temperature)
        pointers = [vector if vector is None else vector.data_ptr() for vector in kept]
        self._call("row_grad", GradParams(shard, grad.data_ptr(), grad.stride(0), *pointers))

    def rectified_sweep_(
        self,
        logits: Tensor,
        grad: Tensor,
        labels: Tensor,
        valid_vocab: int,
        inv_temperature: float,
        weight: Tensor,
        tau: Tensor,
    ) -> Tensor:
        labels, weight, tau = self.guarded(labels), self.guarded(weight), self.guarded(tau)
        log_prob = self._output(len(logits))
        shard = self._shard(logits, labels, 0, valid_vocab, inv_temperature)
        pointers = [x.data_ptr() for x in (weight, tau, log_prob)]
        self._call("rectified_sweep", SweepParams(shard, grad.data_ptr(), grad.stride(0), *pointers))
        return log_prob

    def segment_sums(
        self, values: Tensor, mask: Tensor | None, segment_ids: Tensor, num_segments: int
    ) -> tuple[Tensor, Tensor]:
        values, segment_ids = self.guarded(values), self.guarded(segment_ids)
        mask = None if mask is None else self.guarded(mask)
        sums, counts = self._output(num_segments), self._output(num_segments)
        inputs = (values.data_ptr(), None if mask is None else mask.data_ptr(), segment_ids.data_ptr())
        params = SegmentSumParams(*inputs, len(values), num_segments, sums.data_ptr(), counts.data_ptr())
        self._call("segment_sums", params)
        return sums, counts

    def group_advantages(
        self, rewards: Tensor, group_ids: Tensor, divide_by_deviation: bool, ddof: int, eps: float
    ) -> Tensor:
        rewards, group_ids = self.guarded(rewards), self.guarded(group_ids)
        advantages = self._output(len(rewards))
        inputs = (rewards.data_ptr(), group_ids.data_ptr(), len(rewards))
        params = GroupAdvantageParams(*inputs, divide_by_deviation, ddof, eps, advantages.data_ptr())
        self._call("group_advantages", params)
        return advantages
