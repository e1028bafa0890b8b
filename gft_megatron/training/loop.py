"""The run: rollout, optimizer steps, evaluation, checkpoint, again. It reads as the method.

What a run is made of is built in setup.py; each stage is a file of its own.
"""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gft_megatron.config import RunConfig
from gft_megatron.groups import Batch, Source
from gft_megatron.observe.console import SampleRow
from gft_megatron.observe.report import write_curves
from gft_megatron.training.checkpoint import layout, save_checkpoint
from gft_megatron.training.exchange import max_over_ranks
from gft_megatron.training.micro_batches import pack_for_this_replica, split_over_steps
from gft_megatron.training.rollouts import Rollout, rollout_metrics
from gft_megatron.training.setup import Run, build_run
from gft_megatron.training.step import StepResult, forward_log_probs, train_step
from gft_megatron.training.weights import export_hf_folder, export_hf_tensors

_SAMPLES_SHOWN = 2


@dataclasses.dataclass
class Progress:
    """Where a run is; all of it is in every checkpoint."""

    iteration: int = 0
    """Optimizer steps done."""
    rollout_id: int = 0
    """Rollouts done."""
    samples_seen: int = 0
    tokens_seen: int = 0


def train(config: RunConfig) -> dict[str, Any]:
    """Run to --train-iters, from the newest checkpoint if there is one. Returns what RUN_DIR/results.json holds."""
    run, saved = build_run(config)
    try:
        return _train(config, run, saved)
    finally:
        run.close()


def _train(config: RunConfig, run: Run, saved: dict[str, Any] | None) -> dict[str, Any]:
    progress = Progress(**saved["progress"]) if saved else Progress()
    evaluations: dict[str, dict[str, float]] = saved["evaluations"] if saved else {}
    if not saved:
        _evaluate(config, run, progress, evaluations)
    while progress.iteration < config.optimizer.train_iters:
        before = progress.iteration
        rollout = _collect(config, run, progress)
        _update(config, run, progress, rollout)
        progress.rollout_id += 1
        at_end = progress.iteration == config.optimizer.train_iters
        if _is_due(before, progress.iteration, config.output.eval_interval, at_end):
            _evaluate(config, run, progress, evaluations)
            _show_samples(run, progress, rollout)
        if _is_due(before, progress.iteration, config.output.save_interval, at_end):
            _save(config, run, progress, evaluations)
    return _finish(config, run, progress, evaluations)


def _collect(config: RunConfig, run: Run, progress: Progress) -> Rollout:
    if run.recipe.n_self:
        _update_weights(run, progress)
    with run.timings.measure("rollout"):
        rollout = run.workers.collect(
            run.train_prompts,
            run.order,
            run.recipe,
            num_groups=config.rollout.rollout_batch_size,
            skip_zero_variance=config.rollout.skip_zero_variance and run.recipe.needs_advantages,
            refill=config.rollout.refill_groups,
            rollout_id=progress.rollout_id,
        )
    run.timings.add("generate", rollout.counts.generate_sec)
    run.timings.add("reward", rollout.counts.reward_sec)
    return rollout


def _update_weights(run: Run, progress: Progress) -> None:
    with run.timings.measure("update_weights"):
        run.workers.update_weights(export_hf_tensors(run.chunks, run.shape), version=progress.iteration)


def _update(config: RunConfig, run: Run, progress: Progress, rollout: Rollout) -> None:
    """The optimizer steps of one rollout."""
    mini_batches = list(split_over_steps(rollout.trained, config.optimizer))
    packed = [
        pack_for_this_replica(
            mini_batch,
            config.parallel,
            max_tokens=config.max_tokens_per_micro_batch,
            max_sequences=config.optimizer.micro_batch_size,
        )
        for mini_batch in mini_batches
    ]
    old: list[list[torch.Tensor] | None] = [None] * len(packed)
    # With one step a rollout, the policy that is updated is the one that drew the samples: their ratio is 1.
    if len(packed) > 1 and "old_log_probs" in run.required_inputs:
        with run.timings.measure("old_log_probs"):
            old = [forward_log_probs(run.chunks, micro_batches, run.objective) for micro_batches in packed]
    metrics = rollout_metrics(rollout)
    for mini_batch, micro_batches, old_log_probs in zip(mini_batches, packed, old, strict=True):
        result = train_step(
            run.chunks, run.optimizer, run.scheduler, micro_batches, run.objective, old_log_probs=old_log_probs
        )
        progress.iteration += 1
        progress.samples_seen += mini_batch.num_samples
        progress.tokens_seen += result.num_tokens
        _log_step(run, progress, metrics, mini_batch, len(micro_batches), result)
        metrics = {}  # a rollout's own figures belong to its first step
        if progress.iteration == config.optimizer.train_iters:
            return


