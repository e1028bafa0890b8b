"""What the end-to-end tests share besides fixtures."""

import json
from pathlib import Path

from torchrun import ROOT

PROGRAM = ROOT / "examples" / "pretrain_gft.py"


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The optimizer steps in metrics.jsonl, evaluations left out."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "train/loss" in record]
