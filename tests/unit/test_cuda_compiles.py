"""The CUDA kernels compile without torch, use no local memory, and move logits 16 bytes at a time."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")


def nvcc(*arguments: str | Path) -> str:
    command = ["nvcc", "-O3", "-std=c++17", "-arch=sm_90", f"-I{CSRC}", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def entries(ptx: str) -> dict[str, str]:
    """Kernel name -> its PTX."""
    parts = re.split(r"\.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_no_kernel_spills(source: Path, tmp_path: Path) -> None:
    log = nvcc("-Xptxas", "-v", "-c", source, "-o", tmp_path / "kernel.o")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frames
    assert set(frames) == {("0", "0", "0")}


# Per kernel: row_stats has 4 unrolled loads and 1 in the remainder loop; row_grad has 4 loads and 4 stores.
@pytest.mark.parametrize("source, num_loads, num_stores", [("row_stats", 5, 0), ("row_grad", 4, 4)])
def test_logits_move_in_vectors(source: str, num_loads: int, num_stores: int) -> None:
    kernels = entries(nvcc("-ptx", CSRC / "cuda" / f"{source}.cu", "-o", "-"))
    if source == "row_grad":  # the last template argument: logits and gradient share their alignment
        kernels = {name: ptx for name, ptx in kernels.items() if "Lb1EEEv" in name}
    assert len(kernels) == 6  # three dtypes, with and without entropy
    for name, ptx in kernels.items():
        assert len(re.findall(r"ld\.global(?:\.nc)?\.v4\.[fu]32", ptx)) >= num_loads, name
        assert len(re.findall(r"st\.global\.v4\.[fu]32", ptx)) >= num_stores, name
