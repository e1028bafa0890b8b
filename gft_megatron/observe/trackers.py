"""Where figures go besides metrics.jsonl, by name: TensorBoard, and Weights & Biases where it is installed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Tracker(Protocol):
    """Takes the figures of one step after the other, on one rank."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard."""

    def __init__(self, run_dir: Path | str, *, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds of imports, for those who asked for it

        # Readers drop what an earlier process wrote from purge_step on.
        purge_step = resume_step + 1 if resume_step else 0
        self._writer = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project gft_megatron, named after the run folder. Keys and servers are wandb's own settings."""

    def __init__(self, run_dir: Path | str, *, resume_step: int = 0) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("--trackers wandb: wandb is not installed; `pip install wandb`, or leave it out") from None
        run_dir = Path(run_dir)
        id_file = run_dir / "wandb_run_id"
        if not (resume_step and id_file.exists()):
            id_file.write_text(uuid.uuid4().hex + "\n")
        self._run = wandb.init(
            project="gft_megatron",
            name=run_dir.resolve().name,
            dir=str(run_dir),
            id=id_file.read_text().strip(),
            resume="allow",
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def build_trackers(names: Sequence[str], run_dir: Path | str, *, resume_step: int = 0) -> list[Tracker]:
    """The trackers of these names.

    Args:
        resume_step: the step of the checkpoint that training goes on from; what was tracked after it is replaced where
            the tracker can do that (wandb keeps what it first got).

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"--trackers {name}: unknown; the trackers are {', '.join(TRACKERS)}")
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    return [TRACKERS[name](run_dir, resume_step=resume_step) for name in names]
