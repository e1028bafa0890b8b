"""What a run's configuration makes of losses: groups, terms, schedules, and what is refused before anything is read."""

import pytest
import torch

from gft_megatron.command_line import parse_args
from gft_megatron.losses import LOSSES, LossInputs, is_token_local, required_inputs
from gft_megatron.phases import resolve_phases

REQUIRED = ["--hf-checkpoint", "model", "--prompt-data", "a.jsonl", "--train-iters", "11"]


def config_of(*flags):
    return parse_args([*REQUIRED, *map(str, flags)])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_defaults_that_it_accepts(name):
    config = config_of("--loss", name)
    assert config.loss_function is LOSSES[name]
    assert sum(config.group_sizes) >= 1


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--loss", "sft"], (1, 0, 0)),
        (["--loss", "gft"], (1, 3, 4)),
        (["--loss", "gft", "--n-teacher", 0], (1, 0, 4)),
        (["--loss", "grpo"], (0, 0, 8)),
        (["--loss", "grpo", "--mix-loss", "sft"], (1, 0, 8)),
        (["--loss", "sft", "--n-self", 2], (1, 0, 2)),
    ],
)
def test_groups(flags, sizes):
    assert config_of(*flags).group_sizes == sizes


def test_own_samples_are_compared_with_own_samples():
    """A demonstration for another loss would leave them a negative mean advantage."""
    mixed = ["--loss", "grpo", "--mix-loss", "sft"]
    assert config_of(*mixed).compares_own_source and config_of("--loss", "chord_mu").compares_own_source
    assert not config_of("--loss", "gft").compares_own_source
    assert not config_of(*mixed, "--advantage-scope", "group").compares_own_source


def test_terms_and_their_coefficients():
    config = config_of(
        "--loss", "grpo", "--clip-high", 0.28, "--kl-coef", 0.1, "--mix-loss", "probability", "--prob-power", 2,
        "--schedule", "mix_coef=1:0:linear", "entropy_coef=0:0.5:linear",
    )  # fmt: skip
    assert config.hyper_at(5) == pytest.approx(
        {"clip_high": 0.28, "prob_power": 2, "kl_coef": 0.1, "mix_coef": 0.5, "entropy_coef": 0.25}
    )
    assert {"ref_log_probs", "entropy", "advantages"} <= required_inputs(config.loss_function)
    assert is_token_local(config.loss_function) and config.needs_reference


def test_a_mixed_loss_of_weight_0_keeps_its_hyper_parameters():
    config = config_of("--loss", "grpo", "--mix-loss", "probability", "--mix-coef", 0, "--prob-power", 2)
    assert config.hyper_at(0) == {"prob_power": 2.0, "mix_coef": 0.0}


