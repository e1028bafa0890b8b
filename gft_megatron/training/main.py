"""The program behind examples/pretrain_gft.py: read the flags, train, and end in one line when something is wrong."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import NoReturn

import torch
import torch.distributed as dist

from gft_megatron.command_line import parse_args
from gft_megatron.rollout.engine import RolloutError


def main() -> None:
    """Exit status 0 after a whole run, 1 after an error of the user's or of the machine, 2 for a wrong flag."""
    try:
        config = parse_args()
    except ValueError as error:
        _fail(error, status=2)
    _prepare_process()

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
        _fail(error, status=1)
    dist.destroy_process_group()


def _prepare_process() -> None:
    # Sequence parallelism relies on kernels being launched in program order (Megatron checks this variable).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        # Megatron's jit_fuser wraps small functions in torch.compile, which would call the C++ compiler in mid-run.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
    # Import-time advice about Transformer Engine and Apex, once for every rank.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|TE).*")
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)


def _fail(error: Exception, *, status: int) -> NoReturn:
    """Say it once, not once for every rank."""
    if _speaks():
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def _speaks() -> bool:
    if dist.is_initialized():
        # An error may be that of any one rank: the first to come speaks.
        return dist.distributed_c10d._get_default_store().add("gft_megatron/error", 1) == 1
    return os.environ.get("LOCAL_RANK", "0") == "0"
