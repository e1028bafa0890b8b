"""The recipes in examples/ give flags that the program takes, and the settings that their comments claim."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from programs import load_program

from gft_megatron.command_line import parse_args
from gft_megatron.rollout.sglang.keys import keys_for_launch, read_keys

ROOT = Path(__file__).parents[2]
RECIPES = ["qwen2.5-0.5b-gsm8k.sh", "qwen2.5-math-7b-numina.sh", "slurm_multinode.sbatch"]

# What a recipe starts: torchrun writes down its arguments, srun starts what follows its own flags.
STUBS = {
    "torchrun": """printf '%s\\0' "$@" >"$RECORD" """,
    "srun": """while [ "${1#-}" != "$1" ]; do shift; done; exec "$@" """,
    "scontrol": "printf '%s\\n' node7 node8",
}
SLURM = {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_ID": "31",
    "SLURM_JOB_NODELIST": "node[7-8]",
}


def arguments_of(recipe, folder, *flags, stubs=None, **environment):
    """Arguments for torchrun and for the program."""
    for name, command in {**STUBS, **(stubs or {})}.items():
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    record = folder / "record"
    environment |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "RECORD": str(record), **SLURM}
    subprocess.run(["bash", str(ROOT / "examples" / recipe), *flags], env=environment, cwd=folder, check=True)
    arguments = record.read_text().split("\0")[:-1]
    program = arguments.index("examples/pretrain_gft.py")
    return arguments[:program], arguments[program + 1 :]


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_are_flags_of_the_program(recipe, tmp_path):
    _, flags = arguments_of(recipe, tmp_path, "--lr", "3e-5", RUN_DIR="a run", HF_CHECKPOINT="model", DATA_DIR="data")
    config = parse_args(flags)
    assert config.optimizer.lr == 3e-5  # flags of the caller win
    assert config.output.run_dir == "a run"
    assert config.model.hf_export == "a run/hf"
    assert config.model.hf_checkpoint == "model"
    assert (config.data.prompt_data, config.data.eval_prompt_data) == (("data/train.jsonl",), ("data/test.jsonl",))


@pytest.mark.parametrize("recipe", RECIPES)
def test_fields_of_megatron_exist(recipe, tmp_path):
    from gft_megatron.training.model import megatron_fields

    _, flags = arguments_of(recipe, tmp_path)
    recompute = megatron_fields(parse_args(flags).model.megatron)["transformer"]
    assert recompute.get("recompute_granularity") == (None if "gsm8k" in recipe else "full")


def test_numina_has_the_settings_of_the_paper(tmp_path):
    _, flags = arguments_of("qwen2.5-math-7b-numina.sh", tmp_path)
    config = parse_args(flags)
    rollout, optimizer = config.rollout, config.optimizer
    assert (rollout.rollout_batch_size, rollout.n_expert, rollout.n_teacher, rollout.n_self) == (128, 1, 3, 4)
    assert (config.data.max_prompt_length, rollout.rollout_max_response_len) == (1024, 2048)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad, optimizer.lr_warmup_iters) == (1e-6, 0.01, 1, 0)
    assert optimizer.num_steps_per_rollout == 4
    assert config.loss_hyper == {"tau": 0.7}


def test_slurm_differs_from_one_node_in_the_launcher_only(tmp_path):
    one_node, expected = arguments_of("qwen2.5-math-7b-numina.sh", tmp_path, RUN_DIR="run")
    nodes, flags = arguments_of("slurm_multinode.sbatch", tmp_path, RUN_DIR="run")
    assert flags == expected
    assert one_node == ["--standalone", "--nproc-per-node", "8"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "31", "--rdzv-endpoint", "node7:29500"]
    assert nodes == ["--nnodes", "2", "--nproc-per-node", "8", *rendezvous]


def test_slurm_with_servers(tmp_path):
    # In python's place: notes what it is called with, as a server's node would, and says where it serves.
    worker = """case "$1" in
        -c) exec "$PYTHON" "$@" ;;
        *) printf '%s\\0' "$@" >"$RECORD.server"
           env | grep -o '^GFT_SGLANG_[A-Z]*_KEY=.*' | sort >"$RECORD.keys"
           mkdir -p "$RUN_DIR/sglang/job-31" && touch "$RUN_DIR/sglang/job-31/node8.urls" && exec sleep 100 ;;
    esac"""
    run = str(tmp_path / "run")
    addresses = f"{run}/sglang/job-31"
    sleep = """[ "$1" = 100 ] && exec /bin/sleep 100; /bin/sleep 0.05"""
    training, flags = arguments_of(
        "slurm_sglang.sbatch", tmp_path, "--lr", "3e-5",
        stubs={"python": worker, "sleep": sleep}, PYTHON=sys.executable, RUN_DIR=run, SGLANG_PYTHON="env/bin/python",
        SERVER_NODES="1", SERVER_GPUS="4", SLURMD_NODENAME="node8",
    )  # fmt: skip
    _, expected = arguments_of("slurm_multinode.sbatch", tmp_path, RUN_DIR=run)
    assert training[:4] == ["--nnodes", "1", "--nproc-per-node", "8"]
    assert flags == [*expected, "--rollout-engine", "sglang", "--sglang-discovery-file", addresses, "--lr", "3e-5"]
    program, *given = (tmp_path / "record.server").read_text().split("\0")[:-1]
    workers = tyro.cli(load_program(program).Workers, args=given)
    assert (workers.host, workers.num_workers, workers.tensor_parallel_size) == ("node8", 2, 4)
    assert (str(workers.discovery), str(workers.python)) == (addresses, "env/bin/python")
    keys = dict(line.split("=") for line in (tmp_path / "record.keys").read_text().splitlines())
    assert keys_for_launch(keys) == read_keys(keys)
    assert not any(key in " ".join([*training, *flags, *given]) for key in keys.values())


def test_gsm8k_trains_two_epochs(tmp_path):
    _, flags = arguments_of("qwen2.5-0.5b-gsm8k.sh", tmp_path)
    config = parse_args(flags)
    prompts = config.optimizer.train_iters * config.rollout.rollout_batch_size
    assert prompts // config.optimizer.num_steps_per_rollout // 7473 == 2
    assert dataclasses.asdict(config.parallel) == dataclasses.asdict(
        parse_args(["--hf-checkpoint", "m", "--prompt-data", "d", "--train-iters", "1"]).parallel
    )
