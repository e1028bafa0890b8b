"""Peak memory of a block of code."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch


class PeakMemory:
    """How much more memory was held inside the block, at most, than before it. None where the system does not tell."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.peak_extra_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and not yet given back would hide new allocations
        self.before = _status_bytes("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        except OSError:
            self.before = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
            self.peak_extra_bytes = torch.cuda.max_memory_allocated() - self.before
        elif self.before is not None:
            self.peak_extra_bytes = max(0, _status_bytes("VmHWM") - self.before)


def _status_bytes(name: str) -> int:
    return int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024
