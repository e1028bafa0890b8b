"""The picture of a run: its numbers are those of metrics.jsonl, and a run with few of them still gets one."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from gft_megatron.observe.metrics import MetricsLog
from gft_megatron.observe.report import series, smooth, write_curves

STEP = {
    "train/loss": 0.1,
    "train/nll": 1.2,
    "train/entropy_mean": 0.4,
    "train/grad_norm": 0.8,
    "train/rectified_frac": 0.3,
    "rollout/reward_mean_self": 0.3,
    "rollout/reward_mean_expert": 1.0,
    "time/forward_backward_sec": 1.5,
    "time/optimizer_sec": 0.5,
    "time/step_sec": 2.5,
}
EVALUATION = {"eval/accuracy_avg@8": 0.25, "eval/accuracy_pass@8": 0.8}


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that were saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))[1]
    )
    return saved


def draw(tmp_path, lines):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, values in lines:
        log.log(step, values)
    log.close()
    write_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    return imread(tmp_path / "curves.png")


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def test_all_panels(tmp_path, figures):
    lines = [
        (0, EVALUATION),
        *((n, STEP) for n in range(1, 31)),
        (30, {"eval/accuracy_avg@8": 0.5, "eval/accuracy_pass@8": 0.9}),
    ]
    image = draw(tmp_path, lines)
    assert image.std() > 0.05  # something is drawn
    drawn = panels(figures[0])
    assert len(drawn) == 6
    accuracy, passed = drawn["Held-out accuracy"].lines
    assert (accuracy.get_xdata().tolist(), accuracy.get_ydata().tolist()) == ([0, 30], [0.25, 0.5])
    assert (passed.get_xdata().tolist(), passed.get_ydata().tolist()) == ([0, 30], [0.8, 0.9])
    assert accuracy.get_label() == "avg@8: 25.0% to 50.0%"
    widths = [bar.get_width() for bar in drawn["Where the time went"].patches]
    assert widths == pytest.approx([0.6, 0.2, 0.2])  # forward and backward, optimizer, other
    raw, smoothed = drawn["Entropy of the policy"].lines
    assert raw.get_ydata().tolist() == [0.4] * 30
    assert smoothed.get_ydata() == pytest.approx(np.full(30, 0.4))


@pytest.mark.parametrize(
    "lines, titles",
    [
        ([(1, {"train/loss": 1.0})], ["Loss and likelihood"]),
        ([(0, EVALUATION)], ["Held-out accuracy"]),
        (
            [(1, {"train/loss": 1.0, "rollout/reward_mean": 0.5, "other": 3.0})],
            ["Loss and likelihood", "Reward by source"],
        ),
        ([(n, {"train/nll": math.nan, "train/grad_norm": 1.0}) for n in range(3)], ["Gradient"]),
        ([(n, {**STEP, "train/loss": math.nan if n == 3 else 1.0}) for n in range(9)], None),
    ],
)
def test_panels_without_data_are_left_out(tmp_path, figures, lines, titles):
    draw(tmp_path, lines)
    drawn = list(panels(figures[0]))
    assert drawn == titles if titles else len(drawn) == 5


def test_a_run_without_figures_gets_a_picture_that_says_so(tmp_path, figures):
    draw(tmp_path, [])
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["no figures in metrics.jsonl"]


def test_smooth_is_the_mean_of_the_window():
    values = np.random.default_rng(0).normal(size=100)
    values[[10, 50]] = np.nan, np.inf
    half = 100 // 24
    for i, actual in enumerate(smooth(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        assert actual == pytest.approx(sum(window) / len(window), abs=1e-12)


def test_smooth_of_nothing_finite():
    assert np.isnan(smooth(np.array([math.nan, math.inf]))).all()
    assert smooth(np.array([2.0])) == [2.0]


def test_series_skips_lines_without_the_figure():
    steps, values = series([{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": 4.0}], "a")
    assert (steps.tolist(), values.tolist()) == ([1.0, 3.0], [2.0, 4.0])
