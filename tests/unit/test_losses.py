"""Each loss and its gradient equal a token-by-token float64 computation of the paper's equation."""

import math

import pytest
import torch

from gft_megatron.losses import LOSSES, LossInputs
from gft_megatron.losses.reduce import masked_mean, token_sum

# Sequence 0 expert, 1 teacher, 2 and 3 own; lengths differ; one masked token in each and NaN-free junk in it.
SEQUENCE_IDS = torch.tensor([0] * 5 + [1] * 3 + [2] * 7 + [3] * 2)
SOURCES = torch.tensor([0, 1, 2, 2])
ADVANTAGES = torch.tensor([0.9, -0.4, 1.3, -1.1])
MASK = torch.ones(17)
MASK[[0, 5, 8, 15]] = 0


def make_inputs(**changes):
    generator = torch.Generator().manual_seed(3)
    # Probabilities from 1e-4 to 0.99, so that every branch of every loss is taken.
    probs = torch.cat([torch.tensor([1e-4, 0.99, 0.05, 0.69, 0.71]), torch.rand(12, generator=generator)])
    log_probs = probs.log().where(MASK.bool(), 1e30).requires_grad_()
    fields = {
        "log_probs": log_probs,
        "mask": MASK,
        "sequence_ids": SEQUENCE_IDS,
        "group_ids": torch.tensor([0, 0, 0, 0]),
        "sources": SOURCES,
        "advantages": ADVANTAGES,
        "old_log_probs": (log_probs.detach() + 0.4 * torch.randn(17, generator=generator)).where(MASK.bool(), 5.0),
    }
    return LossInputs(**{**fields, **changes})


def oracle(inputs, token_loss):
    """Sum over tokens of `token_loss(log p, sequence, token)` in float64, and its gradient."""
    log_probs = inputs.log_probs.detach().double().requires_grad_()
    losses = [
        token_loss(log_probs[t], int(inputs.sequence_ids[t]), t)
        if inputs.mask[t]
        else torch.zeros((), dtype=torch.float64)
        for t in range(len(log_probs))
    ]
    total = torch.stack(losses).sum()
    total.backward()
    return torch.stack(losses).detach(), log_probs.grad


def gft_token(tau_of_source):
    def token_loss(log_prob, sequence, _):
        prob = math.exp(log_prob.item())
        coefficient = prob if prob < tau_of_source[int(SOURCES[sequence])] else 1.0
        return -ADVANTAGES[sequence].double() * coefficient * log_prob

    return token_loss


def grpo_token(inputs, low, high):
    def token_loss(log_prob, sequence, t):
        if SOURCES[sequence] != 2:
            return log_prob * 0
        ratio = (log_prob - inputs.old_log_probs[t].double()).exp()
        advantage = ADVANTAGES[sequence].double()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)

    return token_loss


CASES = {
    "gft": ("gft", {}, lambda i: gft_token([0.7] * 3)),
    "gft released script": ("gft", {"tau": 0.1}, lambda i: gft_token([0.1] * 3)),
    "gft recorded only": ("gft", {"tau_self": 0.0}, lambda i: gft_token([0.7, 0.7, 0.0])),
    "gft tau by source": (
        "gft",
        {"tau_expert": 0.2, "tau_teacher": 0.5, "tau_self": 0.9},
        lambda i: gft_token([0.2, 0.5, 0.9]),
    ),
    "dft": ("dft", {}, lambda i: lambda log_prob, s, t: -math.exp(log_prob.item()) * log_prob),
    "sft": ("sft", {}, lambda i: lambda log_prob, s, t: -log_prob),
    "grpo": ("grpo", {}, lambda i: grpo_token(i, 0.2, 0.2)),
    "grpo clip-higher": ("grpo", {"clip_high": 0.28}, lambda i: grpo_token(i, 0.2, 0.28)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_float64(case):
    name, hyper, make_oracle = CASES[case]
    inputs = make_inputs()
    loss, metrics = LOSSES[name](inputs, **hyper)
    loss.sum().backward()
    expected_loss, expected_grad = oracle(inputs, make_oracle(inputs))
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(inputs.log_probs.grad.double(), expected_grad, rtol=2e-6, atol=1e-7)
    assert (loss[MASK == 0] == 0).all() and (inputs.log_probs.grad[MASK == 0] == 0).all()
    assert all(math.isfinite(value) for value in metrics.values())


def test_gft_with_tau_zero_is_advantage_weighted_cross_entropy():
    inputs = make_inputs()
    loss, metrics = LOSSES["gft"](inputs, tau=0.0)
    cross_entropy, _ = LOSSES["sft"](inputs)
    assert torch.equal(loss, ADVANTAGES[SEQUENCE_IDS] * cross_entropy)
    assert metrics["rectified_frac"] == 0 and metrics["coefficient_mean"] == 1


def test_gft_with_tau_above_one_weighs_like_dft():
    inputs = make_inputs()
    loss, metrics = LOSSES["gft"](inputs, tau=1.1)
    dft, dft_metrics = LOSSES["dft"](inputs)
    torch.testing.assert_close(loss, ADVANTAGES[SEQUENCE_IDS] * dft, rtol=1e-6, atol=0)
    assert metrics["rectified_frac"] == 1
    assert metrics["coefficient_mean"] == dft_metrics["coefficient_mean"]


@pytest.mark.parametrize("name", ["dft", "cadft", "asft", "probability", "gft"])
def test_unlikely_tokens_are_pulled_up_not_pushed_down(name):
    # -p log p without a constant p has the gradient -p (1 + log p): the wrong sign below p = 1/e.
    inputs = make_inputs(ref_kl=torch.zeros(17), advantages=torch.ones(4))
    LOSSES[name](inputs)[0].sum().backward()
    probs = inputs.log_probs.detach().exp()
    unlikely = MASK.bool() & (probs < math.exp(-1))
    assert (-probs * (1 + probs.log()))[unlikely].gt(0).all() and unlikely.sum() > 1
    assert inputs.log_probs.grad[MASK.bool()].lt(0).all()


def test_metrics_are_means_over_valid_tokens():
    inputs = make_inputs()
    _, metrics = LOSSES["gft"](inputs, tau=0.7)
    probs = inputs.log_probs.detach().double()[MASK.bool()].exp()
    assert metrics["rectified_frac"].item() == pytest.approx((probs < 0.7).double().mean().item())
    expected = torch.where(probs < 0.7, probs, 1.0).mean().item()
    assert metrics["coefficient_mean"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "field"), [("gft", "advantages"), ("grpo", "advantages"), ("grpo", "old_log_probs")])
def test_missing_input_is_named(name, field):
    with pytest.raises(ValueError, match=f"{name}.*LossInputs.{field}"):
        LOSSES[name](make_inputs(**{field: None}))


def test_reduction_does_not_depend_on_the_split_into_micro_batches():
    per_token, mask = torch.randn(17), MASK
    whole_sum, whole_count = token_sum(per_token * mask, mask)
    parts = [token_sum(per_token[s] * mask[s], mask[s]) for s in (slice(0, 3), slice(3, 16), slice(16, 17))]
    assert sum(float(s) for s, _ in parts) == pytest.approx(float(whole_sum), rel=1e-6)
    assert sum(int(c) for _, c in parts) == int(whole_count) == 13


def test_masked_mean_lets_no_nan_through():
    values = torch.tensor([1.0, float("nan"), 3.0])
    assert masked_mean(values, torch.tensor([1, 0, 1])) == 2
    assert masked_mean(values, torch.zeros(3)) == 0
