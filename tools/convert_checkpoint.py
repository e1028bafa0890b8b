#!/usr/bin/env python
"""Checkpoints from Hugging Face to Megatron and back, tensor by tensor, without a GPU and without building the model.

python tools/convert_checkpoint.py hf-to-megatron Qwen2.5-1.5B megatron/ --tensor-model-parallel-size 2
python tools/convert_checkpoint.py megatron-to-hf runs/mine/checkpoints hf/ --hf-checkpoint Qwen2.5-1.5B
python tools/convert_checkpoint.py verify Qwen2.5-1.5B megatron/ --tensor-model-parallel-size 2
python tools/convert_checkpoint.py inspect megatron/

The output folder is complete or absent, whenever the program ends. --dry-run says what would be written, and checks the
input as a conversion does. COMMAND --help lists the flags of a command.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from conversion import bridge
from conversion.verify import Unequal, Verify, verify

from gft_megatron.command_line import parse_command
from gft_megatron.convert.conversion_plan import Plan
from gft_megatron.convert.hf_to_megatron import HfToMegatron, plan_hf_to_megatron
from gft_megatron.convert.inspection import describe
from gft_megatron.convert.megatron_to_hf import MegatronToHf, plan_megatron_to_hf
from gft_megatron.observe.transfer import size, transfer
from gft_megatron.observe.wording import inert

Dtype = Literal["stored", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ToMegatron:
    """Write a Hugging Face folder (safetensors) as a Megatron checkpoint, torch_dist."""

    source: Annotated[Path, tyro.conf.Positional]
    """Hugging Face folder."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write: absent, empty, or from an earlier conversion."""
    tensor_model_parallel_size: int = 1
    """Cut tensors up and pad the vocabulary for so many ranks. The checkpoint loads under any other layout too,
    and under any expert-parallel size."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this times the tensor-parallel size. Training has a flag of this name."""
    dtype: Dtype = "stored"
    """What the weights are written in."""
    lora_adapter: Path | None = None
    """Merge this LoRA adapter, a folder as PEFT's save_pretrained writes it, into the weights."""
    workers: int = 2
    """Threads, each with a file of its own."""
    backend: Literal["tables", "bridge"] = "tables"
    """Who converts: our own tables, or Megatron-Bridge, which is told only the folders."""
    dry_run: bool = False
    """Check the input and say what would be written; write nothing."""

    def plan(self) -> HfToMegatron:
        return plan_hf_to_megatron(
            self.source,
            self.out,
            tp_size=self.tensor_model_parallel_size,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by,
            dtype=_dtype(self.dtype),
            workers=self.workers,
            lora_adapter=self.lora_adapter,
        )


@dataclass(frozen=True)
class ToHf:
    """Write a Megatron checkpoint (torch_dist, of any layout) as a Hugging Face folder. Optimizer states are left."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder with latest_checkpointed_iteration.txt, or one checkpoint in it."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write: absent, empty, or from an earlier conversion."""
    hf_checkpoint: Path | None = None
    """Hugging Face folder to take config.json and the tokenizer from; a converted checkpoint has them in hf/."""
    max_shard_bytes: int = 5_000_000_000
    """Of a weight file."""
    dtype: Dtype = "stored"
    """What the weights are written in."""
    workers: int = 2
    """Threads."""
    backend: Literal["tables", "bridge"] = "tables"
    """Who converts: our own tables, or Megatron-Bridge, which is told only the folders."""
    dry_run: bool = False
    """Check the input and say what would be written; write nothing."""

    def plan(self) -> MegatronToHf:
        return plan_megatron_to_hf(
            self.source,
            self.out,
            config_folder=self.hf_checkpoint,
            dtype=_dtype(self.dtype),
            max_shard_bytes=self.max_shard_bytes,
            workers=self.workers,
        )


@dataclass(frozen=True)
class Inspect:
    """Say what a Hugging Face folder or a Megatron checkpoint holds; only headers are read."""

    path: Annotated[Path, tyro.conf.Positional]
    """The folder."""
    tensors: bool = False
    """List every tensor of the model."""


COMMANDS = {"hf-to-megatron": ToMegatron, "megatron-to-hf": ToHf, "verify": Verify, "inspect": Inspect}


def _dtype(name: Dtype) -> torch.dtype | None:
    return None if name == "stored" else getattr(torch, name)


def convert(settings: ToMegatron | ToHf) -> None:
    """Plan, say so, and write."""
    if settings.backend == "bridge":
        convert_by_bridge(settings)
        return
    conversion = settings.plan()
    for line in _told(conversion.plan):
        print(line, flush=True)
    if settings.dry_run:
        conversion.plan.check_disk(settings.out)
        print("dry run: the input is whole, nothing is written")
        return
    with transfer("written", conversion.plan.num_bytes, sys.stdout) as progress:
        conversion.run(progress)
    print(f"{inert(str(settings.out))} is complete")


def convert_by_bridge(settings: ToMegatron | ToHf) -> None:
    """What Megatron-Bridge does of it."""
    if settings.dry_run:
        raise ValueError("--backend bridge has no --dry-run")
    if isinstance(settings, ToMegatron):
        bridge.import_checkpoint(settings.source, settings.out)
    else:
        bridge.export_checkpoint(settings.source, settings.out, settings.hf_checkpoint)
    print(f"{inert(str(settings.out))} is complete")


def _told(plan: Plan) -> list[str]:
    dtypes = ", ".join(f"{count} in {name}" for name, count in plan.dtypes.items())
    padding = plan.padded_vocab_size - plan.vocab_size
    return [
        f"weights     {size(plan.num_bytes)}: {plan.num_parameters} Megatron parameters, "
        f"{plan.num_tensors} Hugging Face tensors",
        f"dtypes      {dtypes}",
        f"vocabulary  {plan.vocab_size} rows, {plan.padded_vocab_size} on Megatron's side ({padding} of padding)",
        f"disk        {size(plan.num_bytes)} needed, {size(plan.disk_free)} free",
        f"memory      {size(plan.memory)} of weights at most, beside the program itself",
    ]


def main() -> None:
    try:
        settings = parse_command(COMMANDS, word="COMMAND", prog="convert_checkpoint.py", description=__doc__)
        if isinstance(settings, Inspect):
            for line in describe(settings.path, with_tensors=settings.tensors):
                print(inert(line))
        elif isinstance(settings, Verify):
            verify(settings)
        else:
            convert(settings)
    except (ValueError, OSError, Unequal) as error:
        raise SystemExit(f"error: {inert(' '.join(str(error).split()))}") from None


if __name__ == "__main__":
    main()
