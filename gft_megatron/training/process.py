"""How the process of a rank begins, before Megatron is imported, and how it ends when something is wrong."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import NoReturn

import torch
import torch.distributed as dist


def prepare_process() -> None:
    """To be called before anything of Megatron is imported."""
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


def fail(error: Exception, *, status: int) -> NoReturn:
    """Say it once, not once for every rank."""
    if _speaks():
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def _speaks() -> bool:
    if dist.is_initialized():
        # An error may be that of any one rank: the first to come speaks.
        return dist.distributed_c10d._get_default_store().add("gft_megatron/error", 1) == 1
    return os.environ.get("LOCAL_RANK", "0") == "0"
