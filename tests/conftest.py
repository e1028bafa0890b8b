"""Puts tests/ on the import path (`from ranks import run_on_ranks`) and keeps every test process to one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
