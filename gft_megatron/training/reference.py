"""The frozen reference model: its weights wait in host memory and change places with the policy's for a pass.

Of what it says, log-probs are kept as they are. Its whole distribution (ASFT) is kept as the last hidden states
[t, h] of each micro-batch and one copy of its output layer, which give the logits of one micro-batch when asked.

Legend: t tokens of a micro-batch on this context-parallel rank, v/p vocabulary shard of this tensor-parallel rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from gft_megatron.training.fused_linear import handing_through, output_weight
from gft_megatron.training.model import gather_updated_parameters
from gft_megatron.training.parallel import is_last_stage
from gft_megatron.training.passes import Chunks
from gft_megatron.training.step import Objective, StepInput, forward_only
from gft_megatron.training.weights import global_parameters


class Reference:
    """A second set of weights for the same model chunks."""

    def __init__(self, chunks: Sequence[nn.Module], load: Callable[[], None]) -> None:
        """
        Args:
            load: fills the chunks with the reference's weights; their own are put back.
        """
        self._parameters = [parameter for chunk in chunks for _, parameter in global_parameters(chunk)]
        policy = self._copies()
        load()
        self._weights = self._copies()
        self._put(policy)
        self._output_weight: Tensor | None = None

    @contextlib.contextmanager
    def in_place(self, chunks: Chunks) -> Iterator[None]:
        """The chunks are the reference inside."""
        gather_updated_parameters(chunks)
        policy = self._copies()
        self._put(self._weights)
        try:
            yield
        finally:
            self._put(policy)

    def forward(
        self, chunks: Chunks, inputs: Sequence[StepInput], objective: Objective, *, with_logits: bool
    ) -> list[StepInput]:
        """The inputs with ref_log_probs, and ref_logits on request; as they were but on the last stage."""

        on_hidden = dataclasses.replace(objective, fused_linear_loss=True)
        with self.in_place(chunks), handing_through(chunks):
            reports = forward_only(
                chunks,
                inputs,
                on_hidden,
                lambda output, _, log_probs, __: {"log_probs": log_probs, "hidden": output[0]},
            )
            if with_logits and self._output_weight is None and is_last_stage():
                self._output_weight = output_weight(chunks[-1]).detach().clone()
        if not is_last_stage():
            return list(inputs)
        is_split = chunks[0].config.sequence_parallel
        return [
            dataclasses.replace(
                item,
                ref_log_probs=report["log_probs"],
                ref_logits=self._logits_of(report["hidden"], is_split) if with_logits else None,
            )
            for item, report in zip(inputs, reports, strict=True)
        ]

    def _logits_of(self, hidden: Tensor, is_split: bool) -> _Logits:
        assert self._output_weight is not None
        return _Logits(hidden, self._output_weight, is_split)

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]

    def _put(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.copy_(weight)


@dataclasses.dataclass(frozen=True)
class _Logits:
    hidden: Tensor  # [t, h], or [t/p, h] under sequence parallelism
    weight: Tensor  # [v/p, h]
    is_split: bool

    def __call__(self) -> Tensor:  # [t, v/p]
        with torch.no_grad():
            whole = gather_from_sequence_parallel_region(self.hidden) if self.is_split else self.hidden
            return whole @ self.weight.T
