"""How long new weights take to servers that run, and what they cost the trainer in memory.

    python tools/make_tiny_model.py --help                    # or any Hugging Face folder that we convert
    export GFT_SGLANG_API_KEY=... GFT_SGLANG_ADMIN_KEY=...    # those of the servers; none if they have none
    python tools/bench_weight_sync.py --urls http://127.0.0.1:30000 --model FOLDER --ways disk distributed

The model is that of the servers; it is held here once, on the CPU, and pushed by one process. Memory is the most that
this process held beside it. Under MALLOC_MMAP_THRESHOLD_=65536 the heap keeps none of what was freed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from bench.memory import PeakMemory
from torch import Tensor

from gft_megatron.convert import HfFolder
from gft_megatron.convert.mapping import expected_hf_shapes
from gft_megatron.rollout.sglang.http import Http, Keys
from gft_megatron.rollout.sglang.weight_sync import build_weight_sync

_MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", nargs="+", required=True, help="Of the servers.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder that the servers run.")
    parser.add_argument("--ways", nargs="+", default=["disk", "distributed"], choices=["disk", "distributed", "tensor"])
    parser.add_argument("--bucket-mib", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="For disk; default: a temporary one.")
    arguments = parser.parse_args()
    folder = HfFolder(arguments.model)
    tensors = {name: folder.tensor(name).float() for name in expected_hf_shapes(folder.shape)}
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(_measure(arguments, tensors, arguments.folder or Path(temporary)))


async def _measure(arguments: argparse.Namespace, tensors: dict[str, Tensor], folder: Path) -> None:
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    print(
        f"{num_bytes / 4e6:.1f}M parameters, {num_bytes / _MIB:.0f} MiB in float32, largest tensor "
        f"{largest / _MIB:.1f} MiB; {len(arguments.urls)} servers, buckets of {arguments.bucket_mib} MiB"
    )
    print(f"{'way':<12} {'median s':>9} {'min':>6} {'max':>6} {'MiB/s':>7} {'extra MiB':>10}")
    keys = Keys(os.environ.get("GFT_SGLANG_API_KEY"), os.environ.get("GFT_SGLANG_ADMIN_KEY"))
    version = 0
    async with Http(keys) as http:
        for way in arguments.ways:
            sync = build_weight_sync(
                way,
                http,
                folder=folder / "weights",
                source_folder=arguments.model,
                dtype=torch.float32,
                device=torch.device("cpu"),
                bucket_bytes=arguments.bucket_mib * _MIB,
            )
            seconds, extra = [], []
            for _ in range(arguments.repeats + 1):
                version += 1
                with PeakMemory("cpu") as memory:
                    result = await sync.push(arguments.urls, _copied(tensors), version, allow_running=True)
                if result.failed:
                    raise SystemExit(f"{way}: {result.failed}")
                seconds.append(result.seconds)
                extra.append(memory.peak_extra_bytes)
            await sync.close()
            first, *timed = seconds  # the first one connects
            held = "?" if None in extra else f"{max(extra[1:]) / _MIB:.1f}"
            median = statistics.median(timed)
            print(
                f"{way:<12} {median:>9.2f} {min(timed):>6.2f} {max(timed):>6.2f} "
                f"{num_bytes / _MIB / median:>7.0f} {held:>10}"
            )


def _copied(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """One at a time, as they come from the ranks of a trainer."""
    for name, tensor in tensors.items():
        yield name, tensor.clone()


if __name__ == "__main__":
    main()
