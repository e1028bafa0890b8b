"""What the end-to-end tests share besides fixtures."""

import json
import subprocess
import sys
from pathlib import Path

from torchrun import ROOT

PROGRAM = ROOT / "examples" / "pretrain_gft.py"


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The optimizer steps in metrics.jsonl, evaluations left out."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "train/loss" in record]


def run_tool(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / name, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
