"""`convert_checkpoint.py verify`: the tensors first, then the logits, computed by ranks that are started here."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch.distributed as dist
import tyro

from gft_megatron.config import ParallelConfig
from gft_megatron.convert.comparison import WeightsToCompare
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.torch_dist_reader import find_checkpoint
from gft_megatron.observe.transfer import transfer
from gft_megatron.training.process import fail, prepare_process

if TYPE_CHECKING:
    from gft_megatron.training.verification import LogitsCompared

_LEAST_SAME_TOP1 = 0.99


class Unequal(Exception):
    """The two sides are not the same model."""


@dataclass(frozen=True)
class Verify:
    """Compare a Hugging Face folder with a Megatron checkpoint: every tensor, bit for bit; then the logits of both
    models for the same tokens, Megatron's under the layout that is asked for. Started by torchrun, on as many machines
    as the model needs, it uses those ranks; else it starts its own here. The exit status is 1 if they differ."""

    hf: Annotated[Path, tyro.conf.Positional]
    """Hugging Face folder."""
    megatron: Annotated[Path, tyro.conf.Positional]
    """Folder with latest_checkpointed_iteration.txt, or one checkpoint in it."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are split into."""
    expert_model_parallel_size: int = 1
    """Ranks that the experts of each layer are divided over."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this times the tensor-parallel size, however the checkpoint is padded."""
    bf16: bool = False
    """Compute in bfloat16: both have to prefer the same token at 99% of the positions. Default float32."""
    tolerance: float = 1e-4
    """In float32, the largest difference of two logits that is allowed."""
    num_prompts: int = 4
    """Prompts of random tokens, the same ones each time."""
    prompt_length: int = 128
    """Tokens of a prompt."""
    tensors: bool = True
    """Compare the tensors."""
    logits: bool = True
    """Compare the logits; needs the memory of both models."""

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            expert_model_parallel_size=self.expert_model_parallel_size,
        )

    @property
    def num_ranks(self) -> int:
        """The least that both layouts divide: that of the experts shares its ranks with that of the rest."""
        for_a_layer = math.lcm(self.tensor_model_parallel_size, self.expert_model_parallel_size)
        return for_a_layer * self.pipeline_model_parallel_size


def verify(settings: Verify) -> None:
    """Print the worst tensor and the worst logit.

    Raises:
        Unequal: they are beyond what is allowed.
        ValueError, OSError: either side cannot be read.
    """
    for flag in (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size", "num_prompts",
        "prompt_length",
    ):  # fmt: skip
        if getattr(settings, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(settings, flag)}: it has to be at least 1")
    if not 0 <= settings.tolerance < math.inf:
        raise ValueError(f"--tolerance {settings.tolerance}: it has to be a number of at least 0")
    if not (settings.tensors or settings.logits):
        raise ValueError("--no-tensors --no-logits leave nothing to compare")
    started_by_torchrun = "RANK" in os.environ
    if settings.logits and started_by_torchrun:
        compare_logits(settings)
        return
    if settings.tensors and os.environ.get("RANK", "0") == "0":
        compare_tensors(settings)
    if settings.logits:
        sys.stdout.flush()
        start_ranks(settings.num_ranks)


def compare_tensors(settings: Verify) -> None:
    weights = WeightsToCompare(HfFolder(settings.hf), find_checkpoint(settings.megatron))
    with transfer("compared", weights.num_bytes, sys.stdout) as progress:
        found = weights.compare(progress)
    same = found.num_tensors - found.num_different
    told = f"tensors     {same} of {found.num_tensors} are bitwise the same"
    if found.worst is not None:
        raise Unequal(f"{told}; the worst is {found.worst!r}, different by {found.largest_difference:g}")
    print(told, flush=True)


def compare_logits(settings: Verify) -> None:
    """On every rank; the tensors too where this program was started by torchrun."""
    prepare_process()
    from gft_megatron.training import cpu

    cpu.install()
    from gft_megatron.training.exchange import FailedElsewhere, on_rank_zero
    from gft_megatron.training.parallel import initialize
    from gft_megatron.training.verification import compare_logits as compare

    try:
        device = initialize(settings.parallel, seed=1)
        if settings.tensors:  # not before: of a large model the others would give up waiting for rank 0 to join
            on_rank_zero(lambda: compare_tensors(settings))
        found = compare(
            HfFolder(settings.hf),
            settings.megatron,
            settings.parallel,
            device,
            bf16=settings.bf16,
            num_prompts=settings.num_prompts,
            prompt_length=settings.prompt_length,
            make_vocab_size_divisible_by=settings.make_vocab_size_divisible_by,
        )
    except (ValueError, OSError, FailedElsewhere, Unequal) as error:
        fail(error, status=1)
    is_main = dist.get_rank() == 0
    dist.destroy_process_group()
    if not is_main:
        return
    print(judged(found, settings), flush=True)


def judged(found: LogitsCompared, settings: Verify) -> str:
    """The line about the logits.

    Raises:
        Unequal: they are beyond what is allowed.
    """
    prompt, position, token = found.worst
    told = (
        f"logits      of {found.num_positions} positions, TP {settings.tensor_model_parallel_size} x PP "
        f"{settings.pipeline_model_parallel_size} x EP {settings.expert_model_parallel_size}, "
        f"{'bfloat16' if settings.bf16 else 'float32'}: largest difference {found.largest_difference:.2e} "
        f"(prompt {prompt}, position {position}, token {token}), the same first choice at {found.same_top1:.2%}"
    )
    if settings.bf16 and not (found.same_top1 >= _LEAST_SAME_TOP1 and math.isfinite(found.largest_difference)):
        raise Unequal(f"{told}; expected {_LEAST_SAME_TOP1:.0%}, and finite logits")
    if not settings.bf16 and not found.largest_difference <= settings.tolerance:
        raise Unequal(f"{told}; expected at most {settings.tolerance:g}")
    return told


def start_ranks(count: int) -> None:
    """This program again, once for each rank.

    Raises:
        OSError: a rank was killed.
        SystemExit: a rank has failed, and said why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    one_thread = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--no-tensors"],
            env={
                **os.environ, **rendezvous, **one_thread,
                "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
            },
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        while True:
            ended = [rank.poll() for rank in ranks]
            failed = [number for number, status in enumerate(ended) if status]
            if failed or None not in ended:
                break
            time.sleep(0.1)
        if None in ended:  # the others would wait for it
            time.sleep(5)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for number in failed:
        if ended[number] < 0:
            raise OSError(f"rank {number} was ended by signal {-ended[number]}; did it run out of memory?")
    if failed:
        raise SystemExit(1)  # it has said why
