"""The build takes the torch that is there, pins it, and says in one line what is missing."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from gft_megatron import _C

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_installed_package_requires_the_torch_it_was_built_against() -> None:
    assert _C.build_info()["torch"] == torch.__version__
    assert f"torch=={torch.__version__.split('+')[0]}" in importlib.metadata.requires("gft_megatron")


def test_another_torch_is_refused_at_import() -> None:
    result = run("-c", "import torch; torch.__version__ = '9.9.9'; import gft_megatron")
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError")
    for part in (f"built against torch {torch.__version__}", "torch 9.9.9 is running", "pip install"):
        assert part in message


def test_row_loops_are_threaded() -> None:
    # at::parallel_for is a template: compiled without -fopenmp it runs serially and says nothing.
    assert b"GOMP_parallel" in Path(_C.__file__).read_bytes()


OPEN = "torch==2.13.0" if sys.version_info < (3, 12) else "torch>=2.11"


@pytest.mark.parametrize(
    "installed, place, requested",
    [
        (None, "environment", [OPEN]),
        ("2.10.1", "environment", [OPEN]),
        ("2.11.0a0+eb65b36914.nv26.2", "environment", []),
        ("2.13.0+cpu", "environment", []),
        ("3.0.0", "environment", []),
        ("2.13.0", "system, seen", []),
        ("2.13.0", "system, hidden", [OPEN]),
    ],
)
def test_backend_requests_torch_only_where_no_supported_one_is(
    tmp_path: Path, installed: str | None, place: str, requested: list[str]
) -> None:
    # Two environments that hold nothing but torch's metadata, seen from a third one: pip's, with setuptools alone.
    environment, system, build = (tmp_path / name for name in ("environment", "system", "build"))
    for folder in (environment, system, build):
        folder.mkdir()
    (environment / "pyvenv.cfg").write_text(f"include-system-site-packages = {str(place == 'system, seen').lower()}\n")
    if installed is not None:
        library = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        metadata = tmp_path / place.split(",")[0] / library / f"torch-{installed}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {installed}\n")
    for package in ("setuptools", "_distutils_hack"):
        (build / package).symlink_to(Path(setuptools.__file__).parents[1] / package)
    script = f"""
import sys
sys.path += [{str(build)!r}, {str(ROOT / "_build")!r}]
sys.prefix, sys.base_prefix = {str(environment)!r}, {str(system)!r}
import backend
print(backend.get_requires_for_build_editable(), backend.get_requires_for_build_wheel())
"""
    result = run("-S", "-c", script, PYTHONPATH="")  # -S: no site-packages
    assert result.stdout.strip() == f"{requested} {requested}", result.stderr


def test_unknown_wish_for_cuda_is_named() -> None:
    result = run("setup.py", "--version", GFT_MEGATRON_CUDA="yes")
    assert result.returncode != 0
    assert "GFT_MEGATRON_CUDA must be 0, 1 or unset, got 'yes'" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_cuda_by_force_needs_a_cuda_torch() -> None:
    result = run("setup.py", "--version", GFT_MEGATRON_CUDA="1")
    assert result.returncode != 0
    assert "the torch of this environment is a CPU build" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("cuda, newest", [("12.6", "9.0+PTX"), ("12.8", "10.0+PTX"), ("13.2", "10.0+PTX")])
def test_architectures_are_those_that_nvcc_knows(cuda: str, newest: str) -> None:
    script = f"""
import os, runpy, sys, torch
os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
torch.version.cuda, sys.argv = {cuda!r}, ["setup.py", "--version"]
runpy.run_path("setup.py")
print(os.environ["TORCH_CUDA_ARCH_LIST"])
"""
    result = run("-c", script, GFT_MEGATRON_CUDA="0")
    assert result.stdout.splitlines()[-1].split(";")[-1] == newest, result.stderr


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    folders = ["--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    result = run("setup.py", "build_ext", *folders, PATH=str(tmp_path), CXX="no-such-compiler", GFT_MEGATRON_CUDA="0")
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stderr.splitlines()[-1]


def test_unknown_instruction_set_is_named() -> None:
    result = run("-c", "from gft_megatron.ops import build_info; build_info()", GFT_MEGATRON_ISA="avx9")
    assert "GFT_MEGATRON_ISA=avx9: this processor and build have baseline" in result.stderr
