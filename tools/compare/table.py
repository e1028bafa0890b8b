"""The outcome as numbers and as text: means over seeds, standard errors, and differences in standard errors."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compare.methods import GRPO, GRPO_LONG, SFT, WARMUP, Row, rows
from compare.plan import GRID, NUM_VALIDATION, SAMPLES, TUNING_SEED, Choice, Comparison

from gft_megatron.observe.metrics import read_metrics

Figures = dict[str, dict[int, dict[str, float]]]
"""By row, seed and name of the figure."""

AVG, PASS = f"avg@{SAMPLES}", f"pass@{SAMPLES}"
COLUMNS = {
    AVG: 3,
    PASS: 3,
    "distinct": 2,
    "H": 3,
    "gap": 3,
    "zero-variance": 3,
    "expert NLL": 2,
    "clipped": 2,
}
"""Figures of the table and their decimals."""

# Two-sided 5% points of Student's t by degrees of freedom; beyond, the normal distribution's is near enough.
_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    error: float | None
    """Standard error of the mean; None for one seed."""
    num_seeds: int

    @property
    def in_errors(self) -> float | None:
        """The mean in standard errors."""
        if self.error is None or not self.error:
            return None
        return self.mean / self.error

    @property
    def is_clear(self) -> bool:
        """Different from 0 at the 5% level, if seeds scatter normally."""
        in_errors = self.in_errors
        return in_errors is not None and abs(in_errors) > t95(self.num_seeds)


def t95(num_seeds: int) -> float:
    """How many standard errors a mean over so many seeds has to be away from 0, at the 5% level."""
    return _T95.get(num_seeds - 1, 2.0)


def estimate(values: Sequence[float]) -> Estimate:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def difference(figures: Figures, row: str, other: str, name: str) -> Estimate:
    """Of two rows, seed by seed: both start from the same warm-up and answer the same problems."""
    return estimate([figures[row][seed][name] - figures[other][seed][name] for seed in figures[row]])


def read_figures(settings: Comparison) -> Figures:
    """From the folders of the reported seeds."""
    figures: Figures = {}
    for seed in settings.reported_seeds:
        place = settings.run_dir / f"seed-{seed}"
        for folder, content in json.loads((place / "evaluation" / "figures.json").read_text()).items():
            row = Path(folder).parent.name
            figures.setdefault(row, {})[seed] = _of_model(content) | {"clipped": _clipped_share(place / row)}
    return {row.name: figures[row.name] for row in rows()}


def _of_model(content: dict) -> dict[str, float]:
    test, train = content["test"], content["train"]
    avg, solved = f"eval/accuracy_avg@{SAMPLES}", f"eval/accuracy_pass@{SAMPLES}"
    return {
        AVG: test[avg],
        PASS: test[solved],
        "distinct": test["eval/distinct_correct"],
        "H": test["eval/entropy_mean"],
        "gap": train[avg] - test[avg],
        "zero-variance": train["eval/zero_std_frac"],
        "expert NLL": content["expert_nll"],
    }


def _clipped_share(folder: Path) -> float:
    """Of the steps: gradient norm above --clip-grad 1."""
    norms = [
        record["train/grad_norm"] for record in read_metrics(folder / "metrics.jsonl") if "train/grad_norm" in record
    ]
    return sum(norm > 1.0 for norm in norms) / len(norms)


def markdown(figures: Figures, choice: Choice, tuned: dict[str, dict[float, float]], settings: Comparison) -> str:
    """The table, the differences, and what they say."""
    parts = [_main_table(figures, choice, settings), _legend(settings, choice, tuned)]
    parts += [_difference_table(figures), _reading(figures, settings.seeds)]
    return "\n\n".join(parts) + "\n"


def _main_table(figures: Figures, choice: Choice, settings: Comparison) -> str:
    lines = [["method", "lr", "steps", *COLUMNS]]
    for row in rows():
        lr, steps = (f"{value:g}" for value in choice.schedule(row, settings.steps)) if row.method else ("", "")
        of_seeds = figures[row.name].values()
        cells = [_show(estimate([of[name] for of in of_seeds]), decimals) for name, decimals in COLUMNS.items()]
        lines.append([row.title, lr, steps, *cells])
    return _as_markdown(lines)


def _legend(settings: Comparison, choice: Choice, tuned: dict[str, dict[float, float]]) -> str:
    ends = (GRID[0], GRID[-1])
    at_end = [f"{name} ({lr:g})" for name, lr in choice.lr.items() if lr in ends]
    sentences = [
        f"Held-out countdown problems, {SAMPLES} samples each at temperature 1; mean +- standard error over "
        f"{settings.seeds} seeds (of data, warm-up and training). All seeds have the same problems, so the error says "
        "nothing of others.",
        "SFT (mix) trains on experts and teachers, the other SFT kinds on experts; a fifth of the teachers' answers is "
        "noise. GFT has 1 expert, 3 teacher and 4 own answers a group; recorded only: own answers are not rectified.",
        "distinct: different right answers among the samples of a problem. H: entropy per token of the samples, in "
        "nats. gap: avg on training problems minus avg on held-out ones. zero-variance: share of training problems "
        "whose samples are all right or all wrong, so that group RL learns nothing from them. expert NLL: nats per "
        "token of the expert's answer to held-out problems. clipped: share of the steps whose gradient was clipped.",
        f"Learning rates: the best of {', '.join(f'{lr:g}' for lr in GRID)} for each method by avg@{SAMPLES} on "
        f"{NUM_VALIDATION} validation problems, on seed {TUNING_SEED}, which is not reported. GRPO has GRPO's own in "
        "every row. The early stop is the best step of all of SFT's runs there.",
    ]
    if at_end:
        sentences.append(f"At an end of the grid, so a better one may lie outside: {', '.join(at_end)}.")
    close = [f"{name} {_as_range(by_lr)}" for name, by_lr in tuned.items()]
    sentences.append(f"Validation avg@{SAMPLES}, worst to best learning rate: {', '.join(close)}.")
    return "\n".join(sentences)


def _as_range(by_lr: dict[float, float]) -> str:
    return f"{min(by_lr.values()):.3f}-{max(by_lr.values()):.3f}"


def _references(row: Row) -> tuple[str, str]:
    """The two rows that this one is compared with."""
    return (GRPO.name, GRPO_LONG) if row.start != WARMUP else (SFT.name, GRPO.name)


def _comparisons() -> list[tuple[Row, str]]:
    """Each row and the name of one that it is compared with."""
    return [(row, other) for row in rows() for other in _references(row) if other != row.name]


def _difference_table(figures: Figures) -> str:
    titles = {row.name: row.title for row in rows()}
    lines = [["method", "compared with", AVG, "in errors", PASS, "in errors"]]
    for row, other in _comparisons():
        cells = [row.title, titles[other]]
        for name in (AVG, PASS):
            of = difference(figures, row.name, other, name)
            cells += [_show(of, COLUMNS[name], signed=True), "" if of.in_errors is None else f"{of.in_errors:+.1f}"]
        lines.append(cells)
    return "Differences, seed by seed:\n\n" + _as_markdown(lines)


def _reading(figures: Figures, num_seeds: int) -> str:
    """What the differences support, and no more."""
    if num_seeds < 2:
        return "One seed has no standard error: nothing is shown by the differences."
    titles = {row.name: row.title for row in rows()}
    number = 2 * len(_comparisons())
    sentences = [
        f"With {num_seeds} seeds a difference has to exceed {t95(num_seeds):.1f} standard errors to differ from 0 at "
        f"the 5% level, if seeds scatter normally; of these {number} differences {0.05 * number:.0f} would do so by "
        "chance."
    ]
    for name, other in itertools.product((AVG, PASS), (SFT.name, GRPO.name, GRPO_LONG)):
        of = {row.title: difference(figures, row.name, other, name) for row, to in _comparisons() if to == other}
        above = [title for title, one in of.items() if one.is_clear and one.mean > 0]
        below = [title for title, one in of.items() if one.is_clear and one.mean < 0]
        alike = [title for title, one in of.items() if not one.is_clear]
        parts = (("above", above), ("below", below), ("not told apart", alike))
        said = "; ".join(f"{what}: {', '.join(which)}" for what, which in parts if which)
        sentences.append(f"- {name} against {titles[other]}: {said}.")
    sentences.append("\nThis is one toy task and a model of 0.3M parameters; nothing follows for large ones.")
    return "\n".join(sentences)


def _show(of: Estimate, decimals: int, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{of.mean:{sign}.{decimals}f}" + ("" if of.error is None else f" +- {of.error:.{decimals}f}")


def _as_markdown(lines: list[list[str]]) -> str:
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))
