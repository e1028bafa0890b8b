"""What the end-to-end tests share besides fixtures."""

import json
import subprocess
import sys
from pathlib import Path

from torchrun import ROOT

from gft_megatron.groups import GroupKey
from gft_megatron.rollout.bank.ledger import ledger_paths, read_group, scan

PROGRAM = ROOT / "examples" / "pretrain_gft.py"


def short_run(toy: Path) -> list[object]:
    """The flags of a short GFT run on the toy task, but for --run-dir; tests override them (the last flag wins)."""
    return [
        "--hf-checkpoint", toy / "model",
        "--prompt-data", toy / "data" / "train.jsonl",
        "--rm-type", "examples/countdown_reward.py:score",
        "--seq-length", 32,
        "--rollout-max-response-len", 6,
        "--rollout-batch-size", 8,
        "--max-tokens-per-gpu", 160,  # about 6 micro-batches; the default would make 32
        "--make-vocab-size-divisible-by", 4,
        "--lr", 1e-3,
        "--eval-interval", 0,
        "--save-interval", 0,
    ]  # fmt: skip


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line of ours; torchrun adds its own report after it."""
    assert done.returncode != 0, done.stdout[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-4000:]
    assert "[rank" not in done.stderr, done.stderr[-4000:]  # how a rank's own traceback begins
    return lines[0]


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The optimizer steps in metrics.jsonl, evaluations left out."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "train/loss" in record]


def finished_groups(bank: Path) -> dict[GroupKey, bytes]:
    """What each whole record of a group says, whoever wrote it and when."""
    found = {}
    for path in ledger_paths(bank):
        for key, entry in scan(path).entries.items():
            record = read_group(path, key, entry)
            head = {name: value for name, value in record.head.items() if name != "written"}
            found[key] = json.dumps(head, sort_keys=True).encode() + record.data
    return found


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
