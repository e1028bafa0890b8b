"""Group RL's losses and their gradients equal a token-by-token float64 computation of the papers' equations."""

import math

import pytest
import torch

from gft_megatron.advantages import group_advantages
from gft_megatron.losses import LOSSES, LossInputs, is_token_local

GROUP_RL = ["grpo", "ppo", "gspo", "cispo", "reinforce"]
SELF = 2

# What each response is there for: who wrote it, its advantage, the mean log-ratio of its tokens, how many they are.
RESPONSES = [
    (0, 0.9, 0.3, 4),
    (SELF, 1.3, 0.5, 6),
    (SELF, -1.1, 0.5, 7),
    (SELF, 0.7, -0.5, 5),
    (1, -0.4, -0.3, 3),
    (SELF, -0.6, -0.5, 6),
    (SELF, 0.8, 1e-4, 9),
    (SELF, 0.0, 0.4, 2),
    (SELF, -0.2, 0.05, 1),
]
NUM_PADDING = 2  # masked positions after each response; like the packing's, they say that they are of response 0


def make_inputs(**changes) -> LossInputs:
    generator = torch.Generator().manual_seed(11)
    columns = {name: [] for name in ("log_probs", "old_log_probs", "rollout_log_probs", "mask", "sequence_ids")}
    for i, (source, _, mean, length) in enumerate(RESPONSES):
        log_probs = (torch.rand(length, generator=generator) * 0.98 + 0.01).log()
        noise = torch.randn(length, generator=generator)
        old = log_probs - mean - (noise - noise.mean())
        rollout = old + 0.8 * torch.randn(length, generator=generator)
        rollout[: 1 if source == SELF else length] = math.nan
        padding = torch.full((NUM_PADDING,), 1e30)
        columns["log_probs"].append(torch.cat([log_probs, padding]))
        columns["old_log_probs"].append(torch.cat([old, -padding]))
        columns["rollout_log_probs"].append(torch.cat([rollout, padding]))
        columns["mask"].append(torch.arange(length + NUM_PADDING) < length)
        columns["sequence_ids"].append(torch.tensor([i] * length + [0] * NUM_PADDING))
    fields = {name: torch.cat(parts) for name, parts in columns.items()}
    sources, advantages, _, _ = zip(*RESPONSES, strict=True)
    fields |= {
        "group_ids": torch.zeros(len(RESPONSES), dtype=torch.int64),
        "sources": torch.tensor(sources),
        "advantages": torch.tensor(advantages),
    }
    fields["log_probs"].requires_grad_()
    return LossInputs(**fields | changes)


def weight(inputs, t, target, cap, taken):
    rollout = float(inputs.rollout_log_probs[t])
    if cap is None or math.isnan(rollout):
        return 1.0
    value = math.exp(float(target) - rollout)
    taken.add("weight capped" if value > cap else "weight not capped")
    return min(value, cap)


def surrogate(ratio, advantage, low, high, dual, taken):
    value = float(ratio)
    if advantage < 0 and value > dual:
        taken.add("dual clip")
        return ratio * 0 + dual * advantage
    clipped = min(max(value, 1 - low), 1 + high)
    if clipped * advantage < value * advantage:
        taken.add("clipped above" if advantage > 0 else "clipped below")
        return ratio * 0 + clipped * advantage
    if clipped != value and advantage != 0:
        taken.add("outside, but on the harmless side")
    elif advantage != 0:
        taken.add("inside")
    return ratio * advantage


def oracle(name, inputs, *, clip_low=0.0, clip_high=0.0, dual_clip=math.inf, tis_clip=None):
    """Per-token loss and d sum / d log p in float64, and the branches that were taken."""
    log_probs = inputs.log_probs.detach().double().requires_grad_()
    losses = [torch.zeros((), dtype=torch.float64) for _ in log_probs]
    taken = set()
    for i, (source, _, _, _) in enumerate(RESPONSES):
        if source != SELF:
            continue
        advantage = float(inputs.advantages[i])
        tokens = [t for t in range(len(losses)) if inputs.mask[t] and inputs.sequence_ids[t] == i]
        log_ratio = {t: log_probs[t] - float(inputs.old_log_probs[t]) for t in tokens}
        for t in tokens:
            target = log_probs[t] if name == "reinforce" else inputs.old_log_probs[t]
            factor = weight(inputs, t, target, tis_clip, taken)
            if name in ("grpo", "ppo"):
                value = -surrogate(log_ratio[t].exp(), advantage, clip_low, clip_high, dual_clip, taken)
            elif name == "gspo":
                ratio = (sum(log_ratio.values()) / len(tokens)).exp()
                value = -surrogate(ratio, advantage, clip_low, clip_high, dual_clip, taken)
            elif name == "cispo":
                ratio = math.exp(log_ratio[t].item())
                coefficient = min(max(ratio, 1 - clip_low), 1 + clip_high)
                taken.add("inside" if coefficient == ratio else f"clipped {'above' if ratio > 1 else 'below'}")
                value = -coefficient * advantage * log_probs[t]
            else:
                value = -advantage * log_probs[t]
            losses[t] = factor * value
    total = torch.stack(losses)
    total.sum().backward()
    return total.detach(), log_probs.grad, taken


