"""Hints (UFT, arXiv:2505.16984): the beginning of an expert's response, from which the model goes on.

The response, its end-of-sequence token left out, is cut into `segments` pieces; the first n of them are the hint,
n ~ Binomial(segments, share). A curriculum lowers the share until the model answers alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gft_megatron.groups import Prompt, Source

NO_HINT = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Hints:
    """How long hints are."""

    segments: int
    share: float
    """Chance of each segment to be given, in [0, 1]."""


def draw_hint(prompt: Prompt, hints: Hints, choose: random.Random) -> np.ndarray:  # [hint length] int64
    """The hint of one sample; empty for a prompt without an expert's response."""
    experts = [response.token_ids for response in prompt.responses if response.source == Source.EXPERT]
    if not experts:
        return NO_HINT
    whole = choose.choice(experts)[:-1]
    given = sum(choose.random() < hints.share for _ in range(hints.segments))
    return whole[: len(whole) * given // hints.segments].astype(np.int64)
