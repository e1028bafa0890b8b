"""An export is a folder that transformers opens with the same bits, and it is complete or absent whatever happens."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, CONFIGS_WITH_EXPERTS, save_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gft_megatron.convert import HfFolder, write_hf_folder

Tensors = list[tuple[str, Tensor]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model folder with a tokenizer, and with files that an export must not copy."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    path = save_model(tmp_path / "source", CONFIGS["qwen2-tied"]())
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, "a"))).save_pretrained(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "modeling_code.py").write_text("raise SystemExit")
    (path / "training_args.bin").write_bytes(b"pickle")
    return path


def trained(source: Path) -> Tensors:
    """The model of `source` with other numbers in it."""
    return [(name, tensor * 1.25 + 0.5) for name, tensor in load_file(source / "model.safetensors").items()]


def siblings(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir()}


def test_biases_of_experts_stay_float32(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", CONFIGS_WITH_EXPERTS["deepseek-v3"]())
    tensors = load_file(source / "model.safetensors")
    write_hf_folder(tmp_path / "hf", tensors.items(), source_folder=source, dtype=torch.bfloat16)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    biases = [name for name in written if written[name].dtype is not torch.bfloat16]
    assert biases == [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
    assert all(torch.equal(written[name], tensors[name]) for name in biases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 50_000])
def test_transformers_opens_it_with_the_same_bits(
    source: Path, tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    tensors = trained(source)
    target = tmp_path / "deep" / "export"
    write_hf_folder(target, iter(tensors), source_folder=source, dtype=dtype, max_shard_bytes=max_shard_bytes)
    num_files = len(list(target.glob("*.safetensors")))
    assert num_files > 2 if max_shard_bytes == 50_000 else num_files == 1
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert model.dtype is dtype and HfFolder(target).shape.dtype is dtype
    state = model.state_dict()
    for name, tensor in tensors:
        assert torch.equal(state[name], tensor.to(dtype)), name
    assert type(model.config) is type(HfFolder(source).config)
    assert json.loads((target / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    assert AutoTokenizer.from_pretrained(target).convert_tokens_to_ids("b") == 1
    assert {"chat_template.jinja", "generation_config.json"} <= {file.name for file in target.iterdir()}
    assert not list(target.glob("*.py")) + list(target.glob("*.bin"))
    modes = {file.stat().st_mode for file in target.iterdir()}
    assert modes == {(source / "chat_template.jinja").stat().st_mode}
    assert siblings(target) == {"export"}


def test_views_of_one_memory_are_written_whole(source: Path, tmp_path: Path) -> None:
    """Merged tensors may be views of one buffer, which safetensors alone refuses, and the buffer may be used again."""
    buffer = torch.empty(1_000_000)

    def one_buffer() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in trained(source):
            view = buffer[: tensor.numel()].view_as(tensor)
            view.copy_(tensor)
            yield name, view

    write_hf_folder(tmp_path / "export", one_buffer(), source_folder=source, dtype=torch.float32)
    written = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in trained(source))


def test_no_more_than_a_file_of_tensors_is_held(source: Path, tmp_path: Path) -> None:
    limit = 60_000
    target = tmp_path / "export"
    given = 0

    def counting() -> Iterator[tuple[str, Tensor]]:
        nonlocal given
        for name, tensor in trained(source):
            written = sum(file.stat().st_size for file in (tmp_path / ".export.partial").glob("*.safetensors"))
            assert given - written <= limit
            given += tensor.nbytes
            yield name, tensor

    write_hf_folder(target, counting(), source_folder=source, dtype=torch.float32, max_shard_bytes=limit)
    assert max(file.stat().st_size for file in target.glob("*.safetensors")) < limit + 5_000


def test_an_earlier_export_is_replaced_and_nothing_else(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    for shard_bytes in (50_000, 5_000_000_000):  # an empty folder, then a folder of ours with more files than the next
        write_hf_folder(target, trained(source), source_folder=source, dtype=torch.float32, max_shard_bytes=shard_bytes)
    assert [file.name for file in target.glob("model*")] == ["model.safetensors"]
    (target / "notes.txt").write_text("mine")
    for foreign, named in ((target, "notes.txt"), (source, "--hf-export"), (source / "config.json", "is a file")):
        before = {file: file.read_bytes() for file in foreign.parent.rglob("*") if file.is_file()}
        with pytest.raises(ValueError, match=named):
            write_hf_folder(foreign, trained(source), source_folder=source, dtype=torch.float32)
        assert before == {file: file.read_bytes() for file in foreign.parent.rglob("*") if file.is_file()}


def test_incomplete_model_and_broken_iterator_leave_nothing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    with pytest.raises(ValueError, match=r"no file holds tensor 'model\."):
        write_hf_folder(target, trained(source)[1:], source_folder=source, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"'lm_head\.extra'"):
        extra = [("lm_head.extra", torch.ones(1))]
        write_hf_folder(target, trained(source) + extra, source_folder=source, dtype=torch.float32)

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from trained(source)[:5]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_folder(target, broken(), source_folder=source, dtype=torch.float32, max_shard_bytes=10_000)
    assert siblings(target) == {"source"}


def test_full_disk(source: Path, tmp_path: Path) -> None:
    """A file-size limit makes write() fail in the middle of the weights, as a full disk does."""
    tensors = trained(source)
    target = tmp_path / "export"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*export.* bytes are free there"):
            write_hf_folder(target, tensors, source_folder=source, dtype=torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert siblings(target) == {"source"}


_KILL_SWEEP = """
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from gft_megatron.convert import HfFolder, write_hf_folder

