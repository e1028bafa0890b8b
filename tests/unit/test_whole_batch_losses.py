"""Losses that look at a whole response or the global batch, and that no loss depends on how the batch is cut up."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from ragged_responses import (
    RESPONSES,
    add,
    assert_equals_oracle,
    by_response,
    gradients,
    make_inputs,
    mean,
    of_responses,
    on_context_ranks,
    tokens_of,
)

from gft_megatron.losses import LOSSES, required_inputs, response_figures
from gft_megatron.losses.inputs import batch_sums, batch_sums_of_policy, batch_sums_of_this_batch, default_schedules
from gft_megatron.losses.terms import with_terms

NUM_TOKENS = sum(response[4] for response in RESPONSES)

# CADFT


def cadft_weights(tokens, beta):
    scores = {i: mean(-t.log_prob for t in response) for i, response in by_response(tokens).items()}
    center = mean(scores.values())
    deviation = math.sqrt(mean((score - center) ** 2 for score in scores.values()))
    return {i: math.exp(-beta * max(0.0, (score - center) / (deviation + 1e-6))) for i, score in scores.items()}


def cadft(beta):
    def formula(tokens):
        weights = cadft_weights(tokens, beta)
        assert sum(weight < 1 for weight in weights.values()) >= 2 and sum(w == 1 for w in weights.values()) >= 2
        return {t: -weights[k.response] * k.p * k.log_prob for t, k in tokens.items()}

    return formula


def weight_quantiles(scores, center, deviation, beta):
    weights = np.exp(-beta * np.maximum(0.0, (np.asarray(scores) - center) / (deviation + 1e-6)))
    return dict(zip(("weight_q10", "weight_q50", "weight_q90"), np.quantile(weights, [0.1, 0.5, 0.9]), strict=True))


def test_cadft_tells_the_quantiles_of_its_weights():
    scores = np.random.default_rng(3).beta(5.0, 1.0, size=57)  # most are above the mean
    sample_nll, beta = torch.from_numpy(scores), 2.5
    tell = response_figures(LOSSES["cadft"])
    exact = weight_quantiles(scores, scores.mean(), scores.std(), beta)
    assert exact["weight_q10"] < exact["weight_q50"] < exact["weight_q90"] == 1
    assert tell(sample_nll, None, beta=beta) == pytest.approx(exact, rel=1e-9)
    assert tell(sample_nll, None) == pytest.approx(weight_quantiles(scores, scores.mean(), scores.std(), 1.0), rel=1e-9)
    # --batch-statistics previous-step: the weights that the loss had are of the sums that it read.
    before = {"sequences": 4.0, "score": 4.0, "score_squared": 4.0 + 4 * 0.5**2}
    sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in before.items()}
    expected = weight_quantiles(scores, 1.0, 0.5, beta)
    assert tell(sample_nll, sums, beta=beta) == pytest.approx(expected, rel=1e-9)
    mixed = with_terms(LOSSES["cadft"], terms=["kl_coef", "mix_coef"], mix=LOSSES["sft_go"])
    tell_mixed, hyper = response_figures(mixed), {"beta": beta, "lam": 0.5, "kl_coef": 0.1, "mix_coef": 0.1}
    assert tell_mixed(sample_nll, None, **hyper) == pytest.approx(exact, rel=1e-9)
    sums = {f"main_{name}": value for name, value in sums.items()} | {"mix_score": torch.zeros(2)}
    assert tell_mixed(sample_nll, sums, **hyper) == pytest.approx(expected, rel=1e-9)
    assert response_figures(with_terms(LOSSES["sft"], terms=["kl_coef"])) is None


# SFT-GO


def worst_of(tokens):
    """The group with the largest mean, the later one of equals."""
    means = {g: mean(-t.log_prob for t in tokens if t.group == g) for g in sorted({t.group for t in tokens})}
    return max(reversed(means), key=means.__getitem__)


def sft_go(lam):
    def formula(tokens):
        worst = worst_of(tokens.values())
        size = sum(k.group == worst for k in tokens.values())
        return {
            t: -((1 - lam) + (lam * len(tokens) / size if k.group == worst else 0.0)) * k.log_prob
            for t, k in tokens.items()
        }

    return formula


def sft_go_per_sample(lam):
    def formula(tokens):
        losses, winners = {}, set()
        for response in by_response(tokens).values():
            worst = worst_of(response)
            winners.add(worst)
            size = sum(k.group == worst for k in response)
            for k in response:
                weight = (1 - lam) + (lam * len(response) / size if k.group == worst else 0.0)
                losses[id(k)] = -weight * k.log_prob
        assert len(winners) > 1
        return {t: losses[id(k)] for t, k in tokens.items()}

    return formula


# iw-SFT and PoFT


def iw_sft(scale=1.0, largest=16.0):
    def formula(tokens):
        weights = {
            i: min(math.exp(scale * mean(k.log_prob.item() - k.ref for k in response)), largest)
            for i, response in by_response(tokens).items()
        }
        assert any(w == largest for w in weights.values()) and any(w < largest for w in weights.values())
        return {t: -weights[k.response] * k.log_prob for t, k in tokens.items()}

    return formula


def iw_sft_by_token(low, high):
    def formula(tokens):
        ratios = {t: math.exp(k.log_prob.item() - k.ref) for t, k in tokens.items()}
        assert min(ratios.values()) < low and max(ratios.values()) > high
        return {t: -min(max(ratios[t], low), high) * k.log_prob for t, k in tokens.items()}

    return formula


def poft(beta=1.0, gamma=0.0):
    def formula(tokens):
        losses = {}
        for response in by_response(tokens).values():
            margin = sum(beta * (k.log_prob - k.ref) for k in response) / len(response) + gamma
            value = -torch.nn.functional.logsigmoid(margin)
            for k in response:
                losses[id(k)] = value
        return {t: losses[id(k)] for t, k in tokens.items()}

    return formula


# Discriminative Finetuning


def discriminative(score, of_means):
    def formula(tokens):
        responses, losses = by_response(tokens), {}
        experts = {i for i, response in responses.items() if response[0].source == 0}
        groups = [[i for i in responses if i % 2 == parity] for parity in (0, 1)]
        for members in groups:
            negatives = {i: math.exp(score(responses[i])) for i in members if i not in experts}
            for i in members:
                weight = 1.0 if i in experts else -negatives[i] / sum(negatives.values())
                scale = len(tokens) / len(experts) / len(responses[i]) if of_means else 1.0
                for k in responses[i]:
                    losses[id(k)] = -weight * scale * k.log_prob
            assert len(negatives) > 1 and len(experts.intersection(members)) == 1
        return {t: losses[id(k)] for t, k in tokens.items()}

    return formula


def ratio_of_response(response):
    return sum(k.log_prob.item() - k.ref for k in response)


def cool_mean(response):
    return mean(k.log_prob for k in response) / 0.3


CASES = {
    "cadft": ("cadft", {}, cadft(1.0)),
    "cadft strong": ("cadft", {"beta": 3.0}, cadft(3.0)),
    "sft_go": ("sft_go", {}, sft_go(0.9)),
    "sft_go half": ("sft_go", {"lam": 0.5}, sft_go(0.5)),
    "sft_go of samples": ("sft_go", {"lam": 0.7, "per_sample": True}, sft_go_per_sample(0.7)),
    "iw_sft": ("iw_sft", {}, iw_sft()),
    "iw_sft low": ("iw_sft", {"weight_scale": 0.5, "weight_max": 1.5}, iw_sft(0.5, 1.5)),
    "iw_sft by token": ("iw_sft", {"token_clip": 0.8}, iw_sft_by_token(0.2, 1.8)),
    "discriminative": ("discriminative", {}, discriminative(ratio_of_response, of_means=False)),
    "discriminative_mean": ("discriminative_mean", {}, discriminative(cool_mean, of_means=True)),
    "poft": ("poft", {}, poft()),
    "poft sharp": ("poft", {"beta": 2.5, "gamma": -0.4}, poft(2.5, -0.4)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_float64(case):
    name, hyper, formula = CASES[case]
    assert_equals_oracle(LOSSES[name], make_inputs(), hyper, formula)


# However the global batch is cut up

EVERY_LOSS = [
    *((name, {}) for name in LOSSES),
    ("sft_go", {"per_sample": True}),
    ("chord_mu", {"separate_means": True}),
    ("chord_phi", {"separate_means": True}),
]


@pytest.mark.parametrize(("name", "hyper"), EVERY_LOSS, ids=str)
def test_micro_batches_of_one_batch_have_its_losses_and_metrics(name, hyper):
    loss, inputs = LOSSES[name], make_inputs()
    expected, expected_metrics = loss(inputs, **hyper)
    parts = [of_responses(inputs, first, last) for first, last in ((0, 3), (3, 4), (4, 8))]
    sums = batch_sums(loss)
    if sums is not None:
        parts = [dataclasses.replace(part, batch=add([sums(each) for each in parts])) for part in parts]
    outputs = [loss(part, **hyper) for part in parts]
    torch.testing.assert_close(torch.cat([per_token for per_token, _ in outputs]), expected, rtol=1e-6, atol=0)
    for key, value in expected_metrics.items():
        together = sum(metrics[key] * part.mask.sum() for part, (_, metrics) in zip(parts, outputs, strict=True))
        torch.testing.assert_close(together / NUM_TOKENS, value, rtol=1e-5, atol=1e-7)
    if sums is not None:
        alone = torch.cat([loss(dataclasses.replace(part, batch=None), **hyper)[0] for part in parts])
        needs_batch = hyper or name in ("cadft", "sft_go", "uft", "discriminative", "discriminative_mean")
        assert torch.equal(alone, expected) != (bool(needs_batch) and hyper != {"per_sample": True})


@pytest.mark.parametrize(("name", "hyper"), EVERY_LOSS, ids=str)
def test_context_parallel_ranks_have_the_losses_of_one(name, hyper):
    inputs = make_inputs()
    # Each rank has two chunks of each response; of short ones one rank has nothing.
    place = torch.cat([torch.arange(response[4] + 2) * 4 // (response[4] + 2) for response in RESPONSES])
    positions = [((place == rank) | (place == 3 - rank)).nonzero()[:, 0] for rank in (0, 1)]
    together = on_context_ranks(LOSSES[name], inputs, positions, **hyper)
    torch.testing.assert_close(together, LOSSES[name](inputs, **hyper)[0].detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if batch_sums(loss) is not None])
def test_batch_sums_are_additive_and_told_apart_from_those_that_take_a_forward_pass(name):
    inputs, sums = make_inputs(), batch_sums(LOSSES[name])
    whole = sums(inputs)
    assert all(value.dtype == torch.float64 and value.dim() <= 1 for value in whole.values())
    assert not any(value.requires_grad for value in whole.values())
    nothing = {name: torch.full_like(inputs.log_probs, math.nan) for name in ("log_probs", "entropy", "ref_kl")}
    blind = sums(make_inputs(**nothing))
    same = all(torch.equal(blind[key], whole[key]) for key in whole)
    assert same != batch_sums_of_policy(LOSSES[name])


def test_losses_without_batch_sums_take_no_forward_pass():
    assert not batch_sums_of_policy(LOSSES["dft"])


# Limits


def test_cadft_without_beta_is_dft():
    inputs = make_inputs()
    dft = LOSSES["dft"](inputs)[0]
    loss, metrics = LOSSES["cadft"](inputs, beta=0.0)
    assert metrics["weight_mean"] == 1 and metrics["downweighted_frac"] == 0
    torch.testing.assert_close(loss, dft, rtol=1e-6, atol=0)


def test_cadft_of_equal_responses_and_of_one_is_dft():
    inputs = make_inputs()
    equal = make_inputs(log_probs=torch.full_like(inputs.log_probs, -0.5))  # sums without rounding
    torch.testing.assert_close(LOSSES["cadft"](equal)[0], LOSSES["dft"](equal)[0], rtol=1e-6, atol=0)
    one = of_responses(inputs, 2, 3)
    assert torch.equal(LOSSES["cadft"](one)[0], LOSSES["dft"](one)[0])


def test_cadft_metrics():
    inputs = make_inputs()
    tokens = tokens_of(inputs)
    weights = cadft_weights(tokens, 1.0)
    each = [weights[k.response] for k in tokens.values()]
    _, metrics = LOSSES["cadft"](inputs)
    expected = {
        "coefficient_mean": mean(weights[k.response] * k.p for k in tokens.values()),
        "weight_mean": mean(each),
        "downweighted_frac": mean(weight < 1 for weight in each),
        "weight_below_0.1_frac": mean(weight < 0.1 for weight in each),
        "weight_0.1_to_0.5_frac": mean(0.1 <= weight < 0.5 for weight in each),
        "weight_0.5_to_1_frac": mean(0.5 <= weight < 1 for weight in each),
        "weight_one_frac": mean(weight == 1 for weight in each),
    }
    for key, value in expected.items():
        assert metrics[key].item() == pytest.approx(value, rel=1e-5), key
    assert sum(expected[f"weight_{part}_frac"] for part in ("0.1_to_0.5", "0.5_to_1", "one")) > 0.9


def test_sft_go_without_lam_is_cross_entropy_and_with_all_of_it_the_mean_over_the_worst_group():
    inputs = make_inputs()
    sft = LOSSES["sft"](inputs)[0]
    for per_sample in (False, True):
        assert torch.equal(LOSSES["sft_go"](inputs, lam=0.0, per_sample=per_sample)[0], sft)
    loss, metrics = LOSSES["sft_go"](inputs, lam=1.0)
    worst = worst_of(tokens_of(inputs).values())
    in_worst = inputs.mask & (inputs.token_groups == worst)
    assert (loss[~in_worst] == 0).all()
    assert float(loss.detach().sum()) / NUM_TOKENS == pytest.approx(float(sft[in_worst].mean()), rel=1e-6)
    assert metrics["coefficient_mean"].item() == pytest.approx(1.0)


def test_sft_go_with_all_of_lam_and_two_groups_of_which_one_is_harder_is_rho_1():
    """Rho-1 keeps the selected tokens and divides by their number."""
    inputs = make_inputs()
    selected = (inputs.log_probs.detach() < -0.8) & inputs.mask
    loss, metrics = LOSSES["sft_go"](make_inputs(token_groups=selected.long()), lam=1.0)
    assert float(loss.detach().sum()) / NUM_TOKENS == pytest.approx(float(-inputs.log_probs[selected].mean()), rel=1e-6)
    assert metrics["important_wins_frac"] == 1


def test_sft_go_of_one_group_is_cross_entropy():
    inputs = make_inputs()
    for group in (0, 1, 63):
        one = make_inputs(token_groups=torch.full_like(inputs.token_groups, group))
        for per_sample in (False, True):
            loss = LOSSES["sft_go"](one, per_sample=per_sample)[0]
            torch.testing.assert_close(loss, LOSSES["sft"](inputs)[0], rtol=1e-6, atol=0)


def test_sft_go_ties_go_to_the_important_group():
    inputs = make_inputs(log_probs=torch.full((len(make_inputs().mask),), -0.5))
    groups = (torch.arange(len(inputs.mask)) % 2).where(inputs.mask, -1)
    _, metrics = LOSSES["sft_go"](dataclasses.replace(inputs, token_groups=groups))
    assert metrics["important_wins_frac"] == 1 and metrics["group_0_nll"] == metrics["group_1_nll"] == 0.5


@pytest.mark.parametrize("per_sample", [False, True])
def test_sft_go_groups_without_tokens_cannot_win_against_one_without_loss(per_sample):
    inputs = make_inputs()
    sure = {"log_probs": torch.zeros_like(inputs.log_probs), "token_groups": torch.zeros_like(inputs.token_groups)}
    assert LOSSES["sft_go"](make_inputs(**sure), per_sample=per_sample)[1]["worst_group_frac"] == 1


def test_sft_go_metrics():
    inputs = make_inputs()
    tokens = tokens_of(inputs)
    for per_sample in (False, True):
        _, metrics = LOSSES["sft_go"](inputs, per_sample=per_sample)
        sets = by_response(tokens) if per_sample else dict.fromkeys(range(len(RESPONSES)), list(tokens.values()))
        worst = {i: worst_of(response) for i, response in sets.items()}
        expected = {
            "worst_group_frac": mean(k.group == worst[k.response] for k in tokens.values()),
            "important_wins_frac": mean(worst[k.response] == 1 for k in tokens.values()),
            "group_0_nll": mean(-k.log_prob for k in tokens.values() if k.group == 0),
            "group_1_nll": mean(-k.log_prob for k in tokens.values() if k.group == 1),
        }
        for key, value in expected.items():
            assert metrics[key].item() == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("group", [-1, 64])
def test_a_token_of_no_group_is_refused(group):
    inputs = make_inputs()
    groups = inputs.token_groups.clone()
    groups[1] = group
    with pytest.raises(ValueError, match=f"group {group}; .*tools/score_tokens.py"):
        LOSSES["sft_go"](make_inputs(token_groups=groups))


def test_iw_sft_at_the_reference_and_without_scale_is_cross_entropy():
    inputs = make_inputs()
    sft = LOSSES["sft"](inputs)[0]
    at_reference = make_inputs(ref_log_probs=inputs.log_probs.detach())
    for hyper in ({}, {"token_clip": 0.8}):
        assert torch.equal(LOSSES["iw_sft"](at_reference, **hyper)[0], sft)
        assert torch.equal(LOSSES["iw_sft"](inputs, weight_scale=0.0, **hyper)[0], sft)


def test_poft_at_the_reference_has_half_the_gradient_of_cross_entropy():
    inputs = make_inputs()
    at_reference = make_inputs(ref_log_probs=inputs.log_probs.detach())
    torch.testing.assert_close(gradients(LOSSES["poft"], at_reference), gradients(LOSSES["sft"], inputs) / 2)


@pytest.mark.parametrize("name", ["discriminative", "discriminative_mean"])
def test_discriminative_of_demonstrations_alone_is_cross_entropy(name):
    """Of the mean over responses, for the second."""
    inputs = make_inputs(sources=torch.zeros(len(RESPONSES), dtype=torch.int64))
    loss, metrics = LOSSES[name](inputs)
    sft = LOSSES["sft"](inputs)[0]
    means = [mean(sft[inputs.mask & (inputs.sequence_ids == i)]) for i in range(len(RESPONSES)) if RESPONSES[i][4]]
    expected = float(sft.detach().sum()) / NUM_TOKENS if name == "discriminative" else mean(means)
    assert float(loss.detach().sum()) / NUM_TOKENS == pytest.approx(expected, rel=1e-6)
    assert metrics["negative_weight_mean"] == 0


def test_discriminative_without_a_demonstration_has_no_loss():
    inputs = make_inputs(sources=torch.ones(len(RESPONSES), dtype=torch.int64))
    for name in ("discriminative", "discriminative_mean"):
        assert (LOSSES[name](inputs)[0] == 0).all()


def test_discriminative_knows_scores_far_from_zero():
    inputs = make_inputs()
    for shift in (500.0, -500.0):
        far = make_inputs(ref_log_probs=(inputs.ref_log_probs - shift).where(inputs.mask, 0.0))
        loss, _ = LOSSES["discriminative"](far)
        loss.sum().backward()
        assert loss.isfinite().all() and far.log_probs.grad.isfinite().all()


def test_discriminative_needs_the_sums_of_its_own_batch():
    assert batch_sums_of_this_batch(LOSSES["discriminative"]) and not batch_sums_of_this_batch(LOSSES["cadft"])
    with pytest.raises(ValueError, match=r"group_ids has 65536; groups are numbered in \[0, 65536\)"):
        LOSSES["discriminative"](make_inputs(group_ids=torch.full((len(RESPONSES),), 65536)))


# What is declared and what is refused


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("cadft", set()),
        ("sft_go", {"token_groups"}),
        ("iw_sft", {"ref_log_probs"}),
        ("poft", {"ref_log_probs"}),
        ("discriminative", {"ref_log_probs"}),
        ("discriminative_mean", set()),
    ],
)
def test_missing_inputs_are_named(name, fields):
    assert required_inputs(LOSSES[name]) == fields
    for field in fields:
        with pytest.raises(ValueError, match=f"{name}.*LossInputs.{field}"):
            LOSSES[name](make_inputs(**{field: None}))
    others = {"advantages", "old_log_probs", "ref_log_probs", "entropy", "ref_kl", "token_groups"} - fields
    LOSSES[name](make_inputs(**dict.fromkeys(others)))


def test_sft_go_returns_to_cross_entropy():
    assert default_schedules(LOSSES["sft_go"]) == {"lam": "0.9:0:linear"}


@pytest.mark.parametrize(
    ("name", "hyper", "value"),
    [
        *(("cadft", "beta", value) for value in (-0.1, math.inf, math.nan)),
        *(("sft_go", "lam", value) for value in (-0.1, 1.1, math.nan)),
        *(("iw_sft", "weight_scale", value) for value in (-0.1, math.inf, math.nan)),
        *(("iw_sft", "weight_max", value) for value in (0.0, -1.0, math.nan)),
        *(("iw_sft", "token_clip", value) for value in (-0.1, math.nan)),
        *(("poft", "beta", value) for value in (0.0, -1.0, math.inf, math.nan)),
        *(("poft", "gamma", value) for value in (math.inf, math.nan)),
    ],
)
def test_hyper_parameters_out_of_range_are_named(name, hyper, value):
    with pytest.raises(ValueError, match=f"{hyper} is {value}; it has to be"):
        LOSSES[name](make_inputs(), **{hyper: value})


def test_no_token_at_all():
    nothing = make_inputs(mask=torch.zeros_like(make_inputs().mask))
    for name in ("cadft", "sft_go", "iw_sft", "poft", "discriminative", "discriminative_mean"):
        loss, metrics = LOSSES[name](nothing)
        assert (loss == 0).all() and all(math.isfinite(value) for value in metrics.values())
