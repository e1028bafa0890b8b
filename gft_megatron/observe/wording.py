"""How figures read in a few words, for the log and for the terminal alike, and how foreign text is made harmless."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gft_megatron.observe.stages import split_step_time
from gft_megatron.rollout.counts import CollectNews

_SHORT_STAGES = {
    "generate": "gen",
    "reward": "reward",
    "exchange": "exchange",
    "update_weights": "sync",
    "old_log_probs": "train",
    "forward_backward": "train",
    "optimizer": "train",
    "evaluate": "eval",
    "save": "save",
    "other": "other",
}
_SMALLEST_SHARE = 0.05

_TROUBLES = {
    "rollout/groups_dropped": "dropped groups",
    "rollout/groups_stale": "stale groups",
    "engine/workers_dead": "dead servers",
    "engine/retries": "retries",
    "rollout/failed_samples": "failed samples",
    "rollout/reward_errors": "reward errors",
    "eval/failed_samples": "failed samples",
}


def phrases(figures: Mapping[str, float]) -> dict[str, str]:
    """What can be said about these figures: topic -> words. Topics without figures are absent.

    Topics: loss, reward, entropy, rectified, grad_norm, lr, speed, time, eval, trouble.
    """
    words = {
        "loss": _join(_figure(figures, "train/loss", "loss {:.4f}"), _figure(figures, "train/nll", "nll {:.3f}")),
        "reward": _rewards(figures),
        "entropy": _figure(figures, "train/entropy_mean", "H {:.2f}"),
        "rectified": _figure(figures, "train/rectified_frac", "rectified {:.0%}"),
        "grad_norm": _figure(figures, "train/grad_norm", "gnorm {:.3g}"),
        "lr": _figure(figures, "train/lr", "lr {:.1e}"),
        "speed": count(figures["train/tokens_per_sec"]) + " tok/s" if "train/tokens_per_sec" in figures else "",
        "time": _time(figures),
        "eval": _evaluation(figures),
        "trouble": _join(*(f"{what} {figures[name]:.0f}" for name, what in _TROUBLES.items() if figures.get(name))),
    }
    return {topic: text for topic, text in words.items() if text}


def collecting(news: CollectNews, engine: Mapping[str, float], speeds: Mapping[str, float]) -> str:
    """12/64 groups, 40 in flight, 1 dropped | 10.0.0.7:30000 4.1k tok/s | 2 healthy, 9 queued | weights 7 (0.4s)

    Args:
        engine: `SGLangEngine.figures()`, empty for an engine without servers.
        speeds: tokens a second of each server.
    """
    groups = f"{news.num_groups}/{news.num_draws} groups, {news.num_in_flight} in flight"
    words = [groups + (f", {news.num_dropped} dropped" if news.num_dropped else "")]
    if engine:
        states = {name.removeprefix("workers_"): n for name, n in engine.items() if name.startswith("workers_") and n}
        words += [
            *(f"{server} {count(speed)} tok/s" for server, speed in speeds.items()),
            ", ".join(f"{number:.0f} {state}" for state, number in {**states, "queued": engine["queued"]}.items()),
            f"weights {engine['weight_version']:.0f} ({engine['sync_sec']:.1f}s)",
        ]
        failures = {name.removeprefix("failures/"): n for name, n in engine.items() if name.startswith("failures/")}
        if failures:
            words.append("failed: " + ", ".join(f"{kind} {number:.0f}" for kind, number in failures.items()))
    return " | ".join(words)


def count(number: float) -> str:
    """1234567 -> 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """3725 -> 1:02:05, 65 -> 1:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def inert(text: str) -> str:
    r"""The text as one line that can only be read: no terminal escapes, direction overrides or lone surrogates.

    Line breaks show as \n. Rich's markup is not escaped here: whoever prints with rich has to turn it off.
    """
    one_line = text.replace("\r\n", "\n").replace("\n", "\\n")
    return "".join(char if char.isprintable() else " " if char.isspace() else "" for char in one_line)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters: the beginning and, since answers stand there, the end."""
    if len(text) <= limit:
        return text
    gap = " ... "
    tail = (limit - len(gap)) // 2
    return text[: limit - len(gap) - tail] + gap + text[len(text) - tail :]


def _figure(figures: Mapping[str, float], name: str, template: str) -> str:
    return template.format(figures[name]) if name in figures else ""


def _join(*words: str) -> str:
    return " ".join(filter(None, words))


def _rewards(figures: Mapping[str, float]) -> str:
    by_source = _join(
        *(_figure(figures, f"rollout/reward_mean_{name}", name + " {:.2f}") for name in ("self", "teacher", "expert"))
    )
    rewards = by_source or _figure(figures, "rollout/reward_mean", "{:.2f}")
    return _join("reward", rewards, _figure(figures, "rollout/zero_std_frac", "(zero-std {:.0%})")) if rewards else ""


def _time(figures: Mapping[str, float]) -> str:
    if "time/step_sec" not in figures:
        return ""
    stages = split_step_time(figures)
    total = max(figures["time/step_sec"], sum(stages.values()), 1e-9)
    shares: dict[str, float] = {}
    for stage, seconds in stages.items():
        shares[_SHORT_STAGES[stage]] = shares.get(_SHORT_STAGES[stage], 0.0) + seconds / total
    shown = _join(*(f"{name} {share:.0%}" for name, share in shares.items() if share >= _SMALLEST_SHARE))
    seconds = figures["time/step_sec"]
    return _join(f"step {seconds:.2f}s" if seconds < 10 else f"step {seconds:.1f}s", f"({shown})" if shown else "")


def _evaluation(figures: Mapping[str, float]) -> str:
    accuracies = [
        f"{match[1]} {value:.3f}" for name, value in figures.items() if (match := re.match("eval/accuracy_(.+)", name))
    ]
    return _join(
        *accuracies,
        _figure(figures, "eval/response_length_mean", "length {:.1f}"),
        _figure(figures, "eval/truncated_frac", "truncated {:.0%}"),
        _figure(figures, "eval/num_prompts", "({:.0f} prompts)"),
    )
