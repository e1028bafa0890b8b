"""Relatives of SFT and GRPO that are told a reference, an entropy or a hint: each equals its formula in float64."""

import dataclasses
import math

import pytest
import torch
from ragged_responses import (
    RESPONSES,
    assert_equals_oracle,
    gradients,
    make_inputs,
    mean,
    tokens_of,
)

from gft_megatron.losses import LOSSES, is_token_local, required_inputs
from gft_megatron.losses.coefficients import coefficient_shares
from gft_megatron.losses.inputs import default_schedules, natural_responses


def surrogate(token, low=0.2, high=0.2, met=None):
    unclipped = token.ratio * token.advantage
    clipped = token.ratio.clamp(1 - low, 1 + high) * token.advantage
    if met is not None and token.advantage != 0:
        side = "up" if token.advantage > 0 else "down"
        met.add(f"clipped {side}" if clipped < unclipped else side)
    return -torch.minimum(unclipped, clipped)


BRANCHES = {"up", "down", "clipped up", "clipped down"}


def asft(lam):
    return lambda tokens: {t: -k.p * k.log_prob + lam * k.ref_kl for t, k in tokens.items()}


def srft(sign=-1, sft_weight=0.5, positive_weight=0.1, low=0.2, high=0.2):
    def formula(tokens):
        losses, met = {}, set()
        for t, k in tokens.items():
            entropy = k.entropy.item()
            if not k.own:
                losses[t] = -sft_weight * math.exp(sign * entropy) * k.log_prob + surrogate(k, low, high, met)
            elif k.advantage > 0:
                losses[t] = -positive_weight * math.exp(entropy) * k.log_prob
            else:
                losses[t] = k.log_prob if k.advantage < 0 else k.log_prob * 0
        assert met == BRANCHES
        return losses

    return formula


def f_divergence(kind, beta):
    def phi(r, met):
        if kind == "total-variation":
            return r
        if kind == "pearson":
            met.add("rises" if r < 2 else "falls")
            return r - r**2 / 4
        met.add("rises" if r > -0.5 else "falls")
        return r / (1 + r) if r > -0.5 else -1 + 4 * (r + 0.5)

    def formula(tokens):
        met = set()
        losses = {t: -phi(beta * (k.log_prob - k.ref), met) / beta for t, k in tokens.items()}
        assert beta == 0.1 or kind == "total-variation" or met == {"rises", "falls"}
        return losses

    return formula


def chord(mu, phi, low=0.2, high=0.2, separate=False):
    def formula(tokens):
        met = set()
        num_own = sum(k.own for k in tokens.values())
        scales = (len(tokens) / num_own, len(tokens) / (len(tokens) - num_own)) if separate else (1.0, 1.0)
        losses = {
            t: (1 - mu) * scales[0] * surrogate(k, low, high, met)
            if k.own
            else -mu * scales[1] * (k.p * (1 - k.p) if phi else 1.0) * k.log_prob
            for t, k in tokens.items()
        }
        assert met == BRANCHES
        return losses

    return formula


def uft(hint_coef=0.001, low=0.2, high=0.2, cap=math.inf):
    def formula(tokens):
        own = [k for k in tokens.values() if k.own]
        num_hint = sum(math.isnan(k.rollout) for k in own)
        assert 0 < num_hint < len(own)

        def loss(k):
            if not k.own:
                return k.log_prob * 0
            if math.isnan(k.rollout):
                return -hint_coef * len(tokens) / num_hint * k.log_prob
            weight = min(math.exp(k.old - k.rollout), cap) if cap < math.inf else 1.0
            return len(tokens) / (len(own) - num_hint) * weight * surrogate(k, low, high)

        return {t: loss(k) for t, k in tokens.items()}

    return formula