source, target = Path(sys.argv[1]), Path(sys.argv[2])
new = {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}

def export(kill_at):
    "Die at the kill_at-th file system call (Python's audit events) or the tensor after it."
    left = kill_at
    def step(*event):
        nonlocal left
        if not event or event[0].split(".")[0] in ("os", "open", "shutil"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    def stepping():
        for item in new.items():
            step()
            yield item
    sys.addaudithook(step)
    write_hf_folder(target, stepping(), source_folder=source, dtype=torch.float32, max_shard_bytes=200_000)

def state():
    if not target.exists():
        return "absent"
    folder = HfFolder(target)
    names = {name: folder.tensor(name) for name in new}
    assert (target / "generation_config.json").exists()
    return "new" if all(torch.equal(names[name], new[name]) for name in new) else "old"

kill_at, killed = 0, True
while killed:
    kill_at += 1
    child = os.fork()
    if child == 0:
        export(kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, status
    print(state(), flush=True)
"""


@pytest.mark.parametrize("before", ["absent", "old"])
def test_kill_at_every_step_leaves_a_whole_folder_or_none(source: Path, tmp_path: Path, before: str) -> None:
    target = tmp_path / "export"
    if before == "old":
        write_hf_folder(
            target, load_file(source / "model.safetensors").items(), source_folder=source, dtype=torch.float32
        )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _KILL_SWEEP, str(source), str(target)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    states = result.stdout.split()
    assert len(states) > 50  # files, tensors, flushes and renames
    assert states[0] == before and states[-1] == "new"
    assert set(states[:20]) == {before}
    assert siblings(target) == {"source", "export"}  # what the killed ones left is gone


def test_sigkill_from_outside(source: Path, tmp_path: Path) -> None:
    """The same without any hook: a process killed while it waits for its next tensor."""
    target = tmp_path / "export"
    program = (
        "import sys, time, torch\n"
        "from safetensors.torch import load_file\n"
        "from gft_megatron.convert import write_hf_folder\n"
        "def slow():\n"
        "    for number, item in enumerate(load_file(sys.argv[1] + '/model.safetensors').items()):\n"
        "        if number == 9:\n"
        "            print('waiting', flush=True)\n"
        "            time.sleep(600)\n"
        "        yield item\n"
        "write_hf_folder(sys.argv[2], slow(), source_folder=sys.argv[1], dtype=torch.float32, max_shard_bytes=9000)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(source), str(target)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGKILL)
    assert siblings(target) == {"source", ".export.partial"}
    write_hf_folder(target, trained(source), source_folder=source, dtype=torch.float32)
    assert siblings(target) == {"source", "export"}
