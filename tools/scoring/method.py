"""What every way of scoring is: settings that make a function from responses to a number for each of their tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Response:
    """A recorded response as training reads it."""

    prompt_ids: np.ndarray  # [prompt length] int64
    token_ids: np.ndarray  # [r] int64, the end-of-sequence token included
    text: str


Score = Callable[[Sequence[Response]], list[np.ndarray]]
"""One number for each token of each response, [r] or [r - 1]: the end-of-sequence token may be left out."""
Pass = Callable[[str], Iterator[list[Response]]]
"""Reads all responses of the data anew, some at a time; the text says in the progress what for."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The flags that all methods have."""

    input: Path
    """Data file of the training, JSON Lines or Parquet."""
    output: Path
    """File to write, JSON Lines."""
    hf_checkpoint: str
    """Hugging Face folder of the model that will be trained. Its tokenizer is the one whose tokens get scores."""

    key: ClassVar[Literal["token_scores", "token_groups"]] = "token_scores"
    """What the numbers become in a response of the data."""

    @property
    def max_tokens(self) -> int | None:
        """Longest prompt + response that can be scored; asked once. None: any."""
        return None

    @abstractmethod
    def scorer(self, tokenizer: PreTrainedTokenizerBase, responses: Pass) -> Score:
        """Load what it takes, look at all responses first where it takes that.

        Raises:
            ValueError: in one line, what cannot be loaded or does not fit.
        """
