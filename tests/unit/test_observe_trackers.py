"""Trackers hold one value for each step, also after a resume; what is missing is named."""

import importlib.util
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gft_megatron.observe.trackers import build_trackers


def tensorboard_values(run_dir, name):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def track(run_dir, steps, offset, *, resume_step=0):
    (tracker,) = build_trackers(["tensorboard"], run_dir, resume_step=resume_step)
    for step in steps:
        tracker.log(step, {"train/loss": step + offset, "train/nll": 2.0 * step})
    tracker.close()


def test_tensorboard_reads_back(tmp_path):
    track(tmp_path, range(3), 0.5)
    assert tensorboard_values(tmp_path, "train/loss") == [(0, 0.5), (1, 1.5), (2, 2.5)]
    assert tensorboard_values(tmp_path, "train/nll") == [(0, 0.0), (1, 2.0), (2, 4.0)]


def test_tensorboard_replaces_steps_done_again(tmp_path):
    track(tmp_path, range(6), 0.0)
    track(tmp_path, range(4, 7), 0.25, resume_step=3)
    assert tensorboard_values(tmp_path, "train/loss") == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4.25),
        (5, 5.25),
        (6, 6.25),
    ]


def test_tensorboard_of_a_run_from_the_beginning_replaces_all(tmp_path):
    track(tmp_path, range(3), 0.0)
    track(tmp_path, range(2), 0.25)
    assert tensorboard_values(tmp_path, "train/loss") == [(0, 0.25), (1, 1.25)]


def test_tensorboard_takes_non_finite_figures(tmp_path):
    (tracker,) = build_trackers(["tensorboard"], tmp_path)
    tracker.log(1, {"train/loss": math.nan})
    tracker.close()
    ((step, value),) = tensorboard_values(tmp_path, "train/loss")
    assert step == 1 and math.isnan(value)


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(ValueError, match="--trackers mlflow: unknown; the trackers are tensorboard, wandb"):
        build_trackers(["tensorboard", "mlflow"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(ValueError, match="wandb is not installed"):
        build_trackers(["wandb"], tmp_path)


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resume_step in (0, 2, 0):
        (tracker,) = build_trackers(["wandb"], tmp_path, resume_step=resume_step)
        tracker.log(resume_step + 1, {"train/loss": 0.5})
        tracker.close()
        ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1] != ids[2]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 3
