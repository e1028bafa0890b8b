"""Phases: what each of them inherits, what it sets itself, and one line for what is wrong."""

import pytest

from gft_megatron.command_line import parse_args, save_config
from gft_megatron.phases import phase_at, resolve_phases

REQUIRED = ["--hf-checkpoint", "model", "--prompt-data", "a.jsonl"]


def phases_of(text, *flags):
    return resolve_phases(parse_args([*REQUIRED, *flags, "--phases", *text.split(" ")]))


def test_three_phases():
    sft, gft, grpo = phases_of(
        "sft:200,gft:400:lr=1e-5:tau-self=0 grpo:100:optimizer=reset:schedule=kl_coef=1:0:linear", "--tau", "0.3"
    )
    assert [(p.index, p.name, p.start, p.end, p.reset_optimizer) for p in (sft, gft, grpo)] == [
        (0, "sft", 0, 200, False),
        (1, "gft", 200, 600, False),
        (2, "grpo", 600, 700, True),
    ]
    assert [p.config.optimizer.lr for p in (sft, gft, grpo)] == [1e-6, 1e-5, 1e-6]
    assert [p.config.loss_hyper for p in (sft, gft, grpo)] == [{}, {"tau": 0.3, "tau_self": 0.0}, {}]
    # Each takes the groups that its loss is made for.
    assert [tuple(p.config.group_sizes) for p in (sft, gft, grpo)] == [(1, 0, 0), (1, 3, 4), (0, 0, 8)]
    assert [p.config.needs_reference for p in (sft, gft, grpo)] == [False, False, True]
    assert grpo.config.hyper_at(0) == {"kl_coef": 1.0} and grpo.config.hyper_at(99) == {"kl_coef": 0.0}
    assert [phase_at((sft, gft, grpo), i).name for i in (0, 199, 200, 599, 600, 700)] == [
        "sft", "sft", "gft", "gft", "grpo", "grpo",
    ]  # fmt: skip


def test_interleaved():
    phases = phases_of("dft:5,(sft:2,grpo:3)*3")
    assert [(p.name, p.start) for p in phases] == [
        ("dft", 0), ("sft", 5), ("grpo", 7), ("sft", 10), ("grpo", 12), ("sft", 15), ("grpo", 17),
    ]  # fmt: skip
    assert phases[-1].end == 20


@pytest.mark.parametrize(
    ("text", "flags"),
    [("chord_mu:5:separate_means=true", []), ("chord_mu:5", ["--separate-means", "True"])],
)
def test_a_boolean_hyper_parameter(text, flags):
    (only,) = phases_of(text, *flags)
    assert only.config.loss_hyper == {"separate_means": True}


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("probability:5,grpo:10:mix_loss=probability", []),
        ("probability:5,grpo:10", ["--mix-loss", "probability"]),
        ("sft:5:mix_coef=0,grpo:10:mix_loss=probability", []),
    ],
)
def test_a_hyper_parameter_of_the_loss_that_is_mixed_in(text, flags):
    *_, last = phases_of(text, "--prob-power", "2", *flags)
    assert last.config.hyper_at(0) == {"prob_power": 2.0, "mix_coef": 0.1}


def test_a_phase_may_have_several_schedules():
    (only,) = phases_of("grpo:11:mix_loss=sft:schedule=mix_coef=1:0:linear:schedule=kl_coef=0:2:linear")
    assert only.config.hyper_at(5) == {"mix_coef": 0.5, "kl_coef": 1.0}


def test_without_phases_there_is_one():
    (only,) = resolve_phases(parse_args([*REQUIRED, "--train-iters", "7", "--loss", "dft"]))
    assert (only.name, only.start, only.end) == ("dft", 0, 7)


def test_a_saved_configuration_has_the_same_phases(tmp_path):
    config = parse_args([*REQUIRED, "--phases", "sft:2,(gft:3:tau=0.5,grpo:1)*2"])
    save_config(config, tmp_path / "config.yaml")
    again = parse_args(["--config", str(tmp_path / "config.yaml")])
    assert again == config and resolve_phases(again) == resolve_phases(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft", "expected LOSS:STEPS"),
        ("sft:0", "expected LOSS:STEPS"),
        ("sft:two", "expected LOSS:STEPS"),
        ("sft:2,", "with commas between"),
        ("(sft:2", "with commas between"),
        ("sgd:3", "unknown loss 'sgd'; the losses are gft, dft"),
        ("sft:3:seed=4", "seed cannot be a phase's own"),
        ("sft:3,gft:3:min_lr=1e-3", "--phases gft:3:min_lr=1e-3: --min-lr is 0.001; it has to be between 0 and --lr"),
        ("sft:3:weight_decay=-1", "--weight-decay is -1.0; it has to be finite and at least 0"),
        ("sft:3:lr=fast", "--phases sft:3:lr=fast: .*fast"),
        ("grpo:3:n_self=0", "--phases grpo:3:n_self=0: .*add --n-self 8|all 0"),
        ("dft:3:tau=0.1", "--tau has no meaning for --loss dft"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        phases_of(text)


def test_a_hyper_parameter_that_no_phase_has():
    with pytest.raises(ValueError, match="--tau has no meaning for any of the phases sft, dft"):
        phases_of("sft:2,dft:2", "--tau", "0.1")


@pytest.mark.parametrize("text", ["sft_go:5:rewrite_interval=2", "cadft:5:rewrite_interval=2,sft_go:5"])
def test_rewritten_responses_have_no_token_scores(text):
    with pytest.raises(ValueError, match="--rewrite-interval: sft_go needs a score for each token.*excess"):
        phases_of(text)
    assert phases_of(text, "--token-scores", "excess")[-1].name == "sft_go"


def test_the_one_phase_of_a_run_that_rewrites_has_no_token_scores():
    config = parse_args([*REQUIRED, "--train-iters", "7", "--loss", "sft_go", "--rewrite-interval", "2"])
    with pytest.raises(ValueError, match="--rewrite-interval: sft_go"):
        resolve_phases(config)


def test_train_iters_beside_phases():
    with pytest.raises(ValueError, match="--train-iters beside --phases"):
        parse_args([*REQUIRED, "--train-iters", "7", "--phases", "sft:7"])
