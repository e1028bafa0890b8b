"""Phases: losses one after the other in one run, each with its own settings (`--phases sft:200,gft:400,grpo:200`).

    PHASES = PHASE{,PHASE}    PHASE = LOSS:STEPS{:FLAG=VALUE} | (PHASES)*TIMES

`sft:100,grpo:400` is the two-stage schedule of the Synergy study (arXiv:2507.07562), `(sft:10,grpo:10)*20` its
interleaved one, and `grpo:400:mix_loss=sft:schedule=mix_coef=1:0:linear` its progressive one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gft_megatron.command_line import flat_values, parse_values
from gft_megatron.config import RunConfig
from gft_megatron.config_checks import flag_of
from gft_megatron.losses import LOSSES, loss_hyper_parameters

_OWN_FLAGS = (
    "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "lr_decay_iters", "weight_decay",
    "num_steps_per_rollout", "num_epochs_per_rollout",
    "rollout_batch_size", "n_expert", "n_teacher", "n_self", "rollout_temperature", "rollout_top_p",
    "advantage_normalization", "advantage_ddof", "advantage_scope", "overlong_buffer_len", "mask_truncated",
    "skip_zero_variance", "refill_groups", "refill_budget", "over_sampling_batch_size", "partial_rollout",
    "max_staleness", "hint_segments", "hint_share",
    "loss_reduction", "batch_statistics", "schedule", "kl_coef", "kl_estimator", "kl_in", "entropy_coef",
    "mix_loss", "mix_coef", "rewrite_interval", "rewrite_warmup", "rewrite_share", "rewrite_probability",
)  # fmt: skip
_REPEATED = re.compile(r"\(([^()]*)\)\s*\*\s*(\d+)")
_NEXT_FLAG = re.compile(r":(?=[a-zA-Z_-]+=)")


@dataclass(frozen=True)
class Phase:
    """Steps [start, end) of a run."""

    index: int
    name: str
    start: int
    end: int
    config: RunConfig
    """As if the run had only this phase; its train_iters is the phase's length."""
    reset_optimizer: bool


def resolve_phases(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of a run; one if it has no --phases.

    Raises:
        ValueError: in one line, which phase is wrong and why.
    """
    if not config.phases.phases:
        phases = [Phase(0, config.loss.loss, 0, config.train_iters, config, False)]
        _require_groups_of_rewrites(phases)
        return tuple(phases)
    texts = _expand(",".join(config.phases.phases))
    resolve = functools.cache(lambda text: _resolve(config, text))  # interleaved phases come back many times
    phases = []
    for text in texts:
        own, resets = resolve(text)
        start = phases[-1].end if phases else 0
        phases.append(Phase(len(phases), own.loss.loss, start, start + own.train_iters, own, resets))
    _require_hyper_parameters_are_used(config, phases)
    _require_groups_of_rewrites(phases)
    return tuple(phases)


def phase_at(phases: tuple[Phase, ...], iteration: int) -> Phase:
    """The phase that step `iteration` (from 0) belongs to; the last one once all are done."""
    return next((phase for phase in phases if iteration < phase.end), phases[-1])


def _expand(text: str) -> list[str]:
    while repeated := _REPEATED.search(text):
        text = text[: repeated.start()] + ",".join([repeated[1]] * int(repeated[2])) + text[repeated.end() :]
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or "(" in text or ")" in text:
        raise ValueError(f"--phases {text}: expected LOSS:STEPS[:FLAG=VALUE...] with commas between, or (...)*TIMES")
    return parts


def _resolve(config: RunConfig, text: str) -> tuple[RunConfig, bool]:
    head, *assignments = _NEXT_FLAG.split(text)
    name, colon, steps = head.partition(":")
    if name not in LOSSES:
        raise ValueError(f"--phases {text}: unknown loss {name!r}; the losses are {', '.join(LOSSES)}")
    if not colon or not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"--phases {text}: expected LOSS:STEPS, steps being a number of at least 1")
    hyper = loss_hyper_parameters()
    own: dict[str, Any] = {}
    resets = False
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        key = key.replace("-", "_")
        if key == "optimizer" and value in ("keep", "reset"):
            resets = value == "reset"
        elif key == "schedule":
            own[key] = [*own.get(key, ()), value]
        elif key in _OWN_FLAGS or any(key in names for names in hyper.values()):
            own[key] = _value(value)
        else:
            raise ValueError(
                f"--phases {text}: {key} cannot be a phase's own; what can: optimizer=keep|reset, the "
                f"hyper-parameters of its loss, {', '.join(_OWN_FLAGS)}"
            )
    values = flat_values(config)
    known = {*hyper[name], *hyper.get(own.get("mix_loss", values["mix_loss"]), ())}
    for key in dict.fromkeys(key for names in hyper.values() for key in names):
        if key not in known:
            values.pop(key)
    try:
        return parse_values({**values, "phases": [], "loss": name, "train_iters": int(steps), **own}), resets
    except ValueError as error:
        raise ValueError(f"--phases {text}: {error}") from None


def _value(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), text)


def _require_hyper_parameters_are_used(config: RunConfig, phases: Sequence[Phase]) -> None:
    """A phase drops what its losses do not know; what no phase knows is a mistake."""
    known = {key for phase in phases for key in phase.config.hyper_names}
    for key in dict.fromkeys(key for keys in loss_hyper_parameters().values() for key in keys):
        if key not in known and getattr(config.loss, key) is not None:
            names = ", ".join(dict.fromkeys(phase.name for phase in phases))
            raise ValueError(f"{flag_of(key)} has no meaning for any of the phases {names}")


def _require_groups_of_rewrites(phases: Sequence[Phase]) -> None:
    """A rewritten response has other tokens than those that the data have scores for."""
    readers = [phase for phase in phases if phase.config.groups_from_data]
    if readers and any(phase.config.rewrite.rewrite_interval for phase in phases):
        raise ValueError(
            f"--rewrite-interval: {readers[0].name} needs a score for each token, and rewritten responses have none: "
            f"add --token-scores excess"
        )
