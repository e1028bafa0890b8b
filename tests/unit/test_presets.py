"""The files in examples/presets parse, hold what is written here by hand, and say where each value comes from."""

from pathlib import Path

import pytest
import yaml

from gft_megatron.command_line import flat_values, parse_args

PRESETS = Path(__file__).parents[2] / "examples" / "presets"
A_RUN = [
    "--hf-checkpoint",
    "model",
    "--prompt-data",
    "rows.jsonl",
    "--train-iters",
    "400",
    "--max-tokens-per-gpu",
    "32768",
]

GFT = {
    "loss": "gft",
    "tau": 0.7,
    "n_expert": 1,
    "n_teacher": 3,
    "n_self": 4,
    "advantage_normalization": "std",
    "advantage_ddof": 1,
}
EXPECTED = {
    "gft_paper": {**GFT, "rollout_temperature": 1.0},
    "gft_recorded_only": {**GFT, "tau_self": 0.0},
    "gft_official_script": {
        **GFT,
        "tau": 0.1,
        "skip_zero_variance": False,
        "loss_reduction": "token-mean",
        "kl_coef": 0.0,
        "entropy_coef": 0.0,
        "rollout_batch_size": 128,
        "num_steps_per_rollout": 4,
        "rollout_temperature": 1.0,
        "rollout_top_p": 1.0,
        "max_prompt_length": 1024,
        "rollout_max_response_len": 2048,
        "seq_length": 3072,
        "rm_type": "math",
        "lr": 1e-6,
        "lr_warmup_iters": 0,
        "weight_decay": 0.01,
        "clip_grad": 1.0,
    },
    "dapo": {
        "loss": "grpo",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "loss_reduction": "token-mean",
        "refill_groups": True,
        "skip_zero_variance": True,
        "mask_truncated": True,
        "overlong_buffer_len": 4096,
        "rollout_max_response_len": 20480,
        "seq_length": 22528,
        "n_self": 16,
        "rollout_batch_size": 512,
        "kl_coef": 0.0,
    },
    "dr_grpo": {
        "loss": "grpo",
        "advantage_normalization": "none",
        "loss_reduction": "constant",
        "kl_coef": 0.0,
        "n_self": 8,
    },
    "cadft": {
        "loss": "cadft",
        "beta": 1.0,
        "batch_statistics": "exact",
        "n_expert": 1,
        "n_teacher": 0,
        "n_self": 0,
        "rollout_batch_size": 256,
        "rewrite_warmup": 3000.0,
        "rewrite_interval": 1000,
        "rewrite_share": 0.005,
        "rewrite_probability": 0.5,
        "rewrite_temperature": 0.7,
        "rewrite_top_p": 0.9,
        "lr": 5e-5,
        "lr_decay_style": "cosine",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "clip_grad": 1.0,
    },
    "sft_go": {
        "loss": "sft_go",
        "schedule": ["lam=0.9:0:linear"],
        "per_sample": False,
        "eta": 0.5,
        "n_expert": 1,
        "n_teacher": 0,
        "n_self": 0,
    },
    "chord_mu": {
        "loss": "chord_mu",
        "schedule": ["mu=0.9:0.05:cosine:200"],
        "separate_means": True,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "advantage_scope": "source",
        "skip_zero_variance": False,
        "n_expert": 1,
        "n_teacher": 0,
        "n_self": 8,
        "kl_coef": 0.0,
    },
}


def preset(name, *flags):
    return parse_args(["--config", str(PRESETS / f"{name}.yaml"), *A_RUN, *flags])


def test_every_preset_is_listed():
    assert {path.stem for path in PRESETS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_holds_what_is_claimed(name):
    values = flat_values(preset(name))
    assert {key: values[key] for key in EXPECTED[name]} == EXPECTED[name]
    # Nothing else is in the file: a setting without a claim here would be a claim without a test.
    assert set(yaml.safe_load((PRESETS / f"{name}.yaml").read_text())) == set(EXPECTED[name])


@pytest.mark.parametrize("name", EXPECTED)
def test_each_line_says_where_its_value_is_from(name):
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    assert all("#" in line for line in lines if not line.startswith("loss:"))


def test_flags_win_over_a_preset():
    assert preset("gft_paper", "--tau", "0.3", "--n-self", "6").loss.tau == 0.3


def test_schedules_are_what_the_loss_gets():
    assert [preset("chord_mu").value_at("mu", step) for step in (0, 199, 399)] == pytest.approx(
        [0.9, 0.05, 0.05], abs=1e-4
    )
    assert [preset("sft_go").value_at("lam", step) for step in (0, 399)] == pytest.approx([0.9, 0.0])


def test_the_official_script_has_256_responses_a_step():
    config = preset("gft_official_script")
    responses = config.rollout.rollout_batch_size * sum(config.group_sizes)
    assert responses / config.optimizer.num_steps_per_rollout == 256
