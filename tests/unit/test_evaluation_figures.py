"""Figures of an evaluation against numbers counted by hand."""

import math

import numpy as np
import pytest

from gft_megatron.groups import Sample, Source
from gft_megatron.rollout.figures import evaluation_figures, evaluation_sums


def sample(text, reward, log_probs, truncated=False):
    values = np.array(log_probs, np.float32)
    return Sample(
        Source.SELF, np.zeros(len(values), np.int64), text, reward, truncated=truncated, rollout_log_probs=values
    )


PROMPTS = [
    [sample("1+2", 1.0, [-1.0, -2.0]), sample("1+2", 1.0, [-1.0, -2.0]), sample("2+1", 1.0, [-3.0])],
    [sample("3", 0.0, [0.0, 0.0, 0.0]), sample("4", 0.0, [-1.0], truncated=True), sample("1*3", 1.0, [-0.5, -0.5])],
    [sample("5", 0.0, [-2.0]), sample("6", 0.0, [-2.0])],  # one sample failed
    [],  # all failed
]


def test_figures_by_hand():
    assert evaluation_figures(evaluation_sums(PROMPTS), 3) == pytest.approx(
        {
            "eval/accuracy_avg@3": 4 / 8,
            "eval/accuracy_pass@3": 2 / 3,
            "eval/distinct_correct": (2 + 1 + 0) / 3,
            "eval/zero_std_frac": 2 / 3,
            "eval/entropy_mean": (3 + 3 + 3 + 0 + 1 + 1 + 2 + 2) / (2 + 2 + 1 + 3 + 1 + 2 + 1 + 1),
            "eval/response_length_mean": 13 / 8,
            "eval/truncated_frac": 1 / 8,
            "eval/num_prompts": 4,
            "eval/failed_samples": 4,
        }
    )


def test_sums_of_shares_add_up():
    parts = np.add(evaluation_sums(PROMPTS[:1]), evaluation_sums(PROMPTS[1:]))
    assert parts.tolist() == evaluation_sums(PROMPTS)
    assert np.add(parts, evaluation_sums([])).tolist() == parts.tolist()  # a rank without prompts


def test_no_sample_is_no_claim():
    assert evaluation_figures(evaluation_sums([[], []]), 8) == {"eval/num_prompts": 2, "eval/failed_samples": 16}


def test_surprise_estimates_entropy():
    rng = np.random.default_rng(0)
    probabilities = np.array([0.7, 0.2, 0.1])
    drawn = np.log(rng.choice(probabilities, p=probabilities, size=(500, 40)))
    figures = evaluation_figures(evaluation_sums([[sample("", 0.0, row) for row in drawn]]), 500)
    entropy = -(probabilities * np.log(probabilities)).sum()
    assert math.isclose(figures["eval/entropy_mean"], entropy, rel_tol=0.02)