def test_a_mixed_loss_needs_token_groups_of_recorded_responses_only():
    config = config_of("--loss", "grpo", "--mix-loss", "sft_go")
    assert config.group_sizes == (1, 0, 8) and "token_groups" in required_inputs(config.loss_function)
    tokens = torch.full((4,), -0.5)
    loss, _ = config.loss_function(
        LossInputs(
            log_probs=tokens,
            mask=tokens < 0,
            sequence_ids=torch.tensor([0, 0, 1, 1]),
            group_ids=torch.zeros(2, dtype=torch.int64),
            sources=torch.tensor([0, 2]),
            advantages=torch.zeros(2),
            old_log_probs=tokens,
            token_groups=torch.tensor([0, 1, -1, -1]),
        ),
        mix_coef=1.0,
        lam=0.0,
    )
    assert loss.tolist() == [0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(("name", "reads"), [("cadft", True), ("sft_go", True), ("uft", False), ("chord_mu", False)])
def test_counts_are_those_of_the_batch_itself(name, reads):
    assert config_of("--loss", name, "--batch-statistics", "previous-step").reads_step_before == reads
    assert not config_of("--loss", name).reads_step_before


def test_a_divergence_in_the_reward_is_no_term():
    config = config_of("--loss", "grpo", "--kl-coef", 0.1, "--kl-in", "reward")
    assert config.loss_function is LOSSES["grpo"] and config.hyper_at(0) == {} and config.needs_reference
    assert config.value_at("kl_coef", 3) == 0.1


def test_a_schedule_of_the_paper_and_its_override():
    assert config_of("--loss", "chord_mu").hyper_at(0)["mu"] == pytest.approx(0.9)
    assert config_of("--loss", "chord_mu", "--mu", 0.3).hyper_at(0) == {"mu": 0.3}
    assert config_of("--loss", "chord_mu", "--schedule", "mu=0.4:0:linear").hyper_at(10)["mu"] == 0.0


def test_hints_of_the_paper():
    config = config_of("--loss", "uft", "--hint-segments", 5, "--schedule", "hint_share=0.95:0.05:cosine:4")
    assert [config.value_at("hint_share", step) for step in (0, 2, 4, 10)] == pytest.approx([0.95, 0.5, 0.05, 0.05])
    assert config.group_sizes == (0, 0, 8) and "hint_share" not in config.hyper_at(2)
    assert config_of("--loss", "uft", "--hint-segments", 5, "--hint-share", 0.3).value_at("hint_share", 7) == 0.3
    given, alone = resolve_phases(
        parse_args([*REQUIRED[:4], "--phases", "uft:3:hint_segments=5:schedule=hint_share=0.95:0.05:cosine,uft:2"])
    )
    assert given.config.value_at("hint_share", 2) == pytest.approx(0.05) and given.config.rollout.hint_segments == 5
    assert alone.config.rollout.hint_segments == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss", "gft", "--n-teacher", 0, "--n-self", 0], "compares the responses of a group.*add --n-self 4"),
        (["--loss", "grpo", "--n-self", 0, "--n-expert", 2], "learns from own samples.*add --n-self 8"),
        (["--loss", "sft_go", "--n-self", 2], "needs a score for each token.*add --n-self 0"),
        (["--loss", "asft", "--random-init"], "compares the model with a reference.*add --ref-hf-checkpoint"),
        (["--loss", "grpo", "--kl-coef", 0.1, "--random-init"], "add --ref-hf-checkpoint"),
        (["--loss", "asft", "--fused-linear-loss"], "reads logits"),
        (["--loss", "eaft_top20", "--fused-linear-loss"], "reads logits"),
        (["--loss", "grpo", "--mix-loss", "gspo"], "--mix-loss gspo: not a loss of recorded responses"),
        (["--loss", "grpo", "--mix-loss", "sfd"], "--mix-loss sfd: unknown"),
        (["--loss", "sft", "--kl-coef", 0.1, "--kl-in", "reward"], "--kl-in reward: --loss sft"),
        (["--loss", "sft", "--schedule", "mu=1:0:linear"], "--schedule mu: --loss sft has no such number"),
        (["--loss", "cadft", "--beta", -1], "--loss cadft: beta is -1.0; it has to be"),
        (["--loss", "grpo", "--clip-low", -0.1], "--loss grpo: clip_low is -0.1; it has to be at least 0"),
        (["--loss", "probability", "--prob-power", -1], "--loss probability: prob_power is -1.0"),
        (["--loss", "chord_mu", "--schedule", "mu=0.5:1.5:linear"], "--loss chord_mu: mu is 1.5"),
        (["--loss", "sft_go", "--loss-reduction", "seq-mean"], "--loss sft_go .*token-mean"),
        (["--loss", "discriminative", "--batch-statistics", "previous-step"], "--loss discriminative .*exact"),
        (["--loss", "grpo", "--mix-loss", "sft", "--n-self", 1], "compares own samples with one another, and"),
        (["--loss", "discriminative", "--n-expert", 0], "holds an expert's response against the others"),
        (["--loss", "discriminative_mean", "--n-teacher", 0, "--n-self", 0], "leave nothing to compare: add --n-exp"),
        (["--loss", "sft", "--rewrite-share", 2], "--rewrite-share is 2.0; it has to be finite and between 0 and 1"),
        (["--loss", "sft", "--rewrite-warmup", "inf"], "--rewrite-warmup is inf; it has to be finite and at least 0"),
        (["--loss", "sft_go", "--schedule", "per_sample=0:1:step"], "--schedule per_sample: it is True or False"),
        (
            ["--loss", "chord_mu", "--separate-means", "True", "--loss-reduction", "seq-mean"],
            "--loss chord_mu .*token-mean",
        ),
        (["--loss", "grpo", "--mix-loss", "asft", "--fused-linear-loss"], "--mix-loss asft reads logits"),
        (["--loss", "gft", "--tau", -1], "--loss gft: tau is -1.0; it has to be at least 0"),
        (["--loss", "gft", "--tau-self", "nan"], "--loss gft: tau_self is nan; it has to be at least 0"),
        (["--loss", "gft", "--overlong-buffer-len", -1], "--overlong-buffer-len is -1"),
        (["--loss", "grpo", "--hint-segments", 5, "--hint-share", 0.5], "--hint-segments: --loss grpo would take"),
        (["--loss", "uft", "--hint-segments", 5], "--hint-segments 5 with a --hint-share of 0.0: hints take both"),
        (["--loss", "uft", "--schedule", "hint_share=0.9:0:linear"], "--hint-segments 0 with a --hint-share of 0.9"),
        (["--loss", "uft", "--hint-segments", 5, "--hint-share", 1.5], "--hint-share is 1.5; it has to be between"),
        (["--loss", "uft", "--hint-segments", -1], "--hint-segments is -1; it cannot be negative"),
        (["--loss", "uft", "--hint-segments", 5, "--hint-share", 1, "--kl-coef", 1, "--kl-in", "reward"],
         "--kl-in reward would count hints"),
    ],
)  # fmt: skip
def test_what_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        config_of(*flags)


def test_the_number_of_steps_is_missing():
    with pytest.raises(ValueError, match="--train-iters is missing"):
        parse_args(["--hf-checkpoint", "model", "--prompt-data", "a.jsonl"])
