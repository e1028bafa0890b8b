"""On request: memory, speed and a kill in the middle, on 3 GB of random weights in the shape of Qwen2.5-1.5B.

    pytest -m on_request tests/unit/test_convert_figures.py -s

The memory is asserted. The speed is printed beside that of a plain copy by safetensors (load, save, flush) of the
same bytes in the same run; 70% of it is wanted.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchrun import ROOT
from transformers import Qwen2Config

from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.hf_writer import plan_files
from gft_megatron.convert.mapping import expected_hf_shapes

TOOL = ROOT / "tools" / "convert_checkpoint.py"
SHARD = 1_000_000_000
# ru_maxrss of a child begins with its parent's.
MEASURED = """
import os, re, runpy, sys
out, *sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as Python does for a script
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    with open("/proc/self/status") as status, open(out, "w") as file:
        file.write(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1])
"""
COPY = """
import os, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    save_file(load_file(file), Path(sys.argv[2]) / file.name)
    with open(Path(sys.argv[2]) / file.name) as written:
        os.fsync(written.fileno())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("figures")
    config = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, dtype="bfloat16", architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(root / "hf")
    shapes = expected_hf_shapes(HfFolder(root / "hf").shape)
    plan = plan_files(shapes, dict.fromkeys(shapes, torch.bfloat16), SHARD)
    weight_map = {name: tensor.path.name for name, tensor in plan.tensors.items()}
    for path in plan.headers:
        # Positive and finite whatever their bits, and made fast.
        tensors = {
            name: torch.empty(shapes[name], dtype=torch.int16).random_(0, 0x3F80).view(torch.bfloat16)
            for name, file in weight_map.items()
            if file == path.name
        }
        save_file(tensors, root / "hf" / path, metadata={"format": "pt"})
    (root / "hf" / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    yield root
    shutil.rmtree(root)


def timed(folder: Path, script: Path, *arguments: object) -> tuple[float, int]:
    """Seconds and peak resident bytes of a Python program."""
    started = time.monotonic()
    command = [sys.executable, "-c", MEASURED, folder / "peak", script, *arguments]
    subprocess.run([*map(str, command)], cwd=ROOT, env=environment(), check=True)
    return time.monotonic() - started, int((folder / "peak").read_text()) * 1024


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.on_request
def test_memory_and_speed_both_ways(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    num_bytes = sum(file.stat().st_size for file in (folder / "hf").glob("*.safetensors"))
    largest_shard = max(file.stat().st_size for file in (folder / "hf").glob("*.safetensors"))
    largest_tensor = 151936 * 1536 * 2
    (folder / "plain_copy.py").write_text(COPY)
    rows = []
    for name, command in {
        "plain copy": [folder / "plain_copy.py", folder / "hf", folder / "copy"],
        "hf-to-megatron": [TOOL, "hf-to-megatron", folder / "hf", folder / "megatron"],
        "megatron-to-hf": [TOOL, "megatron-to-hf", folder / "megatron", folder / "back", "--max-shard-bytes", SHARD],
        "plain copy again": [folder / "plain_copy.py", folder / "hf", folder / "copy"],
    }.items():
        (folder / "copy").mkdir(exist_ok=True)
        os.sync()
        seconds, peak = timed(folder, *command)
        shutil.rmtree(folder / "copy")
        rows.append((name, seconds, peak))
        if "copy" not in name:
            assert peak <= 1.5 * largest_shard + largest_tensor
    plain = sum(seconds for name, seconds, _ in rows if "copy" in name) / 2
    with capsys.disabled():
        print()
        for name, seconds, peak in rows:
            print(
                f"{name:17} {seconds:5.1f} s, {num_bytes / seconds / 1e6:5.0f} MB/s, {plain / seconds:.2f} of a copy's "
                f"speed, peak {peak / 1e6:.0f} MB"
            )
    for file in (folder / "hf").glob("*.safetensors"):
        with safe_open(file, "pt") as original, safe_open(folder / "back" / file.name, "pt") as back:
            for name in original.keys():  # noqa: SIM118 (no dictionary)
                assert torch.equal(original.get_tensor(name), back.get_tensor(name)), name


@pytest.mark.on_request
@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_kill_in_the_middle(folder: Path, direction: str) -> None:
    """The folder is not there, and a second run makes it whole."""
    source = folder / ("hf" if direction == "hf-to-megatron" else "killed-hf-to-megatron")
    out = folder / f"killed-{direction}"
    partial = folder / f".{out.name}.partial"
    command = [sys.executable, TOOL, direction, source, out]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment())
    while sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file()) < 10**9:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and partial.exists()
    timed(folder, *command[1:])
    assert out.exists() and not partial.exists()
