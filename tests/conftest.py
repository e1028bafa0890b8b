"""Puts tests/ on the import path (`from ranks import run_on_ranks`), keeps every test process to one thread, and says
which tests stay together when several processes share them (`pytest -n 2`)."""

import os
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatTestsShare(LoadScopeScheduling):
        """Tests on real SGLang servers share the servers, others what their file makes. pytest-xdist 3.8 has marks for
        that (`--dist loadgroup`), which do nothing with pytest 9.2."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/sglang" if file.startswith("tests/sglang/") else file

    return ByWhatTestsShare(config, log)
