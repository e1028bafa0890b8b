"""What a worker says of its weights: their version, and checksums that have to be equal on all workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError

_RENAME_SEC = 60.0
_CHECKSUM_SEC = 300.0  # reads every weight


def incomplete(version: int) -> str:
    """The version of a worker between its old weights and these. No number, so that it equals none."""
    return f"incomplete-{version}"


async def rename(http: Http, url: str, version: str) -> None:
    """Raises: WorkerError."""
    body = {"new_version": version, "abort_all_requests": False}
    await http.call(url, "/update_weight_version", body, timeout_sec=_RENAME_SEC, admin=True)


async def unequal_checksums(http: Http, urls: Sequence[str]) -> dict[str, str]:
    """The workers whose weights are not those of most workers, and why. With no majority, all of them."""
    found = await asyncio.gather(*(checksum(http, url) for url in urls), return_exceptions=True)
    reasons: dict[str, str] = {}
    sums: dict[str, str] = {}
    for url, result in zip(urls, found, strict=True):
        if isinstance(result, WorkerError):
            reasons[url] = str(result)
        elif isinstance(result, BaseException):
            raise result
        else:
            sums[url] = result
    if len(set(sums.values())) > 1:
        (most, count), *_ = Counter(sums.values()).most_common()
        for url, own in sums.items():
            if own != most or 2 * count <= len(sums):
                reasons[url] = f"{url}: checksum {own} of its weights, {count} of {len(sums)} workers have {most}"
    return reasons


async def checksum(http: Http, url: str) -> str:
    """Of all weights as the server holds them: equal for equal weights under an equal parallel layout.

    Raises:
        WorkerError
    """
    answer = await http.call(url, "/weights_checker", {"action": "checksum"}, timeout_sec=_CHECKSUM_SEC, admin=True)
    try:
        return str(answer["per_engine_checksum"])
    except (TypeError, KeyError) as error:
        raise WorkerError(url, FailureKind.MALFORMED, "/weights_checker has no per_engine_checksum") from error
