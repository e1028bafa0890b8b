"""The rules that keep the rooms apart, read off the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "gft_megatron").rglob("*.py"))
PROGRAMS = sorted([*SOURCES, *(ROOT / "tools").glob("*.py"), *(ROOT / "examples").glob("*.py")])


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT / "gft_megatron").parts[0]


def offenders(allowed: set[str], is_forbidden) -> list[str]:
    return [
        str(p.relative_to(ROOT))
        for p in SOURCES
        if room(p) not in allowed and any(map(is_forbidden, imported_modules(p)))
    ]


def test_only_training_imports_megatron():
    assert offenders({"training"}, lambda name: name.split(".")[0] == "megatron") == []
    assert any(name.startswith("megatron.core") for name in imported_modules(ROOT / "gft_megatron/training/step.py"))


def test_the_package_is_imported_without_megatron():
    # hook_loss, which needs it, is imported when it is asked for.
    package = ast.parse((ROOT / "gft_megatron/__init__.py").read_text())
    at_once = {node.module for node in package.body if isinstance(node, ast.ImportFrom)}
    rest = {name for p in SOURCES if room(p) not in ("training", "__init__.py") for name in imported_modules(p)}
    assert not [name for name in at_once | rest if name.startswith("gft_megatron.training")]


def test_losses_and_their_neighbours_know_no_process_group():
    allowed = {"training", "ops"}
    # The group with the servers, of which the default group knows nothing.
    broadcast = "gft_megatron/rollout/sglang/weight_sync/from_distributed.py"
    # The file format of torch.distributed.checkpoint, written by one process without a group.
    file_format = "gft_megatron/convert/torch_dist_writer.py"
    assert offenders(allowed, lambda name: name.startswith("torch.distributed")) == [file_format, broadcast]


def test_only_the_sglang_client_opens_sockets():
    allowed = {"rollout"}
    forbidden = {"socket", "http", "aiohttp", "requests", "urllib", "httpx"}
    assert offenders(allowed, lambda name: name.split(".")[0] in forbidden) == []


def test_only_ops_touches_the_operators():
    users = {room(p) for p in SOURCES if "torch.ops.gft_megatron" in p.read_text()}
    assert users <= {"ops"}


# SGLang takes tensors in a request as a pickle only. That file makes one; no file of ours reads any.
MAKES_A_PICKLE = ROOT / "gft_megatron/rollout/sglang/weight_sync/from_tensor.py"


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bimport pickle\b", r"\bfrom pickle\b", r"\bUnpickler\b", r"\bpickle\.loads?\(",
        r"(?<![.\w])eval\(", r"(?<![.\w])exec\(",
        r"shell=True", r"torch\.load\(",
        r"trust_remote_code\s*=\s*True", r"verify\s*=\s*False",
    ],
)  # fmt: skip
def test_nothing_runs_code_out_of_data(pattern):
    hits = [
        f"{p.relative_to(ROOT)}:{number}: {line.strip()}"
        for p in PROGRAMS
        for number, line in enumerate(p.read_text().splitlines(), 1)
        if re.search(pattern, _without_prose(line)) and not (p == MAKES_A_PICKLE and line == "import pickle")
    ]
    assert hits == []


def _without_prose(line: str) -> str:
    """Comments may name what the code avoids."""
    return line.split("#")[0]