def _log_step(
    run: Run,
    progress: Progress,
    rollout_figures: dict[str, float],
    mini_batch: Batch,
    num_micro_batches: int,
    result: StepResult,
) -> None:
    run.timings.add("forward_backward", result.forward_backward_sec)
    run.timings.add("optimizer", result.optimizer_sec)
    times = run.timings.pop()
    # Since the step before, so an evaluation or a save in between is in it: neither trains on a token.
    training_sec = times["time/step_sec"] - times.get("time/evaluate_sec", 0.0) - times.get("time/save_sec", 0.0)
    (peak_memory,) = max_over_ranks([_peak_memory_gib()])
    figures = {
        **{f"train/{name}": value for name, value in result.metrics.items()},
        "train/lr": result.lr,
        "train/num_tokens": float(result.num_tokens),
        "train/num_micro_batches": float(num_micro_batches),
        "train/tokens_per_sec": float(mini_batch.lengths.sum()) / training_sec,
        "memory/peak_gib": peak_memory,
        **rollout_figures,
        **times,
    }
    _report(run, progress.iteration, figures)


def _report(run: Run, step: int, figures: dict[str, float]) -> None:
    if run.metrics_log is not None:
        run.metrics_log.log(step, figures)
    for tracker in run.trackers:
        tracker.log(step, figures)
    run.console.step(step, figures)


def _evaluate(config: RunConfig, run: Run, progress: Progress, evaluations: dict[str, dict[str, float]]) -> None:
    if run.eval_prompts is None or not config.output.eval_interval:
        return
    _update_weights(run, progress)
    title = f"drawing {config.output.n_samples_per_eval_prompt} samples of {len(run.eval_prompts)} held-out prompts"
    with run.timings.measure("evaluate"), run.console.stage(title):
        figures = run.workers.evaluate(
            run.eval_prompts,
            run.recipe.sampling,
            num_samples=config.output.n_samples_per_eval_prompt,
            name=f"eval/{progress.iteration}",
        )
    evaluations[str(progress.iteration)] = figures
    _report(run, progress.iteration, figures)


def _show_samples(run: Run, progress: Progress, rollout: Rollout) -> None:
    """A group of the last rollout as text: what no curve tells."""
    group = next(iter(rollout.own_groups), None)
    if group is None:  # not every rank collects, and fewer prompts than ranks leave some without
        return
    prompt = run.tokenizer.decode(group.prompt.token_ids)
    own = [sample for sample in group.samples if sample.source == Source.SELF]
    run.console.show_samples(
        progress.iteration, [SampleRow(prompt, sample.text, sample.reward) for sample in own[:_SAMPLES_SHOWN]]
    )


def _save(config: RunConfig, run: Run, progress: Progress, evaluations: dict[str, dict[str, float]]) -> None:
    run_state = {
        "progress": dataclasses.asdict(progress),
        "order": run.order.state_dict(),
        "evaluations": evaluations,
        "layout": layout(),
    }
    with run.timings.measure("save"):
        folder = save_checkpoint(
            config.checkpoint_dir,
            progress.iteration,
            run.chunks,
            run.optimizer,
            run.scheduler,
            run_state,
            keep_last=config.output.keep_last,
        )
    run.console.info(f"saved {folder}")


def _finish(
    config: RunConfig, run: Run, progress: Progress, evaluations: dict[str, dict[str, float]]
) -> dict[str, Any]:
    if config.model.hf_export is not None:
        export_hf_folder(run.chunks, run.hf_folder, Path(config.model.hf_export))
        run.console.info(f"wrote the Hugging Face folder {config.model.hf_export}")
    run_dir = Path(config.output.run_dir)
    results = {
        "iterations": progress.iteration,
        "evaluations": evaluations,
        "run_dir": str(run_dir),
        "checkpoint_dir": str(config.checkpoint_dir) if config.output.save_interval else None,
        "hf_dir": config.model.hf_export,
        "curves": str(run_dir / "curves.png"),
    }
    if dist.get_rank() == 0:
        write_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
        (run_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        run.console.info(f"curves: {run_dir / 'curves.png'}")
    return results


def _is_due(before: int, now: int, interval: int, at_end: bool) -> bool:
    """A rollout may take several steps, so an interval is due when it has been passed."""
    return interval > 0 and (at_end or before // interval < now // interval)


def _peak_memory_gib() -> float:
    """Of this rank: device memory on a GPU, resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
