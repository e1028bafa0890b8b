"""Each mistake ends in one clear line and a non-zero exit: nothing lost, no hang, no traceback."""

import json
import re
import shutil

import pytest
from e2e_runs import PROGRAM, error_line
from torchrun import torchrun


def missing_file(toy, tmp_path):
    return ["--prompt-data", tmp_path / "nowhere.jsonl"], r"nowhere\.jsonl.*No such file"


def wrong_tensor_parallel_size(toy, tmp_path):
    return ["--tensor-model-parallel-size", 3], r"--tensor-model-parallel-size.*3"


def prompts_longer_than_the_sequence(toy, tmp_path):
    rows = [{"prompt": "1" * 40, "label": "1"}, {"prompt": "1,2,3=6:", "label": "6"}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--prompt-data", tmp_path / "long.jsonl"], r"long\.jsonl.*--max-bad-row-frac"


def unknown_loss(toy, tmp_path):
    return ["--loss", "gtf"], "--loss gtf: unknown; the losses are gft"


def unknown_flag(toy, tmp_path):
    return ["--tua", "0.7"], "--tua"


def small_vocabulary(toy, tmp_path):
    folder = shutil.copytree(toy / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    return ["--hf-checkpoint", folder, "--random-init"], r"tokenizer has \d+ tokens.*only 7"


def missing_shard(toy, tmp_path):
    folder = shutil.copytree(toy / "model", tmp_path / "model")
    name = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["--hf-checkpoint", folder], r"model-00002-of-00002\.safetensors"


def no_reward_function(toy, tmp_path):
    return ["--rm-type", "examples/countdown_reward.py:no_such"], "--rm-type.*no_such"


def empty_checkpoint_folder_to_load(toy, tmp_path):
    return ["--load", tmp_path / "nothing-here"], "--load.*there is no checkpoint"


@pytest.mark.parametrize(
    "mistake",
    [
        missing_file,
        wrong_tensor_parallel_size,
        prompts_longer_than_the_sequence,
        unknown_loss,
        unknown_flag,
        small_vocabulary,
        missing_shard,
        no_reward_function,
        empty_checkpoint_folder_to_load,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_mistake_is_named(flags, toy, tmp_path, mistake):
    arguments, message = mistake(toy, tmp_path)
    done = torchrun(PROGRAM, *flags, "--train-iters", 1, *arguments, num_ranks=2, timeout_sec=120)
    line = error_line(done)
    assert re.search(message, line), line
