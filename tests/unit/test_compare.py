"""The comparison of methods: its plan, its resumption and its statistics. Stub commands stand for training runs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compare.evaluate import expert_nll
from compare.job import Job, is_finished
from compare.lanes import JobFailed, claim, run_jobs
from compare.methods import methods, rows
from compare.plan import (
    GRID,
    TUNING_SEED,
    Choice,
    Comparison,
    choose,
    evaluation_job,
    reported_jobs,
    tuning_jobs,
    warmup_job,
    with_needs,
)
from compare.progress import Lines
from compare.table import AVG, COLUMNS, difference, estimate, markdown, t95

from gft_megatron.command_line import parse_args
from gft_megatron.groups import Prompt, RecordedResponse, Source
from gft_megatron.losses import LOSSES

SETTINGS = Comparison()
CHOICE = Choice({method.name: lr for method, lr in zip(methods(), GRID * 2, strict=False)}, 2e-4, 75)


def flags_of(job: Job):
    assert job.command[1:3] == ("-m", "torch.distributed.run")
    return parse_args(job.command[job.command.index("examples/pretrain_gft.py") + 1 :])


# The plan


def test_every_method_has_the_same_grid_the_same_budget_and_the_validation_problems():
    jobs = tuning_jobs(SETTINGS)
    assert list(jobs) == [method.name for method in methods()]
    for method in methods():
        assert tuple(jobs[method.name]) == GRID == (5e-5, 1e-4, 2e-4, 3e-4)
        for lr in GRID[::3]:
            job = jobs[method.name][lr]
            config = flags_of(job)
            assert (config.optimizer.lr, config.optimizer.train_iters, config.loss.loss) == (lr, 300, method.loss)
            assert config.rollout.rollout_batch_size * sum(method.group) == 128
            assert config.data.eval_prompt_data == ("{run}/tuning/data/validation.jsonl",)
            assert config.optimizer.seed == TUNING_SEED
            assert config.output.eval_interval == (25 if method.name == "sft" else 300)
            assert warmup_job(SETTINGS, TUNING_SEED) in job.needs


def test_reported_seeds_are_fresh_and_see_no_held_out_problem_before_the_end():
    assert list(SETTINGS.reported_seeds) == [1, 2, 3] and TUNING_SEED not in SETTINGS.reported_seeds
    runs = reported_jobs(SETTINGS, CHOICE, 2)
    assert list(runs) == [row.name for row in rows()]
    everything = with_needs(runs.values())
    assert not any("test.jsonl" in argument for job in everything for argument in job.command)
    assert not any("tuning/" in argument for job in everything for argument in job.command)
    last = evaluation_job(runs, 2)
    assert "{run}/seed-2/data/test.jsonl" in last.command
    assert {f"{{run}}/seed-2/{row.name}/hf" for row in rows()} <= set(last.command)
    assert set(last.needs) >= set(runs.values())


def test_rows_train_as_chosen_and_start_from_what_they_say():
    runs = reported_jobs(SETTINGS, CHOICE, 1)
    for row in rows()[1:]:
        config = flags_of(runs[row.name])
        assert config.model.hf_checkpoint == f"{{run}}/seed-1/{row.start}/hf"
        assert runs[row.start] in runs[row.name].needs
        expected = (2e-4, 75) if row.early else (CHOICE.lr[row.method.name], 300 * row.length)
        assert (config.optimizer.lr, config.optimizer.train_iters) == expected
        # The early stop is the beginning of the whole run, the decay of its learning rate included.
        assert config.optimizer.lr_decay_iters == (300 if row.early else 300 * row.length)
    names = set(runs)
    assert {"grpo", "grpo-long", "gft", "gft-recorded", "sft-mix", "sft-early-then-grpo", "gft-then-grpo"} <= names
    assert flags_of(runs["gft"]).loss_hyper == {"tau": 0.7}
    assert flags_of(runs["gft-recorded"]).loss_hyper == {"tau": 0.7, "tau_self": 0.0}
    assert flags_of(runs["grpo-long"]).optimizer.train_iters == 600
    for loss, name in (("cadft", "cadft"), ("sft_go", "sft-go")):
        assert (name in names) == (loss in LOSSES)


def test_needs_come_first_and_once():
    runs = reported_jobs(SETTINGS, CHOICE, 1)
    ordered = with_needs([evaluation_job(runs, 1), *runs.values()])
    assert len(set(ordered)) == len(ordered)
    assert all(ordered.index(needed) < place for place, job in enumerate(ordered) for needed in job.needs)


def test_choice_is_the_best_of_the_validation_problems(tmp_path):
    settings = Comparison(run_dir=tmp_path)
    jobs = tuning_jobs(settings)
    for name, by_lr in jobs.items():
        for lr, job in by_lr.items():
            # Best at 1e-4 and, for DFT, just as good at 2e-4. SFT's best figure of all is on the way of 3e-4.
            good = lr == 1e-4 or (name == "dft" and lr == 2e-4)
            by_step = {"0": 0.9, "75": 0.5 if lr == 3e-4 else 0.1, "300": 0.4 if good else 0.3}
            folder = tmp_path / job.folder
            folder.mkdir(parents=True)
            evaluations = {step: {"eval/accuracy_avg@8": figure} for step, figure in by_step.items()}
            (folder / "results.json").write_text(json.dumps({"evaluations": evaluations}))
    choice, tuned = choose(settings, jobs)
    assert choice == Choice({name: 1e-4 for name in jobs}, 3e-4, 75)
    assert tuned["sft"] == {5e-5: 0.3, 1e-4: 0.4, 2e-4: 0.3, 3e-4: 0.3}


# Running and going on


def stub(folder: str, *needs: Job, code: str = "true") -> Job:
    """A command that writes its name into the file `order` and, unless `code` fails, succeeds."""
    script = f"echo {folder} >> {{run}}/order && {code} && touch {{run}}/{folder}/result"
    return Job(folder, ("sh", "-c", script), "result", 1.0, needs)


def run(jobs: list[Job], run_dir: Path) -> list[str]:
    """What ran, in order."""
    claim(run_dir)
    (run_dir / "order").unlink(missing_ok=True)
    run_jobs(with_needs(jobs), run_dir, Lines(jobs))
    order = run_dir / "order"
    return order.read_text().split() if order.exists() else []


def test_finished_runs_are_skipped_and_changed_ones_run_again(tmp_path):
    def jobs(*changed: str) -> list[Job]:
        def made(name: str, *needs: Job) -> Job:
            return stub(name, *needs, code=":" if name in changed else "true")

        first = made("first")
        return [made("second", first), made("alone")]

    assert sorted(run(jobs(), tmp_path)) == ["alone", "first", "second"]
    assert run(jobs(), tmp_path) == []
    assert run(jobs("second"), tmp_path) == ["second"]
    assert run(jobs("second", "first"), tmp_path) == ["first", "second"]  # what builds on it, too
    (tmp_path / "alone" / "job.json").unlink()  # killed before its end
    (tmp_path / "alone" / "half").touch()
    assert run(jobs("second", "first"), tmp_path) == ["alone"]
    assert not (tmp_path / "alone" / "half").exists()
    (tmp_path / "first" / "result").unlink()
    assert run(jobs("second", "first"), tmp_path) == ["first"]


def test_longest_chain_goes_first_and_needs_are_waited_for(tmp_path):
    short = [stub(f"short{i}") for i in range(3)]
    chain = stub("c", stub("b", stub("a", code="sleep 0.2"), code="sleep 0.2"))
    order = run([*short, chain], tmp_path)
    assert order.index("a") < 2 and order.index("a") < order.index("b") < order.index("c")
    assert len(order) == 6


def test_log_counts_each_job_once_and_foresees_the_rest(tmp_path, capsys):
    jobs = [stub("a"), stub("b", code=":"), stub("c", code=": c")]
    log = Lines(jobs)
    log.found(jobs[0])
    log.found(jobs[0])  # again, in the second half of the comparison
    log.finished(stub("b"), 60.0)  # its flags were not known when the jobs were counted
    # 60 seconds for what was foreseen as 1: the third will take another 60 of one lane, 30 of two.
    assert capsys.readouterr().out == "2/3 | b in 1:00 | eta 0:30\n"


def test_a_failure_ends_the_comparison_with_its_last_lines_and_its_folder(tmp_path):
    failing = stub("bad", code="echo error: what went wrong && seq 50 && false")
    long = stub("long", code="sleep 60")
    with pytest.raises(JobFailed) as failure:
        run([long, failing, stub("later", failing)], tmp_path)
    assert str(failure.value) == f"error: what went wrong\n{tmp_path / 'bad'}: failed with status 1; see log.txt there"
    assert not is_finished(long, tmp_path) and not (tmp_path / "later").exists()
    with pytest.raises(ValueError, match="without result"):
        run([Job("empty", ("true",), "result", 1.0)], tmp_path)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        claim(tmp_path)


# The numbers

AVGS = {"warmup": [0.25, 0.26, 0.27], "sft": [0.30, 0.31, 0.29], "grpo": [0.36, 0.38, 0.34], "gft": [0.33, 0.36, 0.31]}


def made_up_figures() -> dict[str, dict[int, dict[str, float]]]:
    values = {row.name: AVGS.get(row.name, [0.40, 0.38, 0.39]) for row in rows()}
    return {
        name: {seed: dict.fromkeys(COLUMNS, value) for seed, value in enumerate(of_seeds, 1)}
        for name, of_seeds in values.items()
    }


def test_mean_and_standard_error_by_hand():
    of = estimate([0.30, 0.31, 0.29])
    assert of.mean == pytest.approx(0.30)
    assert of.error == pytest.approx(0.01 / 3**0.5)  # deviation with n - 1: 0.01
    assert estimate([0.3]).error is None and estimate([0.3]).in_errors is None and not estimate([0.3]).is_clear


def test_differences_are_paired_by_seed():
    of = difference(made_up_figures(), "gft", "sft", AVG)
    by_seed = [0.03, 0.05, 0.02]
    assert of.mean == pytest.approx(statistics.fmean(by_seed))
    assert of.error == pytest.approx(statistics.stdev(by_seed) / 3**0.5)
    assert of.in_errors == pytest.approx(of.mean / of.error)
    assert of.in_errors == pytest.approx(3.78, abs=0.01)
    assert not of.is_clear  # 3.78 standard errors, but three seeds need 4.30


def test_thresholds_are_those_of_students_t():
    # Integrated here: with 2 degrees of freedom the two-sided tail beyond t is 1 - t / sqrt(t^2 + 2).
    assert 1 - t95(3) / (t95(3) ** 2 + 2) ** 0.5 == pytest.approx(0.05, abs=5e-4)
    assert [t95(n) for n in range(2, 12)] == sorted((t95(n) for n in range(2, 12)), reverse=True)


def test_text_says_what_the_differences_support():
    tuned = {method.name: dict.fromkeys(GRID, 0.3) for method in methods()}
    text = markdown(made_up_figures(), CHOICE, tuned, SETTINGS)
    assert "| SFT | 5e-05 | 300 | 0.300 +- 0.006 |" in text
    assert "| SFT (early stop) | 0.0002 | 75 |" in text
    assert "| GFT (paper) | SFT | +0.033 +- 0.009 | +3.8 |" in text
    against_sft = next(line for line in text.splitlines() if "against SFT" in line)
    above, _, not_told_apart = against_sft.partition("not told apart: ")
    assert "DFT" in above and "GFT (paper)" not in above
    assert "GFT (paper)" in not_told_apart and "above" not in not_told_apart
    assert "4.3 standard errors" in text
    one_seed = {row: {1: of_seeds[1]} for row, of_seeds in made_up_figures().items()}
    assert "One seed has no standard error" in markdown(one_seed, CHOICE, tuned, Comparison(seeds=1))


def test_expert_nll_equals_a_sum_token_by_token():
    weight = torch.randn(11, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(tokens):  # causal: logits [n, t, 11] depend on all tokens so far
        return SimpleNamespace(logits=weight[tokens].cumsum(1))

    pairs = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10])]
    total = 0.0
    for prompt, response in pairs:
        for k, token in enumerate(response):
            logits = weight[prompt + response[:k]].sum(0)
            total += float(logits.logsumexp(0) - logits[token])
    recorded = [(RecordedResponse("", np.array(response), Source.EXPERT),) for _, response in pairs]
    prompts = [Prompt(i, np.array(pairs[i][0]), "", responses) for i, responses in enumerate(recorded)]
    assert expert_nll(model, prompts) == pytest.approx(total / 6, rel=1e-6)


def test_a_wrong_number_of_seeds_is_refused():
    with pytest.raises(ValueError, match="--seeds is 0; it has to be at least 1"):
        Comparison(seeds=0)
