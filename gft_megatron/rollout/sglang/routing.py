"""Which server a request goes to: the one that knows its prompt already, unless that one has too much to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from hashlib import blake2b

_SLACK = 8  # requests, about a group: at low load a group stays together
_OVER_MEAN = 1.25


def prompt_key(prompt_ids: tuple[int, ...]) -> bytes:
    """What requests of one prompt have in common."""
    return blake2b(repr(prompt_ids).encode(), digest_size=8).digest()


def choose_worker(loads: Mapping[str, int], key: bytes, avoid: AbstractSet[str] = frozenset()) -> str | None:
    """Rendezvous hashing with bounded loads (arXiv:1608.01350): a server gone or come moves only its own prompts.

    Args:
        loads: requests that each server has, of all those that may be chosen.
        key: `prompt_key`.
        avoid: those that just failed this request; taken only if there is no other.

    Returns:
        None where there is no server.
    """
    allowed = {url: load for url, load in loads.items() if url not in avoid} or loads
    if len(allowed) < 2:
        return next(iter(allowed), None)
    most = math.ceil(_OVER_MEAN * (sum(allowed.values()) + 1) / len(allowed)) + _SLACK
    free = [url for url, load in allowed.items() if load < most]
    return max(free, key=lambda url: blake2b(url.encode(), key=key, digest_size=8).digest())
