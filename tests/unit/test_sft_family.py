"""The SFT family: each loss, its gradient and its metrics equal a token-by-token float64 computation of the formula."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gft_megatron.losses import LOSSES, LossInputs, required_inputs
from gft_megatron.losses.grpo import grpo

# Sequence 0 expert, 1 teacher, 2 own with A > 0, 3 own with A < 0, 4 teacher with A < 0; lengths differ.
SEQUENCE_IDS = torch.tensor([0] * 6 + [1] * 2 + [2] * 5 + [3] * 4 + [4] * 3)
SOURCES = [0, 1, 2, 2, 1]
ADVANTAGES = [0.9, 0.4, 1.3, -1.1, -0.6]
PROBS = (
    [0.5, 1e-9, 0.999, 0.04, 0.6, 0.2] + [0.3, 0.95] + [0.5, 0.01, 0.7, 0.3, 0.9] + [0.2, 0.8, 0.05, 0.6, 0.4, 1.0, 0.1]
)
# p / p_old: on both sides of every clip, for recorded and own tokens of either sign.
RATIOS = [1, 0.5, 1.4, 1.25, 1.0, 9.0] + [1.1, 0.7] + [1, 1.6, 0.5, 1.1, 1.25] + [1, 0.4, 1.7, 0.9, 1, 0.8, 1.5]
ENTROPY = [1.0, 0.0, 0.02, 2.9, 3.5, 9.0] + [0.4, 0.1] + [1.5, 4.0, 0.7, 2.0, 0.3] + [2.5, 0.5, 3.0, 1.2, 1.0, 0.0, 2.2]
MASKED = [0, 8, 13, 17]
N = len(PROBS)
VALID = [t for t in range(N) if t not in MASKED]


def make_inputs(**changes) -> LossInputs:
    """Junk of either sign, and NaN-producing where squared or exponentiated, in the masked positions."""
    mask = torch.ones(N)
    mask[MASKED] = 0
    log_probs = torch.tensor(PROBS).log()
    old_log_probs = log_probs - torch.tensor(RATIOS).log()
    entropy = torch.tensor(ENTROPY)
    for values, junk in ((log_probs, 1e30), (old_log_probs, -1e30), (entropy, -1e30)):
        values[MASKED] = junk * torch.tensor([1.0, -1.0, 1.0, -1.0])
    fields = {
        "log_probs": log_probs.requires_grad_(),
        "mask": mask,
        "sequence_ids": SEQUENCE_IDS,
        "group_ids": torch.zeros(5, dtype=torch.int64),
        "sources": torch.tensor(SOURCES),
        "entropy": entropy.requires_grad_(),
        "top_entropy": entropy.detach().clone(),
        "advantages": torch.tensor(ADVANTAGES),
        "old_log_probs": old_log_probs,
    }
    return LossInputs(**{**fields, **changes})


@dataclass
class Token:
    """One unmasked token in float64."""

    log_prob: Tensor  # differentiable
    old_log_prob: float
    entropy: float
    advantage: float
    own: bool

    @property
    def p(self) -> float:
        return math.exp(self.log_prob.item())

    @property
    def ratio(self) -> Tensor:
        return (self.log_prob - self.old_log_prob).exp()


def tokens(inputs: LossInputs) -> dict[int, Token]:
    return {
        t: Token(
            log_prob=inputs.log_probs.detach()[t].double().requires_grad_(),
            old_log_prob=inputs.old_log_probs[t].item(),
            entropy=inputs.entropy[t].item(),
            advantage=inputs.advantages[inputs.sequence_ids[t]].item(),
            own=SOURCES[inputs.sequence_ids[t]] == 2,
        )
        for t in VALID
    }


# The formulas. Each returns (loss, branch): which case of the formula the token was, for the test that all are met.


def probability_token(a, low=0.0, high=1.0):
    def formula(token):
        if token.p < low:
            return token.log_prob * 0, "too unlikely"
        if token.p > high:
            return token.log_prob * 0, "too likely"
        return (-token.log_prob if a == 0 else (1 - token.log_prob.exp() ** a) / a), "kept"

    return formula


def psft_token(high):
    def formula(token):
        if token.own:
            return token.log_prob * 0, "own"
        branch = "clipped" if token.ratio > 1 + high else "below" if token.ratio < 0.8 else "inside"
        return -torch.minimum(token.ratio, token.ratio.clamp(1 - 0.2, 1 + high)), branch

    return formula


def eaft_token(power, scale):
    def formula(token):
        weight = (token.entropy / scale) ** power
        return -min(weight, 1.0) * token.log_prob, "full" if token.entropy >= scale else "less"

    return formula


def chord_token(mu, low, high):
    def formula(token):
        if not token.own:
            return mu * token.p * (1 - token.p) * -token.log_prob, "recorded"
        unclipped = token.ratio * token.advantage
        clipped = token.ratio.clamp(1 - low, 1 + high) * token.advantage
        branch = ("own clipped " if clipped < unclipped else "own ") + ("up" if token.advantage > 0 else "down")
        return (1 - mu) * -torch.minimum(unclipped, clipped), branch

    return formula


def luffy_token(shaping):
    def formula(token):
        sign = " up" if token.advantage > 0 else " down"
        if token.own:
            return -token.advantage * token.ratio, "own" + sign
        p = token.log_prob.exp()
        return -token.advantage * p / (p + shaping), "recorded" + sign

    return formula


OWN = {"own up", "own clipped up", "own down", "own clipped down"}
CASES = {  # loss, hyper-parameters, formula, the branches that have to be met
    "probability": ("probability", {}, probability_token(1.0), {"kept"}),
    "probability a=0": ("probability", {"prob_power": 0.0}, probability_token(0), {"kept"}),
    "probability a=1e-6": ("probability", {"prob_power": 1e-6}, probability_token(1e-6), {"kept"}),
    "probability a=10": ("probability", {"prob_power": 10.0}, probability_token(10), {"kept"}),
    "probability OnlyTopP": ("probability", {"prob_min": 0.25}, probability_token(1, 0.25), {"kept", "too unlikely"}),
    "probability OnlyBottomLogP": (
        "probability",
        {"prob_power": 0.0, "prob_max": 0.25},
        probability_token(0, 0.0, 0.25),
        {"kept", "too likely"},
    ),
    "probability band": (
        "probability",
        {"prob_power": 0.5, "prob_min": 0.08, "prob_max": 0.75},
        probability_token(0.5, 0.08, 0.75),
        {"kept", "too likely", "too unlikely"},
    ),
    "psft": ("psft", {}, psft_token(0.28), {"own", "clipped", "below", "inside"}),
    "psft narrow": ("psft", {"clip_high": 0.05}, psft_token(0.05), {"own", "clipped", "below", "inside"}),
    "eaft": ("eaft", {}, eaft_token(1, 3), {"full", "less"}),
    "eaft_top20": ("eaft_top20", {}, eaft_token(1, 3), {"full", "less"}),
    "eaft squared": ("eaft", {"entropy_power": 2.0, "entropy_scale": 2.0}, eaft_token(2, 2), {"full", "less"}),
    "chord_phi": ("chord_phi", {}, chord_token(0.1, 0.2, 0.2), {"recorded", *OWN}),
    "chord_phi clip-higher": (
        "chord_phi",
        {"mu": 0.5, "clip_low": 0.15, "clip_high": 0.28},
        chord_token(0.5, 0.15, 0.28),
        {"recorded", *OWN},
    ),
    "luffy": ("luffy", {}, luffy_token(0.1), {"recorded up", "recorded down", "own up", "own down"}),
    "luffy wide": ("luffy", {"shaping": 0.5}, luffy_token(0.5), {"recorded up", "recorded down", "own up", "own down"}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_float64(case):
    name, hyper, formula, branches = CASES[case]
    inputs = make_inputs()
    loss, metrics = LOSSES[name](inputs, **hyper)
    loss.sum().backward()

    met = set()
    expected_loss, expected_grad = torch.zeros(2, N, dtype=torch.float64)
    for t, token in tokens(inputs).items():
        value, branch = formula(token)
        value.backward()
        met.add(branch)
        expected_loss[t], expected_grad[t] = value.detach(), token.log_prob.grad
    assert met == branches

    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=3e-6, atol=1e-12)
    torch.testing.assert_close(inputs.log_probs.grad.double(), expected_grad, rtol=3e-6, atol=1e-12)
    assert (loss[MASKED] == 0).all() and (inputs.log_probs.grad[MASKED] == 0).all()
    assert inputs.entropy.grad is None, "the entropy is a constant of every loss here"
    assert all(math.isfinite(value) and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("case", "metric", "token_metric"),
    [
        ("probability band", "kept_frac", lambda token: 0.08 <= token.p <= 0.75),
        ("probability band", "coefficient_mean", lambda token: token.p**0.5 if 0.08 <= token.p <= 0.75 else 0),
        ("psft", "clipped_frac", lambda token: not token.own and token.ratio > 1.28),
        ("psft", "coefficient_mean", lambda token: 0 if token.own or token.ratio > 1.28 else token.ratio.item()),
        ("eaft", "coefficient_mean", lambda token: min(token.entropy / 3, 1)),
        ("chord_phi", "phi_mean", lambda token: 0 if token.own else token.p * (1 - token.p)),
        (
            "luffy",
            "coefficient_mean",
            lambda token: token.ratio.item() if token.own else 0.1 * token.p / (token.p + 0.1) ** 2,
        ),
    ],
)
def test_metrics_are_means_over_valid_tokens(case, metric, token_metric):
    name, hyper, _, _ = CASES[case]
    inputs = make_inputs()
    _, metrics = LOSSES[name](inputs, **hyper)
    expected = sum(float(token_metric(token)) for token in tokens(inputs).values()) / len(VALID)
    assert expected > 0
    assert metrics[metric].item() == pytest.approx(expected, rel=1e-5)


def gradient(name, **hyper):
    inputs = make_inputs()
    LOSSES[name](inputs, **hyper)[0].sum().backward()
    return inputs.log_probs.grad


def loss_of(name, **hyper):
    return LOSSES[name](make_inputs(), **hyper)[0]


def test_probability_runs_from_cross_entropy_to_dft():
    assert torch.equal(loss_of("probability", prob_power=0.0), loss_of("sft"))
    torch.testing.assert_close(loss_of("probability", prob_power=1e-8), loss_of("sft"), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient("probability", prob_power=1e-8), gradient("sft"), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient("probability", prob_power=1.0), gradient("dft"), rtol=1e-6, atol=0)


def test_probability_thresholds_keep_their_ends_and_rounding_above_one():
    half = math.log(0.5)
    log_probs = torch.tensor([half, 0.0, 1e-7])  # the last as rounding in log-softmax may give it
    inputs = LossInputs(log_probs, torch.ones(3), torch.zeros(3).long(), torch.zeros(1).long(), torch.zeros(1).long())
    q = log_probs[0].exp().item()
    for hyper, kept in (({"prob_min": q}, 1), ({"prob_max": q}, 1 / 3), ({"prob_min": q, "prob_max": q}, 1 / 3)):
        assert LOSSES["probability"](inputs, **hyper)[1]["kept_frac"].item() == pytest.approx(kept)


def test_psft_before_the_policy_moves_has_the_gradient_of_cross_entropy_on_recorded_responses():
    inputs = make_inputs()
    inputs = inputs.with_policy(inputs.log_probs, inputs.entropy)
    at_start = make_inputs(old_log_probs=inputs.log_probs.detach())
    loss, metrics = LOSSES["psft"](at_start)
    loss.sum().backward()
    recorded = torch.tensor([SOURCES[s] != 2 for s in SEQUENCE_IDS])
    assert torch.equal(at_start.log_probs.grad, gradient("sft").where(recorded, 0.0))
    assert metrics["clipped_frac"] == 0


def test_psft_keeps_a_finite_gradient_where_the_ratio_overflows():
    inputs = make_inputs()
    far = make_inputs(old_log_probs=inputs.log_probs.detach() - 1000.0)
    loss, _ = LOSSES["psft"](far)
    loss.sum().backward()
    assert (far.log_probs.grad == 0).all() and loss.isfinite().all()


def test_eaft_is_cross_entropy_for_power_zero_and_for_an_unsure_model():
    assert torch.equal(loss_of("eaft", entropy_power=0.0), loss_of("sft"))
    assert torch.equal(LOSSES["eaft"](make_inputs(entropy=torch.full((N,), 3.0)))[0], loss_of("sft"))


def test_chord_phi_runs_from_grpo_to_weighted_cross_entropy():
    assert torch.equal(loss_of("chord_phi", mu=0.0), grpo(make_inputs())[0])
    only_recorded = loss_of("chord_phi", mu=1.0)
    own = torch.tensor([SOURCES[s] == 2 for s in SEQUENCE_IDS])
    assert (only_recorded[own] == 0).all() and (only_recorded[~own] != 0).sum() == (~own).sum() - 3  # masked, p = 1


def test_luffy_with_wide_shaping_is_the_scaled_probability():
    """shaping -> infinity: shaping p / (p + shaping) -> p, so recorded responses get A times DFT's gradient."""
    recorded = torch.tensor([SOURCES[s] != 2 for s in SEQUENCE_IDS])
    expected = torch.tensor(ADVANTAGES)[SEQUENCE_IDS] * gradient("dft")
    actual = 1e7 * gradient("luffy", shaping=1e7)
    torch.testing.assert_close(actual[recorded], expected[recorded], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("probability", set()),
        ("psft", {"old_log_probs"}),
        ("eaft", {"entropy"}),
        ("chord_phi", {"advantages", "old_log_probs"}),
        ("luffy", {"advantages", "old_log_probs"}),
    ],
)
def test_missing_inputs_are_named(name, fields):
    assert required_inputs(LOSSES[name]) == fields
    for field in fields:
        with pytest.raises(ValueError, match=f"{name}.*LossInputs.{field}"):
            LOSSES[name](make_inputs(**{field: None}))
    others = {"advantages", "old_log_probs", "entropy"} - fields
    LOSSES[name](make_inputs(**dict.fromkeys(others)))


