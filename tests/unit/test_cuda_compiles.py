"""The CUDA kernels compile without torch for three GPUs, use no local memory, and move logits 16 bytes at a time."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")


def nvcc(*arguments: str | Path) -> str:
    command = ["nvcc", "-O3", "-std=c++17", f"-I{CSRC}", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def entries(ptx: str) -> dict[str, str]:
    """Kernel name -> its PTX."""
    parts = re.split(r"\.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module", params=KERNELS, ids=lambda path: path.stem)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """The source's name, the assembler's report for every architecture, and the PTX for sm_90."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    targets = [flag for arch in ARCHITECTURES for flag in ("-gencode", f"arch=compute_{arch[3:]},code={arch}")]
    report = nvcc(*targets, "-Xptxas", "-v", "--keep", "--keep-dir", folder, "-c", request.param, "-o", folder / "k.o")
    ptx = next(path for path in folder.glob("*.ptx") if ".target sm_90" in path.read_text())
    return request.param.stem, report, ptx.read_text()


def test_no_kernel_spills(compiled: tuple[str, str, str]) -> None:
    name, report, ptx = compiled
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    assert {arch for _, arch in kernels} == set(ARCHITECTURES)
    assert len(kernels) == len(ARCHITECTURES) * len(entries(ptx))
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) >= len(kernels)
    assert set(frames) == {("0", "0", "0")}


# What a kernel's inner loops hold. row_stats: 4 loads in flight, and the rest one by one. row_grad: 4 loads and stores,
# and zeros for rows without gradient. The sweep: loads as row_stats, copies to and from block memory, stores, and the
# cluster's barriers.
LOADS = r"ld\.global(?:\.nc)?\.v4\.[fub]32"
STORES = r"st\.global\.v4\.[fub]32"
BLOCK_LOADS = r"ld\.shared\.v4\.[fub]32"
BLOCK_STORES = r"st\.shared\.v4\.[fub]32"
CLUSTER = {r"barrier\.cluster\.arrive": 2, r"barrier\.cluster\.wait": 2, r"mapa": 1}
AT_LEAST = {
    "row_stats": {r"row_stats_kernel\w+": {LOADS: 5}},
    "row_grad": {
        r"row_grad_kernel\w+Lb1EEEv\w+": {LOADS: 4, STORES: 5},  # the last template argument: the same alignment
        r"row_grad_kernel\w+Lb0EEEv\w+": {STORES: 1},
    },
    "rectified_sweep": {
        r"sweep_kernel\w+Lb1ELb1EEEv\w+": CLUSTER | {LOADS: 5, BLOCK_STORES: 5, BLOCK_LOADS: 1, STORES: 2},
        r"sweep_kernel\w+Lb1ELb0EEEv\w+": CLUSTER | {LOADS: 5, BLOCK_STORES: 5, STORES: 1},
        r"sweep_kernel\w+Lb0ELb1EEEv\w+": {LOADS: 7, STORES: 3},
        r"sweep_kernel\w+Lb0ELb0EEEv\w+": {LOADS: 5, STORES: 1},
    },
}


def test_logits_move_in_vectors(compiled: tuple[str, str, str]) -> None:
    name, _, ptx = compiled
    for pattern, counts in AT_LEAST.get(name, {}).items():
        kernels = {kernel: text for kernel, text in entries(ptx).items() if re.search(pattern, kernel)}
        assert len(kernels) in (3, 6), pattern  # three dtypes, with and without entropy
        for kernel, text in kernels.items():
            for instruction, count in counts.items():
                assert len(re.findall(instruction, text)) >= count, (kernel, instruction)