CLIPS = {"inside", "clipped above", "clipped below", "outside, but on the harmless side"}
WEIGHTS = {"weight capped", "weight not capped"}
CASES = [
    ("grpo", {}, {"clip_low": 0.2, "clip_high": 0.2}, CLIPS),
    ("grpo", {"clip_high": 0.28}, {"clip_low": 0.2, "clip_high": 0.28}, CLIPS),
    ("grpo", {"tis_clip": 1.5}, {"clip_low": 0.2, "clip_high": 0.2, "tis_clip": 1.5}, CLIPS | WEIGHTS),
    ("ppo", {}, {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}, CLIPS | {"dual clip"}),
    (
        "ppo",
        {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "tis_clip": 2.0},
        {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "tis_clip": 2.0},
        CLIPS | WEIGHTS | {"dual clip"},
    ),
    ("gspo", {}, {"clip_low": 3e-4, "clip_high": 4e-4}, CLIPS),
    ("gspo", {"clip_low": 0.2, "clip_high": 0.3}, {"clip_low": 0.2, "clip_high": 0.3}, CLIPS),
    ("cispo", {}, {"clip_low": 1.0, "clip_high": 0.28}, {"inside", "clipped above"}),
    (
        "cispo",
        {"clip_low": 0.4, "clip_high": 1.0, "tis_clip": 1.2},
        {"clip_low": 0.4, "clip_high": 1.0, "tis_clip": 1.2},
        {"inside", "clipped above", "clipped below"} | WEIGHTS,
    ),
    ("reinforce", {}, {}, set()),
    ("reinforce", {"tis_clip": 2.0}, {"tis_clip": 2.0}, WEIGHTS),
]