WIDE = {"clip_low": 0.1, "clip_high": 0.4}
CASES = {
    "asft": ("asft", {}, asft(0.05)),
    "asft strong": ("asft", {"lam": 2.0}, asft(2.0)),
    "srft": ("srft", {}, srft()),
    "srft code": ("srft", {"entropy_sign": "code"}, srft(sign=1)),
    "srft other": (
        "srft",
        {"sft_weight": 0.7, "positive_weight": 0.3, **WIDE},
        srft(-1, 0.7, 0.3, 0.1, 0.4),
    ),
    "total variation": ("f_divergence", {"divergence": "total-variation"}, f_divergence("total-variation", 0.1)),
    "pearson": ("f_divergence", {}, f_divergence("pearson", 0.1)),
    "pearson strong": ("f_divergence", {"beta": 1.0}, f_divergence("pearson", 1.0)),
    "hellinger": ("f_divergence", {"divergence": "hellinger"}, f_divergence("hellinger", 0.1)),
    "hellinger strong": ("f_divergence", {"divergence": "hellinger", "beta": 1.0}, f_divergence("hellinger", 1.0)),
    "chord_mu": ("chord_mu", {}, chord(0.9, phi=False)),
    "chord_mu clips": ("chord_mu", {"mu": 0.3, **WIDE}, chord(0.3, False, 0.1, 0.4)),
    "chord_mu means": ("chord_mu", {"separate_means": True}, chord(0.9, False, separate=True)),
    "chord_phi means": ("chord_phi", {"separate_means": True}, chord(0.1, True, separate=True)),
    "uft": ("uft", {}, uft()),
    "uft more": ("uft", {"hint_coef": 0.5, "tis_clip": 1.1, **WIDE}, uft(0.5, 0.1, 0.4, 1.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_float64(case):
    name, hyper, formula = CASES[case]
    assert_equals_oracle(LOSSES[name], make_inputs(), hyper, formula)


# Limits


def test_asft_without_lam_is_dft():
    assert torch.equal(LOSSES["asft"](make_inputs(), lam=0.0)[0], LOSSES["dft"](make_inputs())[0])


def test_total_variation_has_the_gradient_of_cross_entropy_and_so_have_all_divergences_at_the_reference():
    inputs = make_inputs()
    expected = gradients(LOSSES["sft"], inputs)
    torch.testing.assert_close(gradients(LOSSES["f_divergence"], inputs, divergence="total-variation"), expected)
    at_reference = make_inputs(ref_log_probs=inputs.log_probs.detach())
    for divergence in ("total-variation", "pearson", "hellinger"):
        loss, metrics = LOSSES["f_divergence"](at_reference, divergence=divergence)
        assert (loss == 0).all() and metrics["coefficient_mean"] == 1
        torch.testing.assert_close(gradients(LOSSES["f_divergence"], at_reference, divergence=divergence), expected)


def test_pearson_pushes_back_what_has_risen_too_far():
    inputs = make_inputs()
    far = make_inputs(ref_log_probs=inputs.log_probs.detach() - 2.5)
    signs = gradients(LOSSES["f_divergence"], far, beta=1.0)[inputs.mask].sign()
    assert (signs == 1).all()


def test_chord_mu_runs_from_grpo_to_cross_entropy_of_recorded_responses():
    inputs = make_inputs()
    recorded = inputs.mask & (inputs.sources != 2)[inputs.sequence_ids]
    assert torch.equal(LOSSES["chord_mu"](inputs, mu=0.0)[0], LOSSES["grpo"](inputs)[0])
    assert torch.equal(LOSSES["chord_mu"](inputs, mu=1.0)[0], LOSSES["sft"](inputs)[0].where(recorded, 0.0))
    assert torch.equal(LOSSES["chord_phi"](inputs, mu=0.0)[0], LOSSES["grpo"](inputs)[0])


def test_chord_with_separate_means_is_a_mean_over_each_part():
    inputs = make_inputs()
    own = inputs.mask & (inputs.sources == 2)[inputs.sequence_ids]
    recorded = inputs.mask & ~own
    loss = LOSSES["chord_mu"](inputs, mu=0.3, separate_means=True)[0]
    grpo, sft = LOSSES["grpo"](inputs)[0][own].mean(), LOSSES["sft"](inputs)[0][recorded].mean()
    assert float(loss.detach().sum() / inputs.mask.sum()) == pytest.approx(float(0.7 * grpo + 0.3 * sft), rel=1e-6)


def test_chord_with_separate_means_of_one_part_only():
    for source in (0, 2):
        one = make_inputs(sources=torch.full((len(RESPONSES),), source))
        for name in ("chord_mu", "chord_phi"):
            assert torch.equal(LOSSES[name](one, separate_means=True)[0], LOSSES[name](one)[0])


def test_uft_without_hints_is_grpo_on_own_samples():
    inputs = make_inputs(sources=torch.full((len(RESPONSES),), 2))
    drawn = dataclasses.replace(inputs, rollout_log_probs=inputs.log_probs.detach())
    assert torch.equal(LOSSES["uft"](drawn)[0], LOSSES["grpo"](drawn)[0])


def test_uft_is_a_mean_over_drawn_tokens_and_one_over_hints():
    inputs = make_inputs()
    own = inputs.mask & (inputs.sources == 2)[inputs.sequence_ids]
    hint = own & inputs.rollout_log_probs.isnan()
    loss, metrics = LOSSES["uft"](inputs, hint_coef=0.3)
    grpo, sft = LOSSES["grpo"](inputs)[0][own & ~hint].mean(), LOSSES["sft"](inputs)[0][hint].mean()
    assert float(loss.detach().sum() / inputs.mask.sum()) == pytest.approx(float(grpo + 0.3 * sft), rel=1e-5)
    assert metrics["hint_frac"].item() == pytest.approx(float(hint.sum() / inputs.mask.sum()))


def test_uft_of_hints_only_reinforces_nothing():
    inputs = make_inputs(rollout_log_probs=torch.full_like(make_inputs().log_probs, math.nan).detach())
    own = inputs.mask & (inputs.sources == 2)[inputs.sequence_ids]
    loss = LOSSES["uft"](inputs, hint_coef=1.0)[0]
    assert float(loss.detach().sum() / inputs.mask.sum()) == pytest.approx(
        float(-inputs.log_probs[own].mean()), rel=1e-6
    )


def test_srft_without_entropy_has_constant_weights():
    inputs = make_inputs(entropy=torch.zeros_like(make_inputs().entropy))
    for sign in ("paper", "code"):
        _, metrics = LOSSES["srft"](inputs, entropy_sign=sign)
        tokens = tokens_of(inputs).values()
        assert metrics["sft_weight_mean"].item() == pytest.approx(mean(0.5 * (not k.own) for k in tokens))


# Metrics


def test_shares_of_coefficients_fill_the_line():
    coefficient = torch.tensor([0.0, 0.09, 0.1, 0.49, 0.5, 0.99, 1.0, 1.0 + 1e-7, 1.1, 50.0, 7.0])
    mask = torch.ones(11)
    mask[10] = 0
    shares = coefficient_shares(coefficient, mask, "c")
    assert {name: round(10 * value.item()) for name, value in shares.items()} == {
        "c_below_0.1_frac": 2,
        "c_0.1_to_0.5_frac": 2,
        "c_0.5_to_1_frac": 2,
        "c_one_frac": 2,
        "c_above_1_frac": 2,
    }
    some = coefficient_shares(coefficient, mask, "c", chosen=coefficient > 1)
    assert sum(value.item() for value in some.values()) == pytest.approx(0.3)  # 1 + 1e-7 is one of them


@pytest.mark.parametrize("name", ["gft", "dft", "probability", "chord_phi", "cadft"])
def test_shares_of_coefficients_are_reported(name):
    inputs = make_inputs()
    p = [k.p for k in tokens_of(inputs).values() if name != "chord_phi" or not k.own]
    values = {
        "gft": [value if value < 0.7 else 1.0 for value in p],
        "dft": p,
        "probability": p,
        "chord_phi": [value * (1 - value) for value in p],
    }
    prefix = "phi" if name == "chord_phi" else "coefficient"
    _, metrics = LOSSES[name](inputs)
    shares = {key: value.item() for key, value in metrics.items() if key.startswith(prefix) and "_frac" in key}
    assert len(shares) == 5
    assert sum(shares.values()) == pytest.approx(len(p) / int(inputs.mask.sum()))
    if name in values:
        middle = sum(0.1 <= value < 0.5 for value in values[name]) / int(inputs.mask.sum())
        assert shares[f"{prefix}_0.1_to_0.5_frac"] == pytest.approx(middle) and middle > 0


# What is declared and what is refused


def test_declarations():
    assert default_schedules(LOSSES["chord_mu"]) == {"mu": "0.9:0.05:cosine:200"}
    assert {name: natural_responses(LOSSES[name]) for name in ("chord_mu", "srft", "uft", "asft", "f_divergence")} == {
        "chord_mu": "mixed",
        "srft": "mixed",
        "uft": "own",
        "asft": "recorded",
        "f_divergence": "recorded",
    }


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("asft", {"ref_kl"}),
        ("f_divergence", {"ref_log_probs"}),
        ("chord_mu", {"advantages", "old_log_probs"}),
        ("srft", {"advantages", "old_log_probs", "entropy"}),
        ("uft", {"advantages", "old_log_probs", "rollout_log_probs"}),
    ],
)
def test_missing_inputs_are_named(name, fields):
    assert required_inputs(LOSSES[name]) == fields and is_token_local(LOSSES[name])
    for field in fields:
        with pytest.raises(ValueError, match=f"{name}.*LossInputs.{field}"):
            LOSSES[name](make_inputs(**{field: None}))
    known = {"advantages", "old_log_probs", "ref_log_probs", "rollout_log_probs", "entropy", "ref_kl", "token_groups"}
    LOSSES[name](make_inputs(**dict.fromkeys(known - fields)))


@pytest.mark.parametrize(
    ("name", "hyper", "value"),
    [
        *(("asft", "lam", value) for value in (-0.1, math.inf, math.nan)),
        *(("f_divergence", "beta", value) for value in (0.0, -1.0, math.inf, math.nan)),
        ("f_divergence", "divergence", "kl"),
        *((name, "mu", value) for name in ("chord_mu", "chord_phi") for value in (-0.1, 1.1, math.nan)),
        *(("srft", "sft_weight", value) for value in (-0.1, math.inf, math.nan)),
        *(("srft", "positive_weight", value) for value in (-0.1, math.inf, math.nan)),
        ("srft", "entropy_sign", "plus"),
        *(("uft", "hint_coef", value) for value in (-0.1, math.inf, math.nan)),
        ("uft", "tis_clip", 0.0),
        *((name, clip, -0.1) for name in ("chord_mu", "srft", "uft") for clip in ("clip_low", "clip_high")),
    ],
)
def test_hyper_parameters_out_of_range_are_named(name, hyper, value):
    with pytest.raises(ValueError, match=f"{hyper} is {value!r}; it has to be"):
        LOSSES[name](make_inputs(), **{hyper: value})


def test_no_token_at_all():
    nothing = make_inputs(mask=torch.zeros_like(make_inputs().mask))
    for name in ("asft", "f_divergence", "chord_mu", "chord_phi", "srft", "uft"):
        for hyper in ({}, {"separate_means": True})[: 2 if name.startswith("chord") else 1]:
            loss, metrics = LOSSES[name](nothing, **hyper)
            assert (loss == 0).all() and all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    "name", ["asft", "f_divergence", "chord_mu", "srft", "uft", "iw_sft", "poft", "sft_go", "cadft", "discriminative"]
)
@pytest.mark.parametrize("junk", [0.0, -700.0, 1e38])
def test_masked_positions_change_nothing(name, junk):
    clean = make_inputs()
    filled = {
        field: getattr(clean, field).detach().where(clean.mask, sign * junk)
        for field, sign in (
            ("log_probs", 1),
            ("old_log_probs", -1),
            ("ref_log_probs", -1),
            ("entropy", 1),
            ("ref_kl", 1),
        )
    }
    filled["log_probs"].requires_grad_()
    dirty = make_inputs(**filled, rollout_log_probs=clean.rollout_log_probs.where(clean.mask, math.nan))
    (loss, metrics), (expected, expected_metrics) = (LOSSES[name](inputs) for inputs in (dirty, clean))
    assert torch.equal(loss, expected) and metrics == expected_metrics
    assert torch.equal(gradients(LOSSES[name], dirty), gradients(LOSSES[name], clean))
