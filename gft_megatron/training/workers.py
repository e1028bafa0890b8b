"""Build what collects the groups: the engine, the reward, the bank of finished groups."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import PreTrainedTokenizerBase

from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.data.store import PromptStore
from gft_megatron.observe.console import Console
from gft_megatron.observe.metrics import Rates
from gft_megatron.observe.wording import collecting
from gft_megatron.phases import Phase
from gft_megatron.rewards import build_reward
from gft_megatron.rollout.background import BackgroundLoop
from gft_megatron.rollout.bank import Bank
from gft_megatron.rollout.collect import Collector
from gft_megatron.rollout.counts import CollectNews
from gft_megatron.rollout.engine import RolloutEngine
from gft_megatron.rollout.local import LocalEngine
from gft_megatron.rollout.samples import SampleMaker
from gft_megatron.rollout.sglang.engine import SGLangEngine
from gft_megatron.training.exchange import all_or_none
from gft_megatron.training.parallel import is_replica_leader
from gft_megatron.training.rollouts import RolloutWorkers
from gft_megatron.training.servers import Servers, build_engine


def build_workers(
    phases: Sequence[Phase],
    hf_folder: HfFolder,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    servers: Servers | None,
    console: Console,
    *,
    bank: Bank | None,
    draws_samples: bool,
) -> RolloutWorkers:
    """
    Args:
        servers: None for the embedded engine.
        bank: of this rank; None where it collects nothing, or no own samples.
    """
    config = phases[0].config  # nothing here can be a phase's own
    engine: RolloutEngine | None = None
    if servers is not None:
        engine = build_engine(config, servers, hf_folder.shape, tokenizer.eos_token_id)
    elif draws_samples:
        engine = LocalEngine(
            hf_folder.path,
            eos_token_ids={tokenizer.eos_token_id},
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            max_batch_size=config.rollout.max_concurrent_samples,
            dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
            device=device,
            seed=config.optimizer.seed,
        )
    collector = None
    if servers is None or engine is not None:
        maker = SampleMaker(
            engine=engine,
            reward=build_reward(config.rollout.rm_type),
            decode=decoder(tokenizer),
            seed=config.optimizer.seed,
            max_concurrent_samples=config.rollout.max_concurrent_samples,
        )
        collector = Collector(maker, bank)

    rates = Rates(over_sec=2.0)

    def watch(news: CollectNews, figures: Mapping[str, float]) -> None:
        tokens = {name.removeprefix("tokens/"): n for name, n in figures.items() if name.startswith("tokens/")}
        console.doing(collecting(news, figures, rates.of(tokens)))

    return RolloutWorkers(
        collector,
        LocalEngine.scope if servers is None else SGLangEngine.scope,
        # Every thread has a CUDA device of its own.
        loop=BackgroundLoop(None if device.type == "cpu" else lambda: torch.cuda.set_device(device)),
        watch=watch,
    )


def open_bank(
    phases: Sequence[Phase], prompts: PromptStore, console: Console, *, iteration: int, of_replicas: bool
) -> Bank | None:
    """The bank of this rank, with what runs before this one have finished; collective over the world.

    Args:
        iteration: that training goes on from.
        of_replicas: each replica's first rank collects, not every rank.

    Raises:
        ValueError, OSError: a ledger that cannot be read; FailedElsewhere on the other ranks.
    """

    def open_own() -> Bank | None:
        if of_replicas and not is_replica_leader():
            return None
        return Bank.open(
            Path(phases[0].config.output.run_dir) / "bank",
            rank=parallel_state.get_data_parallel_rank() if of_replicas else dist.get_rank(),
            num_ranks=parallel_state.get_data_parallel_world_size() if of_replicas else dist.get_world_size(),
            fingerprint=_fingerprint(phases, prompts),
            checkpoint_iteration=iteration,
        )

    # Together: a rank that appends while another still reads its file would confuse that one.
    bank = all_or_none(open_own)
    if bank is not None and (bank.report.restored or bank.report.damages):
        console.info(f"bank: {bank.report}")
    return bank


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Token ids to text, special tokens kept."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def _fingerprint(phases: Sequence[Phase], prompts: PromptStore) -> str:
    """Of what decides which groups a run makes, but for the weights: those of another run are not to be trained on."""
    settings: list[list[object]] = []
    for phase in phases:
        config = phase.config
        recipe = (config.group_sizes, config.sampling, config.rollout.rm_type, config.rollout.hint_segments)
        settings.append([phase.start, config.optimizer.seed, *map(str, recipe)])
    return hashlib.sha256(json.dumps([prompts.fingerprint, settings]).encode()).hexdigest()[:16]
