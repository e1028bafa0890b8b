"""Puts tests/ on the import path (`from ranks import run_on_ranks`), keeps every test process to one thread, and says
which tests stay together when several processes share them (`pytest -n 2 --dist loadgroup`)."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Those on real SGLang servers share them; the others share what their file makes.
        folder = Path(item.path).parent.name
        item.add_marker(pytest.mark.xdist_group("sglang" if folder == "sglang" else Path(item.path).stem))
