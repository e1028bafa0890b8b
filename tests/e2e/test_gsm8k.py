"""Real questions with real answers, right and wrong: 1,319 GSM8K problems with an expert and four teacher responses.

The data is not part of the repository; the test runs where it lies beside the checkout.
"""

import json

from e2e_runs import PROGRAM, metrics_of, run_tool
from gsm8k_files import MODEL_SOLUTIONS, TEST, needs_gsm8k
from torchrun import torchrun


@needs_gsm8k
def test_five_gft_steps_on_recorded_groups(tmp_path):
    data, model, run_dir = tmp_path / "gsm8k.jsonl", tmp_path / "model", tmp_path / "run"
    run_tool(
        "prepare_data.py", "gsm8k", "--input", TEST, MODEL_SOLUTIONS, "--output", data
    )  # fmt: skip
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    sources = [[response["source"] for response in row["responses"]] for row in rows]
    assert len(rows) == 1319 and all(s == ["expert"] + ["teacher"] * 4 for s in sources)
    run_tool(
        "make_tiny_model.py", "--output", model, "--tokenizer", "byte-bpe", "--corpus", data, "--vocab-size", 1000,
        "--hidden-size", 32, "--intermediate-size", 64, "--num-layers", 2, "--max-position-embeddings", 2048,
    )  # fmt: skip
    done = torchrun(
        PROGRAM, "--hf-checkpoint", model, "--prompt-data", data, "--run-dir", run_dir, "--rm-type", "math",
        "--seq-length", 2048, "--rollout-max-response-len", 1536, "--max-tokens-per-gpu", 4096,
        "--n-expert", 1, "--n-teacher", 4, "--n-self", 0, "--rollout-batch-size", 16, "--lr", 1e-3,
        "--train-iters", 5, "--eval-interval", 0, "--save-interval", 0, "--tensor-model-parallel-size", 2,
        num_ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "1319 prompts with 1319 expert and 5276 teacher responses, 0 bad rows" in done.stdout
    steps = metrics_of(run_dir)
    assert len(steps) == 5
    for step in steps:
        assert step["rollout/reward_errors"] == 0
        assert step["rollout/reward_mean_expert"] == 1.0  # each solution ends in its own label
        assert 0.1 < step["rollout/reward_mean_teacher"] < 0.9
        assert step["train/rectified_frac"] > 0.9  # a random model finds every token unlikely
