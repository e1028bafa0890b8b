"""The methods that are compared, and the rows of the table."""

from __future__ import annotations

from dataclasses import dataclass

from gft_megatron.losses import LOSSES


@dataclass(frozen=True)
class Method:
    """One way to train for so many steps of 128 sequences."""

    name: str
    title: str
    loss: str
    group: tuple[int, int, int]
    """Expert, teacher and own responses of a prompt."""
    hyper: tuple[str, ...] = ()
    """Flags of the loss besides its defaults."""
    scored: bool = False
    """Its data have a score for each token."""


SFT = Method("sft", "SFT", "sft", (1, 0, 0))
GRPO = Method("grpo", "GRPO", "grpo", (0, 0, 8))
_OTHERS = (
    Method("sft-mix", "SFT (mix)", "sft", (1, 3, 0)),
    Method("dft", "DFT", "dft", (1, 0, 0)),
    Method("cadft", "CADFT", "cadft", (1, 0, 0)),
    Method("sft-go", "SFT-GO", "sft_go", (1, 0, 0), scored=True),
    Method("gft", "GFT (paper)", "gft", (1, 3, 4), ("--tau", "0.7")),
    Method("gft-recorded", "GFT (recorded only)", "gft", (1, 3, 4), ("--tau", "0.7", "--tau-self", "0")),
)


@dataclass(frozen=True)
class Row:
    """A line of the table: a model that comes out of each seed."""

    name: str
    title: str
    method: Method | None = None
    """None: the warm-up alone."""
    start: str = "warmup"
    """Row whose model it starts from."""
    early: bool = False
    """Stops at the step that was best on the validation problems."""
    length: int = 1
    """Of the run, in --steps."""


WARMUP = "warmup"
SFT_EARLY = "sft-early"
GRPO_LONG = "grpo-long"
_BEFORE_GRPO = (SFT.name, SFT_EARLY, "dft", "cadft", "sft-go", "gft", "gft-recorded")


def methods() -> list[Method]:
    """Those whose loss there is."""
    return [method for method in (SFT, *_OTHERS, GRPO) if method.loss in LOSSES]


def rows() -> list[Row]:
    """In the order of the table: every method by itself, then what GRPO makes of it."""
    alone = [Row(method.name, method.title, method) for method in methods()]
    alone.insert(1, Row(SFT_EARLY, "SFT (early stop)", SFT, early=True))
    long = Row(GRPO_LONG, "GRPO (twice as long)", GRPO, length=2)
    then = [
        Row(f"{row.name}-then-grpo", f"{row.title} -> GRPO", GRPO, start=row.name)
        for row in alone
        if row.name in _BEFORE_GRPO
    ]
    return [Row(WARMUP, "warm-up only"), *alone, long, *then]
