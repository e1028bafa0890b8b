"""The terms around a loss: each equals its formula in float64, and together they are one loss like any other."""

import dataclasses
import math

import pytest
import torch
from ragged_responses import add, assert_equals_oracle, make_inputs, of_responses, on_context_ranks, tokens_of

from gft_megatron.losses import LOSSES, is_token_local, required_inputs
from gft_megatron.losses.inputs import batch_sums, batch_sums_of_policy, default_schedules, natural_responses
from gft_megatron.losses.terms import entropy_bonus, kl_penalty, with_terms

COEFFICIENTS = {"kl_coef": 0.3, "entropy_coef": 0.02, "mix_coef": 0.7}


def divergence(token, estimator):
    difference = token.log_prob - token.ref
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    square = difference**2 / 2
    return square if estimator == "k2" else square + (difference - square).item()


def surrogate(token):
    if not token.own:
        return token.log_prob * 0
    ratio = (token.log_prob - token.old).exp()
    return -torch.minimum(ratio * token.advantage, ratio.clamp(0.8, 1.2) * token.advantage)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_equals_float64(estimator):
    def loss(inputs):
        return kl_penalty(inputs, estimator=estimator), {}

    assert_equals_oracle(loss, make_inputs(), {}, lambda ts: {t: divergence(k, estimator) for t, k in ts.items()})


