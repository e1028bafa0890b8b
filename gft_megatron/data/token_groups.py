"""Which group each token of a recorded response belongs to (SFT-GO), from the numbers that came with the data.

Groups are made of whole responses, before anything is split over context-parallel ranks.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from gft_megatron.data.rows import BadRow, RowResponse


def top_share(scores: np.ndarray, eta: float) -> np.ndarray:  # [r] -> [r] int64
    """1 for the ceil(eta * r) tokens of highest score, the earlier of equal ones first; 0 for the others."""
    # Of the decimal that was written: 0.07 * 100 is above 7 in binary.
    count = math.ceil(Fraction(str(eta)) * len(scores))
    groups = np.zeros(len(scores), np.int64)
    groups[np.argsort(-scores, kind="stable")[:count]] = 1
    return groups


def response_groups(response: RowResponse, num_tokens: int, eta: float) -> np.ndarray | None:  # [num_tokens] int64
    """The groups of a response's tokens, the end-of-sequence token included; None where the data say nothing.

    Scores become two groups (`top_share`), cluster ids are groups as they are. Both may leave out the end-of-sequence
    token: it then takes the median of the scores, or the group of the token before it.

    Args:
        num_tokens: of the response, the end-of-sequence token included.

    Raises:
        BadRow: there are more or fewer numbers than tokens.
    """
    if response.token_scores is not None:
        scores = np.array(response.token_scores, np.float64)
        eos = np.median(scores) if len(scores) else 0.0
        return top_share(_with_eos(scores, eos, num_tokens, "token_scores"), eta)
    if response.token_groups is not None:
        groups = np.array(response.token_groups, np.int64)
        return _with_eos(groups, groups[-1] if len(groups) else 0, num_tokens, "token_groups")
    return None


def _with_eos(values: np.ndarray, eos: float, num_tokens: int, name: str) -> np.ndarray:  # [num_tokens]
    if len(values) not in (num_tokens - 1, num_tokens):
        raise BadRow(
            f"{name} has {len(values)} numbers for {num_tokens - 1} tokens ({num_tokens} with the end-of-sequence "
            f"token): they were made with another tokenizer or text"
        )
    return values if len(values) == num_tokens else np.append(values, values.dtype.type(eos))
