"""Build what a run is made of, in the order in which mistakes are cheapest: flags, files, data, model, checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gft_megatron.command_line import save_config
from gft_megatron.config import RunConfig
from gft_megatron.convert.complete_folder import refuse_to_replace_what_is_not_ours
from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.megatron_weights import MegatronWeights
from gft_megatron.convert.model_shape import ModelShape
from gft_megatron.data.order import PromptOrder
from gft_megatron.data.prompts import PromptStoreInfo, prepare_prompts
from gft_megatron.data.store import PromptStore
from gft_megatron.observe.console import Console, build_console
from gft_megatron.observe.metrics import MetricsLog, Timings
from gft_megatron.observe.trackers import Tracker, build_trackers
from gft_megatron.phases import Phase, phase_at, resolve_phases
from gft_megatron.rewriting import Rewrites, RewrittenPrompts
from gft_megatron.training.checkpoint import find_checkpoint, load_checkpoint
from gft_megatron.training.exchange import on_rank_zero
from gft_megatron.training.fused_linear import return_hidden_states
from gft_megatron.training.model import (
    build_chunks,
    megatron_fields,
    padded_vocab_size,
    require_divisible,
    transformer_config,
    wrap_in_ddp,
)
from gft_megatron.training.optimizer import build_optimizer, build_scheduler, reset_optimizer
from gft_megatron.training.parallel import initialize
from gft_megatron.training.reference import Reference
from gft_megatron.training.rollouts import RolloutWorkers
from gft_megatron.training.servers import Servers, find_servers
from gft_megatron.training.weights import load_weights
from gft_megatron.training.workers import build_workers, decoder, open_bank


@dataclass
class Run:
    """Everything that lives as long as the run."""

    device: torch.device
    hf_folder: HfFolder
    tokenizer: PreTrainedTokenizerBase
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    phases: tuple[Phase, ...]
    scheduler: OptimizerParamScheduler
    """Of the phase that the run is in."""
    reference: Reference | None
    """None where no phase compares the model with one."""
    batch_sums: dict[str, torch.Tensor] | None
    """What the step before told of its batch, if the loss is to read that (--batch-statistics previous-step)."""
    servers: Servers | None
    """None where samples are drawn in this process, or not at all."""
    workers: RolloutWorkers
    train_prompts: PromptStore
    eval_prompts: PromptStore | None
    order: PromptOrder
    rewrites: Rewrites | None
    """None where no phase rewrites."""
    timings: Timings
    console: Console
    metrics_log: MetricsLog | None
    """None but on rank 0, as `trackers` is empty but there."""
    trackers: list[Tracker]

    @property
    def shape(self) -> ModelShape:
        return self.hf_folder.shape

    @property
    def rewritten_prompts(self) -> RewrittenPrompts:
        assert self.rewrites is not None
        return RewrittenPrompts(self.train_prompts, self.rewrites, decoder(self.tokenizer))

    @property
    def prompts(self) -> PromptStore | RewrittenPrompts:
        """What groups are drawn of."""
        return self.train_prompts if self.rewrites is None else self.rewritten_prompts

    def close(self) -> None:
        with contextlib.ExitStack() as every:  # what fails to close keeps no server running
            if self.metrics_log is not None:
                every.callback(self.metrics_log.close)
            for tracker in self.trackers:
                every.callback(tracker.close)
            every.callback(self.console.close)
            if self.servers is not None:
                every.callback(self.servers.close)
            every.callback(self.workers.close)


def build_run(config: RunConfig) -> tuple[Run, dict[str, Any] | None]:
    """Join the ranks, read the data, build and fill the model. The second value is the state to resume from, if any.

    Raises:
        ValueError, CheckpointError: in one line, what is wrong with which flag, file or row.
    """
    phases = resolve_phases(config)
    overrides = megatron_fields(config.model.megatron)
    hf_folder = HfFolder(config.model.hf_checkpoint)
    require_divisible(hf_folder.shape, config.parallel)
    if not config.model.random_init and config.model.pretrained_checkpoint is None:
        hf_folder.check_weights()
    tokenizer = _load_tokenizer(hf_folder, config.data.seq_length)
    device = initialize(config.parallel, config.optimizer.seed)
    is_main = dist.get_rank() == 0
    run_dir = Path(config.output.run_dir)
    console = build_console(train_iters=phases[-1].end, log_every=config.output.log_interval, quiet=not is_main)
    try:
        return _build_run(config, phases, overrides, hf_folder, tokenizer, device, console, run_dir)
    except BaseException:
        console.close()
        raise


def _build_run(
    config: RunConfig,
    phases: tuple[Phase, ...],
    overrides: dict[str, dict[str, Any]],
    hf_folder: HfFolder,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    console: Console,
    run_dir: Path,
) -> tuple[Run, dict[str, Any] | None]:
    shape = hf_folder.shape
    checkpoint, warning = on_rank_zero(lambda: _find_start(config, run_dir))
    if warning:
        console.warning(warning)
    train_prompts = _prompts(
        config,
        config.data.prompt_data,
        "train",
        tokenizer,
        shape,
        run_dir,
        console,
        needs_token_groups=any(phase.config.groups_from_data for phase in phases),
        needs_experts=any(phase.config.rollout.hint_segments for phase in phases),
    )
    eval_prompts = None
    if config.data.eval_prompt_data:
        eval_prompts = _prompts(config, config.data.eval_prompt_data, "eval", tokenizer, shape, run_dir, console)

    vocab_size = padded_vocab_size(shape, config.model, config.parallel)
    megatron_config = transformer_config(shape, config.model, config.parallel, overrides["transformer"])
    chunks = build_chunks(
        shape, megatron_config, vocab_size=vocab_size, max_sequence_length=config.data.seq_length, device=device
    )
    if config.optimizer.fused_linear_loss:
        return_hidden_states(chunks, megatron_config, overrides["ddp"])
    if not config.model.random_init and checkpoint is None:
        _load_start(config, hf_folder, chunks, vocab_size, console)
    reference = None
    if any(phase.config.needs_reference for phase in phases):
        reference = _reference(config, hf_folder, chunks, vocab_size, console)
    wrapped = wrap_in_ddp(chunks, megatron_config, config.parallel, overrides["ddp"])
    # Read by Megatron's schedules for logging only; the number of micro-batches is given to each call.
    init_num_microbatches_calculator(dist.get_rank(), None, 1, 1, 1)
    optimizer = build_optimizer(
        wrapped, config.optimizer, config.parallel, bf16=config.model.bf16, overrides=overrides["optimizer"]
    )
    order = PromptOrder(len(train_prompts), config.optimizer.seed, fingerprint=train_prompts.fingerprint)
    saved = None
    if checkpoint is not None:
        console.info(f"resuming from {checkpoint}")
        saved, warnings = load_checkpoint(checkpoint, wrapped, optimizer)
        for text in warnings:
            console.warning(text)
        order.load_state_dict(saved["order"])

    is_main = dist.get_rank() == 0
    step = saved["progress"]["iteration"] if saved else 0
    phase = phase_at(phases, step)
    scheduler = build_scheduler(optimizer, phase.config.optimizer)
    if saved and phase_of(saved) == phase.index:
        scheduler.load_state_dict(saved["scheduler"])
    elif phase.reset_optimizer:
        reset_optimizer(optimizer)
    collects_samples = any(phase.config.group_sizes.n_self for phase in phases)
    evaluates = eval_prompts is not None and config.output.eval_interval > 0
    rewrites = any(phase.config.rewrite.rewrite_interval for phase in phases)
    draws_samples = collects_samples or evaluates or rewrites
    servers = None
    if draws_samples and config.engine.rollout_engine == "sglang":
        servers = find_servers(config, console)
    bank = None
    if collects_samples:
        bank = open_bank(phases, train_prompts, console, iteration=step, of_replicas=servers is not None)
    run = Run(
        device=device,
        hf_folder=hf_folder,
        tokenizer=tokenizer,
        chunks=wrapped,
        optimizer=optimizer,
        phases=phases,
        scheduler=scheduler,
        reference=reference,
        batch_sums=saved_sums(saved, phase, device),
        servers=servers,
        workers=build_workers(
            phases, hf_folder, tokenizer, device, servers, console, bank=bank, draws_samples=draws_samples
        ),
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        order=order,
        rewrites=saved_rewrites(phases, saved),
        timings=Timings(),
        console=console,
        metrics_log=MetricsLog(run_dir / "metrics.jsonl", resume_step=step) if is_main else None,
        trackers=build_trackers(config.output.trackers, run_dir, resume_step=step) if is_main else [],
    )
    if saved and "rollouts" in saved:  # a checkpoint from before there was anything of this kind has none
        run.workers.load_state_dict(saved["rollouts"])
        if phase_of(saved) != phase.index:
            run.workers.end_phase()
    return run, saved


def phase_of(saved: dict[str, Any]) -> int:
    """Number of the phase that a checkpoint was written in."""
    return saved.get("phase", 0)  # a checkpoint from before there were phases has none


def saved_rewrites(phases: tuple[Phase, ...], saved: dict[str, Any] | None) -> Rewrites | None:
    if not any(phase.config.rewrite.rewrite_interval for phase in phases):
        return None
    state = saved.get("rewrites") if saved else None
    return Rewrites() if state is None else Rewrites.from_state(state)


def saved_sums(saved: dict[str, Any] | None, phase: Phase, device: torch.device) -> dict[str, torch.Tensor] | None:
    if (
        not phase.config.reads_step_before
        or not saved
        or phase_of(saved) != phase.index
        or saved.get("batch_sums") is None
    ):
        return None
    sums = saved["batch_sums"].items()
    return {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in sums}


def _find_start(config: RunConfig, run_dir: Path) -> tuple[Path | None, str | None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, run_dir / "config.yaml")
    if config.model.hf_export is not None:
        refuse_to_replace_what_is_not_ours(Path(config.model.hf_export).resolve(), flag="--hf-export")
    found = find_checkpoint(config.checkpoint_dir)
    if found[0] is None and config.output.load is not None:
        found = find_checkpoint(Path(config.output.load))
        if found[0] is None:
            raise ValueError(f"--load {config.output.load}: there is no checkpoint")
    return found


def _load_tokenizer(hf_folder: HfFolder, seq_length: int) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_folder.path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--hf-checkpoint {hf_folder.path}: no tokenizer: {' '.join(str(error).split())[:200]}"
        ) from None
    if len(tokenizer) > hf_folder.shape.vocab_size:
        raise ValueError(
            f"--hf-checkpoint {hf_folder.path}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{hf_folder.shape.vocab_size}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--hf-checkpoint {hf_folder.path}: the tokenizer has no end-of-sequence token")
    if seq_length > hf_folder.shape.max_position_embeddings:
        raise ValueError(
            f"--seq-length {seq_length} exceeds the model's {hf_folder.shape.max_position_embeddings} positions"
        )
    return tokenizer


def _prompts(
    config: RunConfig,
    files: tuple[str, ...],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    shape: ModelShape,
    run_dir: Path,
    console: Console,
    *,
    needs_token_groups: bool = False,
    needs_experts: bool = False,
) -> PromptStore:
    store = run_dir / f"{name}_prompts.arrow"

    def prepare() -> PromptStoreInfo:
        with console.stage(f"reading {name} data", unit="rows") as advance:
            return prepare_prompts(
                files,
                tokenizer,
                store_path=store,
                quarantine_path=run_dir / f"{name}_quarantine.jsonl",
                max_prompt_length=config.max_prompt_length,
                max_response_length=config.rollout.rollout_max_response_len,
                vocab_size=shape.vocab_size,
                max_bad_row_frac=config.data.max_bad_row_frac,
                eta=config.data.eta,
                progress=advance,
            )

    info = on_rank_zero(prepare)
    console.info(
        f"{name} data: {info.num_rows} prompts with {info.num_expert} expert and {info.num_teacher} teacher responses, "
        f"{info.num_bad_rows} bad rows" + (f" (see {info.quarantine_path})" if info.num_bad_rows else "")
    )
    if needs_token_groups and info.num_scored < info.num_expert + info.num_teacher:
        raise ValueError(
            f"{info.num_expert + info.num_teacher - info.num_scored} recorded responses have no token_scores, which a "
            f"loss of this run needs: write them with tools/score_tokens.py, or add --token-scores excess"
        )
    if needs_experts and not info.num_expert:
        raise ValueError("--hint-segments: no training row has an expert's response that a hint could be taken from")
    prompts = PromptStore(store)
    if prompts.fingerprint != info.fingerprint:
        raise ValueError(
            f"{store} is another file here than on rank 0: --run-dir has to be on a disk that all nodes see"
        )
    return prompts


def _load_start(
    config: RunConfig, hf_folder: HfFolder, chunks: list[torch.nn.Module], vocab_size: int, console: Console
) -> None:
    """Fill the model with the weights that training starts from."""
    pretrained = config.model.pretrained_checkpoint
    console.info(f"loading {pretrained or hf_folder.path}")
    source = hf_folder if pretrained is None else MegatronWeights(Path(pretrained), hf_folder.shape)
    load_weights(chunks, source, padded_vocab_size=vocab_size)


def _reference(
    config: RunConfig, hf_folder: HfFolder, chunks: list[torch.nn.Module], vocab_size: int, console: Console
) -> Reference:
    path = config.model.ref_hf_checkpoint
    if path is None:
        return Reference(chunks, lambda: _load_start(config, hf_folder, chunks, vocab_size, console))
    folder = HfFolder(path)
    if folder.shape != hf_folder.shape:
        differing = [
            f"{f.name} {getattr(folder.shape, f.name)}, not {getattr(hf_folder.shape, f.name)}"
            for f in dataclasses.fields(folder.shape)
            if getattr(folder.shape, f.name) != getattr(hf_folder.shape, f.name)
        ]
        raise ValueError(
            f"--ref-hf-checkpoint {path}: its weights change places with the model's, so it has to be of the same "
            f"shape; it has {', '.join(differing)}"
        )
    folder.check_weights()
    console.info(f"loading the reference {folder.path}")
    return Reference(chunks, lambda: load_weights(chunks, folder, padded_vocab_size=vocab_size))