def test_kl_estimators_in_the_mean():
    """Over all labels of one position, weighted as the policy draws them: which value and which gradient is exact."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 9, generator=generator, dtype=torch.float64).float().requires_grad_()
    ref = torch.randn(1, 9, generator=generator).log_softmax(-1)[0]
    log_p = logits.log_softmax(-1)[0]
    p, ref_p = log_p.detach().exp(), ref.exp()
    forward, reverse = (p * (log_p.detach() - ref)).sum(), (ref_p * (ref - log_p.detach())).sum()
    to_forward = torch.autograd.grad((log_p.exp() * (log_p - ref)).sum(), logits, retain_graph=True)[0]
    to_reverse = torch.autograd.grad((ref_p * (ref - log_p)).sum(), logits, retain_graph=True)[0]
    inputs = dataclasses.replace(
        make_inputs().at(torch.arange(9)),
        log_probs=log_p, ref_log_probs=ref, mask=torch.ones(9), sequence_ids=torch.zeros(9, dtype=torch.int64),
    )  # fmt: skip
    assert abs(forward - reverse) > 0.05
    for estimator, is_unbiased, direction in (
        ("k1", True, to_forward),
        ("k2", False, to_forward),
        ("k3", True, to_reverse),
    ):
        values = kl_penalty(inputs, estimator=estimator)
        assert torch.isclose((p * values).sum(), forward, rtol=1e-5) == is_unbiased, estimator
        gradient = torch.autograd.grad((p * values).sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(gradient, direction, rtol=1e-5, atol=1e-6)


def test_at_the_reference_there_is_no_divergence():
    inputs = make_inputs()
    inputs = make_inputs(ref_log_probs=inputs.log_probs.detach())
    for estimator in ("k1", "k2", "k3"):
        assert (kl_penalty(inputs, estimator=estimator) == 0).all()


# All of them together


def formula(estimator):
    def losses(tokens):
        return {
            t: surrogate(k)
            + COEFFICIENTS["kl_coef"] * divergence(k, estimator)
            - COEFFICIENTS["entropy_coef"] * k.entropy
            + (0 if k.own else COEFFICIENTS["mix_coef"] * (-k.p * k.log_prob + 0.2 * k.ref_kl))
            for t, k in tokens.items()
        }

    return losses


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_loss_with_all_terms_equals_float64(estimator):
    loss = with_terms(LOSSES["grpo"], terms=list(COEFFICIENTS), kl_estimator=estimator, mix=LOSSES["asft"])
    assert_equals_oracle(loss, make_inputs(), {**COEFFICIENTS, "lam": 0.2}, formula(estimator))


def test_declarations_are_those_of_the_parts():
    loss = with_terms(LOSSES["grpo"], terms=list(COEFFICIENTS), mix=LOSSES["asft"])
    assert required_inputs(loss) == {"advantages", "old_log_probs", "ref_log_probs", "entropy", "ref_kl"}
    assert is_token_local(loss) and batch_sums(loss) is None and not batch_sums_of_policy(loss)
    assert natural_responses(loss) == "mixed" and loss.__name__ == "grpo"

    alone = with_terms(LOSSES["grpo"], terms=["entropy_coef"])
    assert required_inputs(alone) == {"advantages", "old_log_probs", "entropy"} and natural_responses(alone) == "own"

    counts = with_terms(LOSSES["chord_mu"], terms=["kl_coef"])
    assert batch_sums(counts) is not None and not batch_sums_of_policy(counts)
    assert default_schedules(counts) == {"mu": "0.9:0.05:cosine:200"}

    mixed = with_terms(LOSSES["uft"], terms=["mix_coef"], mix=LOSSES["cadft"])
    assert not is_token_local(mixed) and batch_sums_of_policy(mixed)
    assert natural_responses(with_terms(LOSSES["sft"], terms=["mix_coef"], mix=LOSSES["dft"])) == "recorded"


def test_coefficients_of_zero_leave_the_loss_alone():
    loss = with_terms(LOSSES["grpo"], terms=list(COEFFICIENTS), mix=LOSSES["dft"])
    assert torch.equal(loss(make_inputs(), **dict.fromkeys(COEFFICIENTS, 0.0))[0], LOSSES["grpo"](make_inputs())[0])


def test_hyper_parameters_reach_their_parts():
    inputs = make_inputs()
    loss = with_terms(LOSSES["gft"], terms=["mix_coef"], mix=LOSSES["cadft"])
    hyper = {"tau": 0.2, "beta": 2.0}
    main, mix = LOSSES["gft"](inputs, tau=0.2)[0], dataclasses.replace(inputs, mask=inputs.mask & recorded(inputs))
    expected = main + 0.5 * LOSSES["cadft"](mix, beta=2.0)[0]
    assert torch.equal(loss(inputs, mix_coef=0.5, **hyper)[0], expected)
    both = with_terms(LOSSES["asft"], terms=["mix_coef"], mix=LOSSES["sft_go"])
    expected = LOSSES["asft"](inputs, lam=0.4)[0] + LOSSES["sft_go"](mix, lam=0.4)[0]
    assert torch.equal(both(inputs, mix_coef=1.0, lam=0.4)[0], expected)
    with pytest.raises(TypeError, match="nonsense"):
        loss(inputs, mix_coef=0.5, nonsense=1)


def recorded(inputs):
    return (inputs.sources != 2)[inputs.sequence_ids]


def test_metrics_of_each_part():
    inputs = make_inputs()
    loss = with_terms(LOSSES["grpo"], terms=list(COEFFICIENTS), mix=LOSSES["dft"])
    _, metrics = loss(inputs, **COEFFICIENTS)
    tokens = list(tokens_of(inputs).values())
    expected = {
        "coefficient_mean": sum(float(k.ratio) for k in tokens if k.own),
        "kl_mean": sum(float(divergence(k, "k3")) for k in tokens),
        "mix_loss": sum(float(-k.p * k.log_prob) for k in tokens if not k.own),
        "mix_coefficient_mean": sum(k.p for k in tokens if not k.own),
    }
    for name, total in expected.items():
        assert metrics[name].item() == pytest.approx(total / len(tokens), rel=1e-5), name


GLOBAL = [("sft_go", "cadft"), ("chord_mu", "sft_go"), ("grpo", "cadft"), ("uft", "dft")]


@pytest.mark.parametrize(("main", "mix"), GLOBAL)
def test_however_the_batch_is_cut_up(main, mix):
    inputs = make_inputs()
    loss = with_terms(LOSSES[main], terms=list(COEFFICIENTS), mix=LOSSES[mix])
    expected, expected_metrics = loss(inputs, **COEFFICIENTS)
    parts = [of_responses(inputs, first, last) for first, last in ((0, 2), (2, 3), (3, 8))]
    sums = batch_sums(loss)
    parts = [dataclasses.replace(part, batch=add([sums(each) for each in parts])) for part in parts]
    outputs = [loss(part, **COEFFICIENTS) for part in parts]
    torch.testing.assert_close(torch.cat([per_token for per_token, _ in outputs]), expected, rtol=1e-6, atol=1e-7)
    # What is a number of the batch, and not a mean over tokens, is weighed by the micro-batches' recorded tokens.
    for key, value in expected_metrics.items():
        together = sum(metrics[key] * part.mask.sum() for part, (_, metrics) in zip(parts, outputs, strict=True))
        torch.testing.assert_close(together / inputs.mask.sum(), value, rtol=1e-5, atol=1e-7)
    positions = [torch.arange(rank, len(inputs.mask), 2) for rank in (0, 1)]
    together = on_context_ranks(loss, inputs, positions, **COEFFICIENTS)
    torch.testing.assert_close(together, expected.detach(), rtol=1e-6, atol=1e-7)


# What is refused


def test_missing_inputs_are_named():
    loss = with_terms(LOSSES["sft"], terms=["kl_coef", "entropy_coef"])
    with pytest.raises(ValueError, match="KL penalty needs LossInputs.ref_log_probs"):
        loss(make_inputs(ref_log_probs=None), kl_coef=0.1, entropy_coef=0.1)
    with pytest.raises(ValueError, match="entropy bonus needs LossInputs.entropy"):
        loss(make_inputs(entropy=None), kl_coef=0.1, entropy_coef=0.1)
    with pytest.raises(ValueError, match="entropy bonus needs LossInputs.entropy"):
        entropy_bonus(make_inputs(entropy=None))


@pytest.mark.parametrize("name", list(COEFFICIENTS))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_coefficients_out_of_range_are_named(name, value):
    loss = with_terms(LOSSES["sft"], terms=list(COEFFICIENTS), mix=LOSSES["dft"])
    with pytest.raises(ValueError, match=f"{name} is {value}; it has to be"):
        loss(make_inputs(), **{**COEFFICIENTS, name: value})


def test_terms_that_do_not_fit_are_refused():
    for terms, mix in ((["kl"], None), (["mix_coef"], None), ([], LOSSES["sft"])):
        with pytest.raises(ValueError, match="known: kl_coef, entropy_coef, mix_coef"):
            with_terms(LOSSES["grpo"], terms=terms, mix=mix)
    with pytest.raises(ValueError, match="kl_estimator is 'k4'; it has to be one of k1, k2, k3"):
        kl_penalty(make_inputs(), estimator="k4")
