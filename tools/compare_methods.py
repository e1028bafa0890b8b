"""Compare methods on the countdown task, as a reviewer would want it: examples/compare_methods.sh calls this.

python tools/compare_methods.py --seeds 3 --run-dir runs/compare

Each method trains from the same warm-up with the same number of sequences. Learning rates come from one grid for all,
chosen on validation problems and on a seed that is not reported; held-out problems are looked at once. Two runs at a
time, each on one core. Started again with the same --run-dir, it goes on: finished runs are kept while their flags, and
those of the runs before them, are the same. It does not notice changed code: then take a new folder.

Writes table.md, results.json and compare.png to --run-dir.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time

from compare.job import Job
from compare.lanes import JobFailed, claim, run_jobs
from compare.methods import methods
from compare.picture import draw
from compare.plan import (
    GRID,
    Choice,
    Comparison,
    choose,
    evaluation_job,
    reported_jobs,
    tuning_jobs,
    warmup_job,
    with_needs,
)
from compare.progress import build_progress
from compare.table import COLUMNS, estimate, markdown, read_figures

from gft_megatron.command_line import parse_flags
from gft_megatron.observe.wording import duration


def compare(settings: Comparison) -> str:
    """Run what is missing, write the files, return the text of the table."""
    began = time.monotonic()
    claim(settings.run_dir)
    tuning = tuning_jobs(settings)
    # Warm-ups do not depend on the choice: with them, the cores are busy while the last tuning runs end.
    first = with_needs(
        [
            *(job for by_lr in tuning.values() for job in by_lr.values()),
            *(warmup_job(settings, seed) for seed in settings.reported_seeds),
        ]
    )
    progress = build_progress(list(dict.fromkeys([*first, *_second(settings, _any_choice(settings))])))
    try:
        run_jobs(first, settings.run_dir, progress)
        choice, tuned = choose(settings, tuning)
        progress.say(
            "chosen: "
            + ", ".join(f"{name} {lr:g}" for name, lr in choice.lr.items())
            + f", early stop after {choice.early_step} steps at {choice.early_lr:g}"
        )
        known = set(first)
        run_jobs(first + [job for job in _second(settings, choice) if job not in known], settings.run_dir, progress)
    finally:
        progress.close()
    figures = read_figures(settings)
    text = markdown(figures, choice, tuned, settings)
    results = {
        "settings": dataclasses.asdict(settings) | {"run_dir": str(settings.run_dir)},
        "choice": dataclasses.asdict(choice),
        "validation": tuned,
        "rows": {
            row: {
                "seeds": of_seeds,
                **{
                    name: {
                        "mean": (of := estimate([f[name] for f in of_seeds.values()])).mean,
                        "standard_error": of.error,
                    }
                    for name in COLUMNS
                },
            }
            for row, of_seeds in figures.items()
        },
    }
    (settings.run_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (settings.run_dir / "table.md").write_text(text)
    draw(figures, settings.run_dir / "compare.png")
    print(f"{text}\n{settings.run_dir}: table.md, results.json, compare.png, in {duration(time.monotonic() - began)}")
    return text


def _second(settings: Comparison, choice: Choice) -> list[Job]:
    runs = {seed: reported_jobs(settings, choice, seed) for seed in settings.reported_seeds}
    return with_needs(evaluation_job(of_seed, seed) for seed, of_seed in runs.items())


def _any_choice(settings: Comparison) -> Choice:
    """For counting jobs before anything is known."""
    return Choice({method.name: GRID[0] for method in methods()}, GRID[0], max(settings.steps // 2, 1))


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running commands too
    try:
        compare(parse_flags(Comparison, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except JobFailed as failure:
        raise SystemExit(f"error: a run of the comparison failed\n{failure}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None


if __name__ == "__main__":
    main()
