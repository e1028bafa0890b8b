"""The rollout engine interface: what the collector may ask of whatever generates the model's own samples.

Made for remote servers, and kept by the in-process engine too: one request a sample, everything awaitable, every
failure a typed error. A partial or failed generation is an exception, never a `Completion`, so that it cannot become
a training sample by accident.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from gft_megatron.groups import WeightSpan


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one response is drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sample to draw. `request_id` is unique and of fixed length: SGLang aborts by prefix."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


class FinishReason(StrEnum):
    STOP = "stop"
    """The end-of-sequence token was drawn; it is the last of `Completion.token_ids`."""
    LENGTH = "length"
    """`max_new_tokens` were drawn without it: the response is truncated."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole response."""

    request_id: str
    token_ids: np.ndarray  # [response length] int64, the end-of-sequence token included
    log_probs: np.ndarray  # [response length] float32, of softmax(logits / temperature), before any top-p cut
    finish_reason: FinishReason
    weight_spans: tuple[WeightSpan, ...]  # cover [0, response length)


class RolloutError(Exception):
    """A request that gave no whole response."""

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(f"request {request_id}: {message}")
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class Partial:
    """The beginning of a response, drawn before its request was aborted. To go on from, never to train on as it is."""

    token_ids: np.ndarray  # [number drawn] int64
    log_probs: np.ndarray  # [number drawn] float32, as in Completion
    weight_spans: tuple[WeightSpan, ...]  # cover [0, number drawn)


class RequestAborted(RolloutError):
    """Cancelled by `abort`."""

    def __init__(self, request_id: str, message: str, partial: Partial | None = None) -> None:
        """
        Args:
            partial: what had been drawn, where the engine can tell.
        """
        super().__init__(request_id, message)
        self.partial = partial


class RequestRefused(RolloutError):
    """The request itself is wrong (a token outside the vocabulary, a prompt longer than the context): do not retry."""


class EngineFailed(RolloutError):
    """The engine broke while it served the request: another try, elsewhere, may succeed."""


class RolloutEngine(ABC):
    """Generates samples with the newest weights it was given."""

    scope: ClassVar[Literal["rank", "replica"]]
    """"rank": every training rank runs its own engine and collects its own share of the prompts (the embedded one).
    "replica": one engine client for each data-parallel replica, on its first rank (remote servers)."""
    is_reproducible: ClassVar[bool]
    """Whether the same requests, together and with the same weights, give the same samples again."""

    weight_version: int
    """Version of the weights that the next token is sampled with; -1 before the first `update_weights`."""

    @abstractmethod
    async def generate(self, request: GenerateRequest) -> Completion:
        """Draw one response. Many calls may be awaited together; the engine batches them.

        Raises:
            RolloutError: no whole response came of it; the subclass says why.
        """

    @abstractmethod
    async def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """Cancel these requests (None: all). Their `generate` calls raise RequestAborted.

        A `generate` call that is itself cancelled (asyncio) leaves no request behind either.
        """

    @abstractmethod
    async def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights under their Hugging Face names, every tensor whole.

        An engine of scope "rank" has no request in flight then. Servers may: their samples go on with the new weights.

        The iterable may be a collective (each item gathers from other ranks): it is always consumed to its end.
        """

    async def release_memory(self) -> None:
        """Leave the device's memory to the trainer until the next weights. No request is in flight."""
        raise NotImplementedError(f"{type(self).__name__} holds no memory that it could release")

    def figures(self) -> dict[str, float]:
        """Metrics as of now."""
        return {}

    @abstractmethod
    async def close(self) -> None:
        """Abort everything and free what the engine holds."""


_OWN_COUNTS = ("tokens/", "failures/", "in_flight", "retries")


def figures_of_all(engines: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """`RolloutEngine.figures` of a run whose engines have these: what each has sent and got is added up; what servers
    are doing, and the version of their weights, all engines tell alike."""
    total: dict[str, float] = {}
    for figures in engines:
        for name, value in figures.items():
            total[name] = total.get(name, 0.0) + value if name.startswith(_OWN_COUNTS) else total.get(name, value)
    return total
