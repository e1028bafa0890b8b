"""metrics.jsonl survives kills and resumes, stays strict JSON, and the stages of a step add up to the step."""

import json
import math
import time

import pytest

from gft_megatron.observe.metrics import MetricsLog, Rates, Timings, read_metrics
from gft_megatron.observe.stages import split_step_time


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def write_steps(path, steps, *, resume_step=0):
    log = MetricsLog(path, resume_step=resume_step)
    for step in steps:
        log.log(step, {"train/loss": step / 8})
    log.close()


def test_a_line_is_in_the_file_before_log_returns(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.log(1, {"train/loss": 0.25, "train/num_tokens": 7})
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (record["step"], record["train/loss"], record["train/num_tokens"]) == (1, 0.25, 7.0)
    assert record["wall"] >= 0
    log.close()


def test_resume_cuts_off_the_steps_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    write_steps(path, [5, 6], resume_step=4)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_beginning_keeps_nothing(tmp_path):
    # Killed before its first checkpoint, a run evaluates step 0 again: its line must not be there twice.
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [0, 1, 2])
    write_steps(path, [0, 1])
    assert steps_of(path) == [0, 1]


def test_wall_goes_on_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "wall": 40.0}\n{"step": 2, "wall": 1000.0}\n{"step": 3, "wall": 2000.0}\n')
    write_steps(path, [3], resume_step=2)
    walls = [record["wall"] for record in read_metrics(path)]
    assert walls[:2] == [40.0, 1000.0]
    assert 1000.0 <= walls[2] < 2000.0


def test_non_finite_figures_are_strict_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    figures = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    log = MetricsLog(path)
    log.log(3, figures)
    log.close()
    content = json.loads(path.read_text(), parse_constant=refuse_constant)
    assert content["a"] is content["b"] is content["c"] is None
    assert content["non_finite"] == {"a": "nan", "b": "inf", "c": "-inf"}
    write_steps(path, [4], resume_step=3)  # the line is read and written once more
    record, _ = read_metrics(path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"], record["d"]) == (math.inf, -math.inf, 1.5)


def test_a_line_torn_anywhere_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert steps_of(path) == [1, 2]
    write_steps(path, [3, 4], resume_step=2)
    assert steps_of(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", "7", '{"loss": 1.0}', '{"step": 2, "wall": null}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "wall": 0.1}}\n{line}\n{{"step": 3, "wall": 0.3}}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        MetricsLog(path, resume_step=3)
    assert path.read_text().count("\n") == 3


def test_timings_add_up_and_start_anew():
    timings = Timings()
    for _ in range(2):
        with timings.measure("sleep"):
            time.sleep(0.01)
    with pytest.raises(KeyError), timings.measure("raised"):
        raise KeyError
    timings.add("generate", 0.5)
    timings.add("generate", 0.25)
    figures = timings.pop()
    assert figures["time/generate_sec"] == 0.75
    assert figures["time/sleep_sec"] >= 0.02
    assert figures["time/raised_sec"] >= 0
    assert figures["time/step_sec"] >= figures["time/sleep_sec"]
    assert timings.pop().keys() == {"time/step_sec"}


def test_stages_are_disjoint_and_add_up_to_the_step():
    figures = {
        "time/rollout_sec": 4.0,
        "time/generate_sec": 3.0,
        "time/reward_sec": 2.5,  # overlapped with generating: only 1 second of the rollout is left for it
        "time/forward_backward_sec": 3.5,
        "time/save_sec": 0.5,
        "time/step_sec": 9.0,
        "train/loss": 1.0,
    }
    stages = split_step_time(figures)
    assert stages == {"generate": 3.0, "reward": 1.0, "forward_backward": 3.5, "save": 0.5, "other": 1.0}
    assert split_step_time({**figures, "time/generate_sec": 1.0, "time/reward_sec": 0.5})["exchange"] == 2.5


def test_counts_as_rates(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    rates = Rates(over_sec=2.0)
    now[0] = 4.0
    assert rates.of({"a": 20.0}) == {"a": 5.0}
    now[0] = 5.0
    assert rates.of({"a": 100.0}) == {"a": 5.0}, "too soon for news"
    now[0] = 8.0
    assert rates.of({"a": 120.0, "b": 8.0}) == {"a": 25.0, "b": 2.0}