@pytest.mark.parametrize(
    ("name", "hyper", "formula", "branches"), CASES, ids=[f"{i}-{case[0]}-{case[1]}" for i, case in enumerate(CASES)]
)
def test_loss_and_gradient_equal_float64(name, hyper, formula, branches):
    inputs = make_inputs()
    loss, metrics = LOSSES[name](inputs, **hyper)
    loss.sum().backward()
    expected_loss, expected_grad, taken = oracle(name, inputs, **formula)
    assert taken == branches
    # old and new log-probs are fp32 and a ratio has the error of their difference.
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(inputs.log_probs.grad.double(), expected_grad, rtol=3e-6, atol=1e-7)
    nothing = ~inputs.mask | (inputs.sources != SELF)[inputs.sequence_ids]
    assert (loss[nothing] == 0).all() and (inputs.log_probs.grad[nothing] == 0).all()
    assert all(math.isfinite(value) and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", GROUP_RL)
@pytest.mark.parametrize("junk", [0.0, -700.0, 1e38, -1e38])
def test_masked_positions_change_nothing(name, junk):
    clean, dirty = make_inputs(), make_inputs()
    filled = {
        field: getattr(dirty, field).detach().where(dirty.mask, sign * junk)
        for field, sign in (("log_probs", 1), ("old_log_probs", -1), ("rollout_log_probs", 1))
    }
    filled["log_probs"].requires_grad_()
    dirty = make_inputs(**filled)
    hyper = {} if name == "gspo" else {"tis_clip": 1.5}
    (loss, metrics), (expected, expected_metrics) = (LOSSES[name](inputs, **hyper) for inputs in (dirty, clean))
    loss.sum().backward()
    expected.sum().backward()
    assert torch.equal(loss, expected) and metrics == expected_metrics
    assert torch.equal(dirty.log_probs.grad, clean.log_probs.grad)


@pytest.mark.parametrize("name", sorted(set(GROUP_RL) - {"gspo"}))
def test_a_token_needs_no_other_token(name):
    assert is_token_local(LOSSES[name])
    inputs, positions = make_inputs(), torch.tensor([1, 6, 9, 13, 30, 60])
    for hyper in ({}, {"tis_clip": 1.5}):
        assert torch.equal(LOSSES[name](inputs.at(positions), **hyper)[0], LOSSES[name](inputs, **hyper)[0][positions])


def gradient(name, inputs, **hyper):
    inputs.log_probs.grad = None
    LOSSES[name](inputs, **hyper)[0].sum().backward()
    return inputs.log_probs.grad


# Limits that tie the methods together


@pytest.mark.parametrize("name", ["grpo", "ppo", "gspo", "cispo"])
def test_before_the_policy_moves_all_have_the_gradient_of_reinforce(name):
    inputs = make_inputs()
    inputs = make_inputs(old_log_probs=inputs.log_probs.detach())
    expected = gradient("reinforce", inputs).clone()
    torch.testing.assert_close(gradient(name, inputs), expected, rtol=1e-6, atol=0)
    _, metrics = LOSSES[name](inputs)
    assert metrics["clipped_frac"] == 0


def test_ppo_without_dual_clip_is_grpo():
    inputs = make_inputs()
    assert torch.equal(LOSSES["ppo"](inputs, dual_clip=math.inf)[0], LOSSES["grpo"](inputs)[0])
    assert not torch.equal(LOSSES["ppo"](inputs)[0], LOSSES["grpo"](inputs)[0])


def test_without_clips_cispo_has_the_gradient_of_grpo():
    inputs = make_inputs()
    clips = {"clip_low": 1.0, "clip_high": math.inf}
    expected = gradient("grpo", inputs, **clips).clone()
    torch.testing.assert_close(gradient("cispo", inputs, **clips), expected, rtol=1e-6, atol=0)


def test_gspo_of_responses_of_one_token_is_grpo():
    full = make_inputs()
    first = torch.tensor([int((full.sequence_ids == i).nonzero()[0]) for i in range(len(RESPONSES))])
    inputs = full.at(first)
    assert inputs.mask.all()
    torch.testing.assert_close(
        LOSSES["gspo"](inputs, clip_low=0.2, clip_high=0.2)[0], LOSSES["grpo"](inputs)[0], rtol=1e-6, atol=0
    )


def test_reinforce_is_unrectified_gft_on_own_samples():
    inputs = make_inputs(sources=torch.full((len(RESPONSES),), SELF))
    assert torch.equal(LOSSES["reinforce"](inputs)[0], LOSSES["gft"](inputs, tau=0.0)[0])


@pytest.mark.parametrize("name", sorted(set(GROUP_RL) - {"gspo"}))
def test_a_sampler_that_agrees_gets_weight_one(name):
    inputs = make_inputs()
    target = inputs.log_probs.detach() if name == "reinforce" else inputs.old_log_probs
    inputs = make_inputs(rollout_log_probs=target)
    loss, metrics = LOSSES[name](inputs, tis_clip=1.0)
    assert torch.equal(loss, LOSSES[name](inputs)[0])
    assert metrics["tis_weight_mean"] == 1 and metrics["tis_clipped_frac"] == 0


# Metrics


def test_metrics_are_means_over_valid_tokens():
    inputs = make_inputs()
    own = inputs.mask & (inputs.sources == SELF)[inputs.sequence_ids]
    ratio = (inputs.log_probs.detach().double() - inputs.old_log_probs.double())[own].exp()
    advantage = inputs.advantages[inputs.sequence_ids][own]
    weights = (inputs.old_log_probs.double() - inputs.rollout_log_probs.double())[own].exp().nan_to_num(1.0)
    num_tokens = int(inputs.mask.sum())
    num_recorded = num_tokens - int(own.sum())
    above, below = (advantage > 0) & (ratio > 1.2), (advantage < 0) & ((ratio < 0.8) | (ratio > 3))
    _, metrics = LOSSES["ppo"](inputs, tis_clip=1.5)
    expected = {
        "coefficient_mean": ratio.sum() / num_tokens,
        "clipped_frac": (above | below).sum() / num_tokens,
        "tis_weight_mean": (weights.clamp(max=1.5).sum() + num_recorded) / num_tokens,
        "tis_clipped_frac": (weights > 1.5).sum() / num_tokens,
        "ratio_above_2_frac": (ratio > 2).sum() / num_tokens,
        "ratio_below_half_frac": (ratio < 0.5).sum() / num_tokens,
        "old_kl_mean": (ratio - 1 - ratio.log()).sum() / num_tokens,
    }
    assert all(value > 0 for value in expected.values())
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        assert metrics[key].item() == pytest.approx(float(value), rel=1e-5), key


def test_recorded_responses_have_weight_one_whatever_is_said_of_them():
    inputs = make_inputs()
    recorded = (inputs.sources != SELF)[inputs.sequence_ids]
    said = make_inputs(rollout_log_probs=inputs.rollout_log_probs.where(~recorded, -50.0))
    (loss, metrics), (expected, expected_metrics) = (LOSSES["grpo"](i, tis_clip=1.5) for i in (said, inputs))
    assert torch.equal(loss, expected) and metrics == expected_metrics


# GSPO's means


def test_gspo_gradient_of_a_long_response_is_exact():
    """Backward adds up one number a token. In fp32 a hundred thousand of them would drift."""
    num_tokens = 100_003
    log_probs = torch.full((num_tokens,), -1.0, requires_grad=True)
    inputs = LossInputs(
        log_probs=log_probs,
        mask=torch.ones(num_tokens, dtype=torch.bool),
        sequence_ids=torch.zeros(num_tokens, dtype=torch.int64),
        group_ids=torch.zeros(1, dtype=torch.int64),
        sources=torch.tensor([SELF]),
        advantages=torch.tensor([0.1]),
        old_log_probs=log_probs.detach(),
    )
    torch.testing.assert_close(gradient("gspo", inputs), torch.full((num_tokens,), -0.1), rtol=3e-7, atol=0)


def test_gspo_of_no_token_and_of_none_that_is_learned():
    inputs = make_inputs()
    assert LOSSES["gspo"](inputs.at(torch.zeros(0, dtype=torch.int64)))[0].shape == (0,)
    loss, metrics = LOSSES["gspo"](make_inputs(mask=torch.zeros_like(inputs.mask)))
    assert (loss == 0).all() and metrics["coefficient_mean"] == 0


def test_gspo_refuses_responses_in_pieces():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="segment ids must not decrease"):
        LOSSES["gspo"](inputs.at(torch.arange(len(inputs.mask)).flip(0)))


