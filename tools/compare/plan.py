"""Which commands the comparison consists of.

For every seed: data, a tiny model, and its warm-up. On the tuning seed, which is not reported: each method with each
learning rate of one grid, evaluated on validation problems that were taken out of the training problems. `choose` takes
the best. On the reported seeds: each row with what was chosen, then one evaluation on the held-out problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from compare.job import Job
from compare.methods import SFT, WARMUP, Method, Row, methods, rows

GRID = (5e-5, 1e-4, 2e-4, 3e-4)
TUNING_SEED = 0
NUM_VALIDATION = 184
SAMPLES = 8
_SEQUENCES = 128
_EARLY_STOPS = 12
_METRIC = f"eval/accuracy_avg@{SAMPLES}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison."""

    seeds: int = 3
    """Seeds to report: 1, 2, ... Another one is for choosing learning rates."""
    run_dir: Path = Path("runs/compare")
    """Folder of all runs. Started again, the comparison goes on where it was."""
    steps: int = 300
    """Steps of a method, of 128 sequences each."""
    warmup_steps: int = 900
    """Steps of the warm-up, of 64 sequences each."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it has to be at least 1")

    @property
    def reported_seeds(self) -> range:
        return range(TUNING_SEED + 1, TUNING_SEED + 1 + self.seeds)


@dataclass(frozen=True)
class Choice:
    """What the validation problems decided."""

    lr: dict[str, float]
    """Of each method."""
    early_lr: float
    early_step: int
    """Of SFT that stops early."""

    def schedule(self, row: Row, steps: int) -> tuple[float, int]:
        """Learning rate and number of steps of a row that trains."""
        assert row.method is not None
        return (self.early_lr, self.early_step) if row.early else (self.lr[row.method.name], row.length * steps)


def warmup_job(settings: Comparison, seed: int) -> Job:
    """The model that every method of this seed starts from."""
    data, model = _data_job(seed), _model_job(seed)
    flags = ["--loss", "sft", "--n-expert", 1, "--n-teacher", 1, "--n-self", 0]
    flags += ["--rollout-batch-size", 640, "--num-steps-per-rollout", 10, "--train-iters", settings.warmup_steps]
    flags += ["--lr", 3e-3, "--min-lr", 3e-4, "--lr-warmup-iters", 20, "--eval-interval", 0]
    flags += ["--hf-checkpoint", _in(model), "--prompt-data", _in(data, "warmup.jsonl")]
    return _train(
        f"{_place(seed)}/{WARMUP}", seed, flags, seconds=10 + 0.058 * settings.warmup_steps, needs=(data, model)
    )


def tuning_jobs(settings: Comparison) -> dict[str, dict[float, Job]]:
    """By the method's name and by learning rate."""
    warmup = warmup_job(settings, TUNING_SEED)
    return {method.name: {lr: _tuning_job(settings, method, lr, warmup) for lr in GRID} for method in methods()}


def choose(settings: Comparison, jobs: dict[str, dict[float, Job]]) -> tuple[Choice, dict[str, dict[float, float]]]:
    """The learning rate with the best avg@8 on the validation problems, the smaller of two equal ones; for SFT that
    stops early, also the step. The second value is that avg@8, by method and learning rate."""
    evaluations = {
        name: {lr: _evaluations(settings.run_dir / job.folder) for lr, job in by_lr.items()}
        for name, by_lr in jobs.items()
    }
    last = {name: {lr: by_step[max(by_step)] for lr, by_step in by_lr.items()} for name, by_lr in evaluations.items()}
    best = {name: max(by_lr, key=lambda lr, by_lr=by_lr: (by_lr[lr], -lr)) for name, by_lr in last.items()}
    stops = {(lr, step): figure for lr, by_step in evaluations[SFT.name].items() for step, figure in by_step.items()}
    early_lr, early_step = max(stops, key=lambda stop: (stops[stop], -stop[1], -stop[0]))
    return Choice(best, early_lr, early_step), last


def reported_jobs(settings: Comparison, choice: Choice, seed: int) -> dict[str, Job]:
    """The runs of one seed by the names of their rows."""
    jobs = {WARMUP: warmup_job(settings, seed)}
    for row in rows():
        if row.method is None:
            continue
        lr, steps = choice.schedule(row, settings.steps)
        jobs[row.name] = _method_job(
            f"{_place(seed)}/{row.name}",
            seed,
            row.method,
            jobs[row.start],
            lr=lr,
            steps=steps,
            # A run that stops early is the beginning of the whole one.
            decay_steps=settings.steps if row.early else steps,
            flags=["--eval-interval", 0],
        )
    return jobs


def evaluation_job(runs: dict[str, Job], seed: int) -> Job:
    """Figures of all models of one seed, the first and only time that the held-out problems are looked at."""
    data = _data_job(seed)
    command = ("{python}", "tools/compare/evaluate.py", "--output", f"{{run}}/{_place(seed)}/evaluation/figures.json")
    command += ("--test", _in(data, "test.jsonl"), "--train", _in(data, "train.jsonl"), "--samples", str(SAMPLES))
    command += ("--models", *(_in(job, "hf") for job in runs.values()))
    return Job(
        f"{_place(seed)}/evaluation", command, "figures.json", seconds=5 + 3 * len(runs), needs=(data, *runs.values())
    )


