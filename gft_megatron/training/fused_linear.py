"""--fused-linear-loss: the last stage gives hidden states, and the loss does the output layer's work itself.

Megatron's GPTModel is left as it is. The output layer of our own instance hands its input through, so its parameters,
checkpoints and hooks (overlapped gathers) stay where Megatron expects them.

Legend: t tokens of a micro-batch on this context-parallel rank, v/p vocabulary shard of this tensor-parallel rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gft_megatron.training.model import unwrapped

_WITHOUT_SENSE = {
    "mtp_num_layers": "multi-token prediction has losses of its own on logits",
    "use_mup": "muP scales the logits",
    "defer_embedding_wgrad_compute": "the gradient it defers is the output layer's, which does not run",
}


def return_hidden_states(
    chunks: list[torch.nn.Module], config: TransformerConfig, ddp_overrides: dict[str, Any]
) -> None:
    """Make the last stage return hidden states [1, t, h] (sequence-parallel: [1, t/p, h]), not logits [1, t, v/p].

    Raises:
        ValueError: a setting of Megatron's that needs logits.
    """
    for name, reason in _WITHOUT_SENSE.items():
        if getattr(config, name, None):
            raise ValueError(f"--fused-linear-loss cannot go with --megatron transformer.{name}: {reason}")
    if not ddp_overrides.get("grad_reduce_in_fp32", True) and config.params_dtype != torch.float32:
        raise ValueError("--fused-linear-loss needs --megatron ddp.grad_reduce_in_fp32=true: it sums many products")
    for chunk in chunks:
        model = unwrapped(chunk)
        if model.post_process:
            model.output_layer.forward = _hand_through


@contextlib.contextmanager
def handing_through(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The last stage returns hidden states inside, whatever it returns outside."""
    layers = [unwrapped(chunk).output_layer for chunk in chunks if unwrapped(chunk).post_process]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _hand_through
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _hand_through(hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
    return hidden, None


def output_weight(chunk: torch.nn.Module) -> Tensor:  # [v/p, h]
    """The parameter that the output layer multiplies with; the embedding's where they are one."""
    model = unwrapped(chunk)
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def with_weight_gradient(loss: Tensor, chunk: DistributedDataParallel) -> Tensor:
    """The same loss, such that DDP takes notice of the output weight, whose gradient is in main_grad already.

    With overlapped reduction DDP's hook (distributed/distributed_data_parallel.py, _make_backward_post_hook) insists on
    a gradient from autograd. It gets zeros then, unless an embedding that shares the weight gives a gradient anyway.
    """
    weight = output_weight(chunk)
    is_shared_here = getattr(weight, "zero_out_wgrad", False)  # models/common/language_module
    if not chunk.ddp_config.overlap_grad_reduce or is_shared_here:
        return loss
    weight.grad_added_to_main_grad = True  # nothing to add
    return _WithZeroGradient.apply(loss, weight)


class _WithZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return loss.clone()  # a pipeline schedule frees what a stage returns, and refuses views

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor, Tensor]:
        return grad_loss, torch.zeros_like(ctx.weight)
