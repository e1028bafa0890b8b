"""Flags: a line each for what is wrong, and a saved configuration that reads back as itself."""

import dataclasses

import pytest

from gft_megatron.command_line import parse_args, save_config
from gft_megatron.config import RunConfig
from gft_megatron.losses import loss_hyper_parameters

REQUIRED = ["--hf-checkpoint", "model", "--prompt-data", "a.jsonl", "b.jsonl", "--train-iters", "3"]


def test_defaults_are_the_papers():
    config = parse_args(REQUIRED)
    assert config.group_sizes == (1, 3, 4)
    assert config.loss.loss == "gft" and config.loss_hyper == {}
    assert loss_hyper_parameters()["gft"]["tau"].default == 0.7
    assert config.data.prompt_data == ("a.jsonl", "b.jsonl")


def test_hyper_parameters_of_the_losses_are_flags():
    config = parse_args([*REQUIRED, "--tau", "0.1", "--tau-self", "0"])
    assert config.loss_hyper == {"tau": 0.1, "tau_self": 0.0}


def test_saved_configuration_reads_back(tmp_path):
    config = parse_args(
        [*REQUIRED, "--tau", "0.1", "--no-skip-zero-variance", "--lr", "3e-5", "--n-samples-per-prompt", "2"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert parse_args(["--config", str(tmp_path / "config.yaml")]) == config
    overridden = parse_args(["--config", str(tmp_path / "config.yaml"), "--lr", "1", "--skip-zero-variance"])
    assert overridden.optimizer == dataclasses.replace(config.optimizer, lr=1.0)
    assert overridden.rollout.skip_zero_variance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-flag", "1"], "Unrecognized options: --no-such-flag"),
        (["--lr", "fast"], "--lr.*fast"),
        (["--loss", "sgd"], "--loss sgd: unknown; the losses are gft, dft, sft, "),
        (["--loss", "dft", "--tau", "0.1"], "--tau has no meaning for --loss dft"),
        (["--lr", "-1"], "--lr is -1.0; it has to be positive"),
        (["--n-expert", "0", "--n-teacher", "0", "--n-self", "0"], "all 0"),
        (["--n-self", "-1"], "--n-self is -1"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size is 0"),
        (["--max-staleness", "1"], "--max-staleness needs --rollout-engine sglang"),
        (["--over-sampling-batch-size", "256"], "--over-sampling-batch-size needs --rollout-engine sglang"),
        (["--over-sampling-batch-size", "64"], "--over-sampling-batch-size 64 is less than --rollout-batch-size 128"),
        (["--sglang-urls", "http://a:1"], "--sglang-urls needs --rollout-engine sglang"),
        (["--rollout-engine", "sglang"], "exactly one of --sglang-urls, .*; none is given"),
        (
            ["--rollout-engine", "sglang", "--sglang-urls", "http://a:1", "--sglang-workers-per-node", "2"],
            "--sglang-urls and --sglang-workers-per-node is given",
        ),
        (
            ["--rollout-engine", "sglang", "--sglang-urls", "http://a:1", "--partial-rollout", "--max-staleness", "1"],
            "--partial-rollout .* needs --over-sampling-batch-size",
        ),
        (
            ["--rollout-engine", "sglang", "--sglang-urls", "http://a:1", "--colocate", "--max-staleness", "1"],
            "--colocate has the GPUs generate and train in turns",
        ),
        (["--sglang-lost-timeout-sec", "0"], "--sglang-lost-timeout-sec is 0.0; it has to be positive"),
        (["--sequence-parallel"], "--sequence-parallel needs --tensor-model-parallel-size"),
        (["--virtual-pipeline-model-parallel-size", "2"], "--pipeline-model-parallel-size of at least 2"),
        (["--overlap-param-gather"], "--overlap-param-gather needs --use-distributed-optimizer"),
        (["--seq-length", "64", "--rollout-max-response-len", "64"], "no room for a prompt"),
        (
            ["--seq-length", "64", "--rollout-max-response-len", "32", "--max-prompt-length", "40"],
            "exceed --seq-length 64",
        ),
        (["--max-tokens-per-gpu", "100"], "--max-tokens-per-gpu 100 is less than --seq-length 4096"),
        (["--rollout-batch-size", "2", "--num-steps-per-rollout", "3"], "--rollout-batch-size 2"),
        (["--rm-typ", "math"], "--rm-typ"),
        (["--make-vocab-size-divisible-by", "0"], "--make-vocab-size-divisible-by is 0"),
        (["--micro-batch-size", "-1"], "--micro-batch-size is -1"),
        (["--rollout-temperature", "0"], "--rollout-temperature is 0"),
        (["--rollout-top-p", "1.5"], "--rollout-top-p is 1.5"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_args([*REQUIRED, *arguments])
    assert "\n" not in str(error.value)


def test_missing_flags_are_named():
    with pytest.raises(ValueError, match="Missing.*--hf-checkpoint"):
        parse_args([])


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "expected `name: value`"), ("a: [\n", "not YAML"), ("no_such_field: 1\n", "--no-such-field")],
)
def test_bad_configuration_files_are_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_args(["--config", str(path), *REQUIRED])


def test_missing_configuration_file_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml: No such file"):
        parse_args(["--config", "nowhere.yaml"])


def test_every_setting_says_what_it_is():
    for section in dataclasses.fields(RunConfig):
        assert section.type, section.name
    # The command line is an interface: a flag comes and goes deliberately.
    config = parse_args(REQUIRED)
    sections = [getattr(config, section.name) for section in dataclasses.fields(config)]
    flags = {field.name for section in sections for field in dataclasses.fields(section)}
    assert len(flags) == sum(len(dataclasses.fields(section)) for section in sections)


def test_switches_of_a_loss_read_back(tmp_path):
    config = parse_args([*REQUIRED, "--loss", "chord_mu", "--separate-means", "True"])
    save_config(config, tmp_path / "config.yaml")
    assert parse_args(["--config", str(tmp_path / "config.yaml")]) == config
