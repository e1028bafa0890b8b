"""What a server has to do, and whether it gets anywhere: one cheap question for all of its requests."""

from __future__ import annotations

from dataclasses import dataclass

from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError


@dataclass(frozen=True)
class Load:
    """Summed over a server's data-parallel ranks."""

    running: int
    queued: int
    mark: tuple[float, ...]
    """Counters that move when tokens are made, and only then."""


async def read_load(http: Http, url: str, *, timeout_sec: float) -> Load:
    """
    Raises:
        WorkerError
    """
    answer = await http.call(url, "/v1/loads?include=core", timeout_sec=timeout_sec)
    try:
        ranks = answer["loads"]
        return Load(
            running=sum(rank["num_running_reqs"] for rank in ranks),
            queued=sum(rank["num_waiting_reqs"] for rank in ranks),
            mark=tuple(counter for rank in ranks for counter in _mark(rank)),
        )
    except (TypeError, KeyError, IndexError) as error:
        raise WorkerError(url, FailureKind.MALFORMED, f"/v1/loads lacks {error}") from error


def _mark(rank: dict) -> tuple[float, ...]:
    """The queue's length is not among them: it grows while nothing moves."""
    if "decode_moments" in rank:
        decoded = (rank["decode_moments"] or [0.0, 0.0])[1]  # [steps, tokens, ...] since the start
        return (decoded, rank.get("total_prefill_uncached_tokens", 0))
    return (rank.get("num_used_tokens", 0), rank.get("num_running_reqs", 0))  # releases without counters
