#!/usr/bin/env python
"""Measure the bank of finished groups where it will lie: groups a second with fsync, recovery, and memory.

python tools/bench_bank.py FOLDER [--groups 10000] [--samples 8] [--tokens 1000] [--at-once 1]

FOLDER must not exist; it is removed at the end. Memory is what the process grows by: the index, not the groups.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from gft_megatron.groups import Group, GroupKey, Prompt, Sample, Source, WeightSpan
from gft_megatron.rollout.bank import Bank


def made_group(samples: int, tokens: int) -> Group:
    sample = Sample(
        Source.SELF,
        np.arange(tokens),
        "word " * tokens,
        1.0,
        rollout_log_probs=np.full(tokens, -1.0, np.float32),
        weight_spans=(WeightSpan(0, 0, tokens),),
    )
    return Group(Prompt(0, np.zeros(0, np.int64), ""), (sample,) * samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=1, help="groups with one fsync")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"error: {arguments.folder} exists: give a name that is free")
    group = made_group(arguments.samples, arguments.tokens)
    settings = {"rank": 0, "num_ranks": 1, "fingerprint": "bench", "checkpoint_iteration": 0}
    try:
        bank = Bank.open(arguments.folder, **settings)
        _measure("append", arguments.groups, lambda: _append(bank, group, arguments.groups, arguments.at_once))
        bank.close()
        (file,) = arguments.folder.iterdir()
        print(f"file: {file.stat().st_size / 2**20:.0f} MiB")
        recovered = _measure("open", arguments.groups, lambda: Bank.open(arguments.folder, **settings))
        keys = list(recovered.restored)
        _measure("take", len(keys), lambda: [recovered.take(key) and None for key in keys])
        recovered.mark_consumed(keys[: len(keys) // 2], 1)
        _measure("compact", len(keys) // 2, lambda: recovered.compact(1))
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def _append(bank: Bank, group: Group, number: int, at_once: int) -> None:
    for first in range(0, number, at_once):
        bank.append([(GroupKey(i // 128, i % 128), group) for i in range(first, min(first + at_once, number))])


def _measure(name: str, groups: int, work):
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    growth = (psutil.Process().memory_info().rss - before) / 2**20
    print(f"{name}: {seconds:.2f} s, {groups / seconds:.0f} groups/s, {growth:+.1f} MiB of memory", flush=True)
    return result


if __name__ == "__main__":
    main()