def test_gspo_needs_whole_responses_on_a_rank():
    """Half of a response has another mean."""
    inputs, positions = make_inputs(), torch.arange(6, 9)
    part = LOSSES["gspo"](inputs.at(positions), clip_low=0.9, clip_high=9.0)[0]
    assert (part != LOSSES["gspo"](inputs, clip_low=0.9, clip_high=9.0)[0][positions]).all()
    assert not is_token_local(LOSSES["gspo"])


# What is refused


@pytest.mark.parametrize(
    ("name", "field"),
    [("reinforce", "advantages")]
    + [(name, field) for name in ("ppo", "gspo", "cispo") for field in ("advantages", "old_log_probs")],
)
def test_missing_input_is_named(name, field):
    with pytest.raises(ValueError, match=f"{name}.*LossInputs.{field}"):
        LOSSES[name](make_inputs(**{field: None}))


@pytest.mark.parametrize("name", sorted(set(GROUP_RL) - {"gspo"}))
def test_tis_clip_needs_what_the_sampler_said(name):
    inputs = make_inputs(rollout_log_probs=None)
    LOSSES[name](inputs)
    with pytest.raises(ValueError, match="tis_clip needs LossInputs.rollout_log_probs"):
        LOSSES[name](inputs, tis_clip=2.0)


OUT_OF_RANGE = {
    "clip_low": (-0.1, math.nan),
    "clip_high": (-0.1, math.nan),
    "dual_clip": (1.0, -3.0, math.nan),
    "tis_clip": (0.0, -2.0, math.nan),
}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (name, key, value)
        for name in GROUP_RL
        for key in LOSSES[name].__wrapped__.__kwdefaults__
        for value in OUT_OF_RANGE[key]
    ],
)
def test_hyper_parameter_out_of_range_is_named(name, key, value):
    with pytest.raises(ValueError, match=f"{key} is {value}; it has to be"):
        LOSSES[name](make_inputs(), **{key: value})


# Leave-one-out advantages


def test_leave_one_out_compares_with_the_others():
    generator = torch.Generator().manual_seed(5)
    group_ids = torch.tensor([7, -3, 7, 100, 7, -3, 8, 7])
    rewards = torch.randn(8, generator=generator, dtype=torch.float64)
    expected = []
    for k, reward in enumerate(rewards.tolist()):
        others = [rewards[j].item() for j in range(8) if j != k and group_ids[j] == group_ids[k]]
        expected.append(reward - sum(others) / len(others) if others else reward)
    got = group_advantages(rewards, group_ids, normalize="leave-one-out")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=1e-7)


def test_leave_one_out_of_equal_rewards_is_exactly_zero():
    got = group_advantages(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64), normalize="leave-one-out")
    assert got.tolist() == [0.0, 0.0, 0.0]
    nothing = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64), normalize="leave-one-out")
    assert nothing.shape == (0,)