@pytest.mark.parametrize(
    ("name", "hyper", "value"),
    [
        *(("probability", "prob_power", value) for value in (-0.1, math.inf, math.nan)),
        *(("probability", "prob_min", value) for value in (-0.1, 1.1, math.nan)),
        *(("probability", "prob_max", value) for value in (-0.1, 1.1, math.nan)),
        *(("psft", "clip_high", value) for value in (-0.1, math.inf, math.nan)),
        *(("eaft", "entropy_power", value) for value in (-0.1, math.inf, math.nan)),
        *(("eaft", "entropy_scale", value) for value in (0.0, -1.0, math.inf, math.nan)),
        *(("chord_phi", "mu", value) for value in (-0.1, 1.1, math.nan)),
        *(("luffy", "shaping", value) for value in (0.0, -0.1, math.inf, math.nan)),
    ],
)
def test_hyper_parameters_out_of_range_are_named(name, hyper, value):
    with pytest.raises(ValueError, match=f"{hyper} (is )?{value}"):
        LOSSES[name](make_inputs(), **{hyper: value})


def test_thresholds_that_keep_nothing_are_refused():
    with pytest.raises(ValueError, match="prob_min is 0.6 and prob_max 0.5"):
        LOSSES["probability"](make_inputs(), prob_min=0.6, prob_max=0.5)
