"""The run: rollout, optimizer steps, evaluation, checkpoint, again. It reads as the method.

What a run is made of is built in setup.py; each stage is a file of its own.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gft_megatron.config import RunConfig
from gft_megatron.groups import Batch, Source
from gft_megatron.losses import response_figures
from gft_megatron.observe.console import SampleRow
from gft_megatron.phases import Phase, phase_at
from gft_megatron.rewriting import write_rewrites
from gft_megatron.rollout.hints import Hints
from gft_megatron.rollout.outcome import Rollout, rollout_metrics, trained_part
from gft_megatron.rollout.recipe import GroupRecipe
from gft_megatron.training.checkpoint import layout, oldest_checkpoint, save_checkpoint
from gft_megatron.training.exchange import max_over_ranks
from gft_megatron.training.optimizer import build_scheduler, reset_optimizer
from gft_megatron.training.prepare import prepare_steps, with_kl_in_rewards
from gft_megatron.training.rollouts import RolloutPlan
from gft_megatron.training.setup import Run, build_run
from gft_megatron.training.step import Objective, StepResult, train_step
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
    # What there is by now stays. Left to the garbage collector, going through all the modules stops the requests of a
    # rollout for some tenths of a second, again and again.
    gc.freeze()
    try:
        return _train(config, run, saved)
    finally:
        run.close()


def _train(config: RunConfig, run: Run, saved: dict[str, Any] | None) -> dict[str, Any]:
    progress = Progress(**saved["progress"]) if saved else Progress()
    evaluations: dict[str, dict[str, float]] = saved["evaluations"] if saved else {}
    phase = phase_at(run.phases, progress.iteration)
    if not saved:
        _evaluate(config, run, phase, progress, evaluations)
    while progress.iteration < run.phases[-1].end:
        if progress.iteration == phase.end:
            phase = _enter(run, run.phases[phase.index + 1])
        before = progress.iteration
        rollout = _collect(phase, run, progress)
        _update(phase, run, progress, rollout)
        run.workers.mark_trained(rollout, progress.iteration)
        progress.rollout_id += 1
        _rewrite(phase, run, progress, before)
        at_end = progress.iteration == run.phases[-1].end
        if _is_due(before, progress.iteration, config.output.eval_interval, at_end):
            _evaluate(config, run, phase, progress, evaluations)
            _show_samples(run, progress, rollout)
        if _is_due(before, progress.iteration, config.output.save_interval, at_end):
            _save(config, run, phase, progress, evaluations)
    return _finish(config, run, progress, evaluations)


def _enter(run: Run, phase: Phase) -> Phase:
    """What a resumed run does too when its checkpoint is of the end of the phase before (setup.py)."""
    run.console.info(f"phase {phase.index + 1} of {len(run.phases)}: {phase.name}, steps {phase.start + 1}-{phase.end}")
    run.scheduler = build_scheduler(run.optimizer, phase.config.optimizer)
    run.batch_sums = None
    run.workers.end_phase()
    if phase.reset_optimizer:
        reset_optimizer(run.optimizer)
    return phase


def _collect(phase: Phase, run: Run, progress: Progress) -> Rollout:
    step = progress.iteration - phase.start
    config, recipe = phase.config, _recipe(phase.config, step)
    if recipe.n_self and not run.workers.num_ahead:
        _update_weights(run, progress)
    with run.timings.measure("rollout"):
        rollout = run.workers.collect(_plan(phase, run, step, progress.rollout_id), version=progress.iteration)
    run.timings.add("generate", rollout.counts.generate_sec)
    run.timings.add("reward", rollout.counts.reward_sec)
    _collect_ahead(phase, run, progress)
    if config.engine.colocate and recipe.n_self:
        with run.timings.measure("update_weights"):
            run.workers.release_memory()
    if config.loss.kl_in == "loss" or not config.changes("kl_coef"):
        return rollout
    assert run.reference is not None
    with run.timings.measure("ref_log_probs"):
        shaped = with_kl_in_rewards(
            rollout.collected,
            config,
            recipe,
            run.chunks,
            _objective(phase, run, step),
            run.reference,
            coefficient=config.value_at("kl_coef", step),
        )
    # Which groups are left out, and for how many others were drawn, is a matter of the rewards alone.
    rules = config.rollout_rules
    trained = trained_part(
        shaped,
        skip_zero_variance=rules.skip_zero_variance,
        mask_truncated=rules.mask_truncated,
        advantages=rollout.collected.advantages,
    )
    return dataclasses.replace(rollout, trained=trained)


def _collect_ahead(phase: Phase, run: Run, progress: Progress) -> None:
    """Let the servers draw the next rollouts while this one is trained on; --max-staleness says how many."""
    config = phase.config
    if not config.rollouts_ahead or not config.group_sizes.n_self:
        return
    _update_weights(run, progress)
    while run.workers.num_ahead < config.rollouts_ahead:
        rollouts_before = 1 + run.workers.num_ahead
        step = progress.iteration - phase.start + rollouts_before * config.steps_per_rollout
        if step >= config.train_iters:
            return
        run.workers.start(_plan(phase, run, step, progress.rollout_id + rollouts_before))


def _plan(phase: Phase, run: Run, step: int, rollout_id: int) -> RolloutPlan:
    """The rollout that step `step` of the phase, counted from 0, starts with."""
    config = phase.config
    return RolloutPlan(rollout_id, run.prompts, run.order, _recipe(config, step), config.rollout_rules)


def _recipe(config: RunConfig, step: int) -> GroupRecipe:
    """Of the groups that step `step` of the phase, counted from 0, starts with."""
    rollout = config.rollout
    hints = Hints(rollout.hint_segments, config.value_at("hint_share", step)) if rollout.hint_segments else None
    return GroupRecipe(
        **config.group_sizes._asdict(),
        sampling=config.sampling,
        needs_advantages=config.needs_advantages,
        advantage_normalization=rollout.advantage_normalization,
        advantage_ddof=rollout.advantage_ddof,
        compare_own_source=config.compares_own_source,
        overlong_buffer_len=rollout.overlong_buffer_len,
        hints=hints,
    )


def _objective(phase: Phase, run: Run, step: int) -> Objective:
    """What step `step` of the phase, counted from 0, minimises."""
    config = phase.config
    return Objective(
        loss=config.loss_function,
        hyper=config.hyper_at(step),
        temperature=config.rollout.rollout_temperature,
        vocab_size=run.shape.vocab_size,
        tells_batch_sums=config.reads_step_before,
        fused_linear_loss=config.optimizer.fused_linear_loss,
    )


def _update_weights(run: Run, progress: Progress) -> None:
    with run.timings.measure("update_weights"):
        tensors = export_hf_tensors(run.chunks, run.shape, to_rank_zero=run.servers is not None)
        run.workers.update_weights(tensors, version=progress.iteration)


def _update(phase: Phase, run: Run, progress: Progress, rollout: Rollout) -> None:
    """The optimizer steps of one rollout."""
    config = phase.config
    first = _objective(phase, run, progress.iteration - phase.start)
    steps = prepare_steps(rollout.trained, config, run.chunks, first, run.reference, run.timings)
    metrics = rollout_metrics(rollout) | run.workers.engine_figures()
    for prepared in steps:
        objective = _objective(phase, run, progress.iteration - phase.start)
        result = train_step(run.chunks, run.optimizer, run.scheduler, prepared.inputs, objective, batch=run.batch_sums)
        if (tell := response_figures(objective.loss)) is not None:
            told = tell(result.figures.sample_nll, run.batch_sums, **objective.hyper)
            metrics |= {f"train/{name}": value for name, value in told.items()}
        if run.rewrites is not None:
            batch = prepared.mini_batch
            run.rewrites.observe(batch.rows, batch.responses, result.figures.sample_nll)
        run.batch_sums = result.figures.sums
        progress.iteration += 1
        progress.samples_seen += prepared.mini_batch.num_samples
        progress.tokens_seen += result.figures.num_tokens
        changing = {name: value for name, value in objective.hyper.items() if name in config.schedules}
        metrics |= {f"train/{name}": value for name, value in changing.items()}
        _log_step(run, progress, metrics, prepared.mini_batch, len(prepared.inputs), result)
        metrics = {}  # a rollout's own figures belong to its first step
        if progress.iteration == phase.end:
            return


def _rewrite(phase: Phase, run: Run, progress: Progress, before: int) -> None:
    """Replace the recorded responses that fit the policy worst, if that is due."""
    config = phase.config
    if run.rewrites is None or not config.rewrites_between(before - phase.start, progress.iteration - phase.start):
        return
    _update_weights(run, progress)
    name = f"rewrite/{progress.iteration}"
    with run.timings.measure("rewrite"):
        places = run.rewrites.choose(
            share=config.rewrite.rewrite_share,
            probability=config.rewrite.rewrite_probability,
            seed=f"{config.optimizer.seed}/{name}",
        )
        found = run.workers.rewrite(run.train_prompts, places, config.rewrite_sampling, name=name)
        for place, token_ids in zip(places, found, strict=True):
            run.rewrites.put(place, token_ids)
    if dist.get_rank() == 0:
        write_rewrites(Path(config.output.run_dir) / "rewrites.jsonl", run.rewritten_prompts)
    figures = {
        "rewrite/replaced": float(sum(token_ids is not None for token_ids in found)),
        "rewrite/in_data": float(len(run.rewrites.replaced)),
        "rewrite/refused": float(run.rewrites.refused),
    }
    _record(run, progress.iteration, figures)
    run.console.info(
        f"step {progress.iteration}: of {len(places)} responses that fit the policy worst, "
        f"{figures['rewrite/replaced']:.0f} were rewritten; {len(run.rewrites.replaced)} in all"
    )


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
        **{f"train/{name}": value for name, value in result.figures.metrics.items()},
        "train/lr": result.lr,
        "train/num_tokens": float(result.figures.num_tokens),
        "train/num_micro_batches": float(num_micro_batches),
        "train/tokens_per_sec": float(mini_batch.lengths.sum()) / training_sec,
        "memory/peak_gib": peak_memory,
        **rollout_figures,
        **times,
    }
    _report(run, progress.iteration, figures)


def _report(run: Run, step: int, figures: dict[str, float]) -> None:
    _record(run, step, figures)
    run.console.step(step, figures)


def _record(run: Run, step: int, figures: dict[str, float]) -> None:
    if run.metrics_log is not None:
        run.metrics_log.log(step, figures)
    for tracker in run.trackers:
        tracker.log(step, figures)


def _evaluate(
    config: RunConfig, run: Run, phase: Phase, progress: Progress, evaluations: dict[str, dict[str, float]]
) -> None:
    if run.eval_prompts is None or not config.output.eval_interval:
        return
    _update_weights(run, progress)
    title = f"drawing {config.output.n_samples_per_eval_prompt} samples of {len(run.eval_prompts)} held-out prompts"
    with run.timings.measure("evaluate"), run.console.stage(title):
        figures = run.workers.evaluate(
            run.eval_prompts,
            phase.config.sampling,
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


def _save(
    config: RunConfig, run: Run, phase: Phase, progress: Progress, evaluations: dict[str, dict[str, float]]
) -> None:
    sums = run.batch_sums
    run_state = {
        "progress": dataclasses.asdict(progress),
        "phase": phase.index,
        "batch_sums": None if sums is None else {name: value.tolist() for name, value in sums.items()},
        "order": run.order.state_dict(),
        "rollouts": run.workers.state_dict(),
        "rewrites": None if run.rewrites is None else run.rewrites.state_dict(),
        "evaluations": evaluations,
        "layout": layout(),
    }
    with run.timings.measure("save"), run.workers.at_rest():
        folder = save_checkpoint(
            config.checkpoint_dir,
            progress.iteration,
            run.chunks,
            run.optimizer,
            run.scheduler,
            run_state,
            keep_last=config.output.keep_last,
        )
    run.workers.compact(oldest_checkpoint(config.checkpoint_dir))
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
        from gft_megatron.observe.report import write_curves  # matplotlib, for the one rank that draws

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