def with_needs(jobs: Iterable[Job]) -> list[Job]:
    """These jobs and all that they build on, each once and after what it needs."""
    found: dict[Job, None] = {}
    for job in jobs:
        found |= dict.fromkeys([*with_needs(job.needs), job])
    return list(found)


def _place(seed: int) -> str:
    return "tuning" if seed == TUNING_SEED else f"seed-{seed}"


def _in(job: Job, file: str | None = None) -> str:
    return "/".join(["{run}", job.folder, *([file] if file else [])])


def _data_job(seed: int) -> Job:
    folder = f"{_place(seed)}/data"
    command = ("{python}", "tools/prepare_data.py", "countdown", "--output-dir", f"{{run}}/{folder}")
    command += ("--seed", str(seed), "--validation", str(NUM_VALIDATION))
    return Job(folder, command, "test.jsonl", seconds=2)


def _scores_job(seed: int) -> Job:
    data = _data_job(seed)
    folder = f"{_place(seed)}/scored"
    command = ("{python}", "tools/score_tokens.py", "tfidf", "--input", _in(data, "train.jsonl"))
    command += ("--output", f"{{run}}/{folder}/train.jsonl", "--hf-checkpoint", _in(_model_job(seed)))
    return Job(folder, command, "train.jsonl", seconds=5, needs=(data, _model_job(seed)))


def _model_job(seed: int) -> Job:
    folder = f"{_place(seed)}/tiny-model"
    command = ("{python}", "tools/make_tiny_model.py", "--output", f"{{run}}/{folder}", "--seed", str(seed))
    command += ("--characters", "0123456789+-*=,:", "--hidden-size", "96", "--num-layers", "3")
    command += ("--intermediate-size", "256", "--max-position-embeddings", "32")
    return Job(folder, command, "tokenizer.json", seconds=4)


def _tuning_job(settings: Comparison, method: Method, lr: float, warmup: Job) -> Job:
    # Only SFT's evaluations on the way are used: they choose where to stop early.
    interval = max(settings.steps // _EARLY_STOPS, 1) if method is SFT else settings.steps
    return _method_job(
        f"tuning/{method.name}-lr{lr:g}",
        TUNING_SEED,
        method,
        warmup,
        lr=lr,
        steps=settings.steps,
        decay_steps=settings.steps,
        flags=["--eval-prompt-data", _in(_data_job(TUNING_SEED), "validation.jsonl"), "--eval-interval", interval],
    )


def _method_job(
    folder: str, seed: int, method: Method, start: Job, *, lr: float, steps: int, decay_steps: int, flags: list[object]
) -> Job:
    data = _scores_job(seed) if method.scored else _data_job(seed)
    of_group = [
        value for pair in zip(("--n-expert", "--n-teacher", "--n-self"), method.group, strict=True) for value in pair
    ]
    return _train(
        folder,
        seed,
        [
            *("--loss", method.loss, *method.hyper, *of_group),
            *("--rollout-batch-size", _SEQUENCES // sum(method.group)),
            *("--train-iters", steps, "--lr", lr, "--lr-decay-iters", decay_steps, "--lr-warmup-iters", 10),
            *("--hf-checkpoint", _in(start, "hf"), "--prompt-data", _in(data, "train.jsonl")),
            *flags,
        ],
        seconds=10 + steps * (0.1 + 0.005 * method.group[2]),
        needs=(data, start),
    )


def _train(folder: str, seed: int, flags: list[object], *, seconds: float, needs: tuple[Job, ...]) -> Job:
    launcher = ("{python}", "-m", "torch.distributed.run", "--nproc-per-node", "1")
    launcher += ("--master-addr", "127.0.0.1", "--master-port", "{port}", "examples/pretrain_gft.py")
    common = ["--run-dir", f"{{run}}/{folder}", "--hf-export", f"{{run}}/{folder}/hf", "--seed", seed]
    common += ["--make-vocab-size-divisible-by", 4, "--seq-length", 32, "--max-tokens-per-gpu", 2048]
    common += ["--rollout-max-response-len", 6, "--rm-type", "examples/countdown_reward.py:score"]
    common += ["--n-samples-per-eval-prompt", SAMPLES, "--lr-decay-style", "cosine", "--adam-beta2", 0.95]
    # No checkpoints: a run takes less than two minutes, and a broken one starts again.
    common += ["--save-interval", 0, "--log-interval", 50, "--trackers"]
    return Job(folder, (*launcher, *map(str, flags), *map(str, common)), "results.json", seconds=seconds, needs=needs)


def _evaluations(folder: Path) -> dict[int, float]:
    """avg@8 on the validation problems by step, of the trained model only."""
    content = json.loads((folder / "results.json").read_text())["evaluations"]
    return {int(step): figures[_METRIC] for step, figures in content.items() if int(step) > 0}
