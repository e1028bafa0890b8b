"""The program behind examples/pretrain_gft.py: read the flags, train, and end in one line when something is wrong."""

from __future__ import annotations

import os

import torch.distributed as dist

from gft_megatron.command_line import parse_args
from gft_megatron.rollout.engine import RolloutError
from gft_megatron.training.process import fail, prepare_process


def main() -> None:
    """Exit status 0 after a whole run, 1 after an error of the user's or of the machine, 2 for a wrong flag."""
    try:
        config = parse_args()
    except ValueError as error:
        fail(error, status=2)
    prepare_process()

    from gft_megatron.rollout.sglang.fleet import FleetLost
    from gft_megatron.training import cpu

    cpu.install()
    from gft_megatron.training.checkpoint import CheckpointError
    from gft_megatron.training.exchange import FailedElsewhere
    from gft_megatron.training.loop import train

    told = (ValueError, OSError, FloatingPointError, RolloutError, FleetLost, FailedElsewhere, CheckpointError)
    try:
        train(config)
    except told as error:
        if os.environ.get("GFT_MEGATRON_TRACEBACK") == "1":
            raise
        fail(error, status=1)
    dist.destroy_process_group()
