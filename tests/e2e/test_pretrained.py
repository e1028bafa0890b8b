"""--pretrained-checkpoint: a run that starts from a converted checkpoint is the run that starts from the Hugging Face
folder itself."""

from e2e_runs import PROGRAM, metrics_of, run_tool
from torchrun import torchrun

SAME = ("train/loss", "train/grad_norm", "rollout/reward_mean", "rollout/response_length_mean_self")


def test_the_same_run_from_a_converted_checkpoint(flags, tmp_path, toy):
    run_tool("convert_checkpoint.py", "hf-to-megatron", toy / "model", tmp_path / "megatron")
    # Its hf/ has the configuration and the tokenizer, and no weights. The vocabulary is padded otherwise there.
    converted = ["--hf-checkpoint", tmp_path / "megatron" / "hf", "--pretrained-checkpoint", tmp_path / "megatron"]
    steps = []
    for name, start in (("folder", []), ("checkpoint", converted)):
        done = torchrun(
            PROGRAM, *flags, *start, "--run-dir", tmp_path / name, "--train-iters", 2,
            num_ranks=1,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        steps.append([[record[metric] for metric in SAME] for record in metrics_of(tmp_path / name)])
    assert steps[0] == steps[1] and len(steps[0]) == 2
