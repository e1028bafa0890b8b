"""A loss of this project in somebody else's Megatron script.

GPTModel.forward(labels=...) hands labels [b, s] and logits [s, b, v/p] to its own `compute_language_model_loss`
(models/common/language_module/language_module.py; cross_entropy_loss_fusion is decided in there). An attribute of the
instance takes its place; no class is changed.

Legend: b sequences of s tokens on this context-parallel rank, n = s * b, v/p vocabulary shard of this tensor-parallel
rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from gft_megatron.data.packing import IGNORED_LABEL
from gft_megatron.groups import Source
from gft_megatron.losses import (
    LOSSES,
    LossFn,
    LossInputs,
    batch_sums,
    is_token_local,
    loss_hyper_parameters,
    required_inputs,
)
from gft_megatron.losses.reduce import masked_mean
from gft_megatron.losses.trial import try_loss
from gft_megatron.ops import vocab_parallel_log_probs
from gft_megatron.ops.rows import check_temperature

_METHOD = "compute_language_model_loss"


@dataclass
class LossHook:
    """A loss that `hook_loss` put on a model."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Of this rank's last micro-batch: `nll` and what the loss reports, means over its labels (also those that the
    script masks afterwards), detached, where the logits are. Empty on pipeline stages without an output layer."""
    _models: list[LanguageModule] = field(default_factory=list)

    def remove(self) -> None:
        """Give the model its own loss back."""
        while self._models:
            delattr(self._models.pop(), _METHOD)


def hook_loss(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    name: str,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    **hyper: Any,
) -> LossHook:
    """Make forward(labels=...) return this loss per token, [b, s] fp32, where it returned the cross-entropy.

    Call it on every rank, before or after the model is wrapped. Masking and averaging stay with the script; to the loss
    every label of the vocabulary counts, as an expert's token. Labels outside it (-100) give 0. An evaluation sees the
    loss too; its NLL is in `LossHook.metrics`.

    As under Megatron's own cross-entropy in fp32, the logits are gone afterwards: their gradient takes their memory. An
    operation that saved them raises in its backward.

    Args:
        model: a LanguageModule such as GPTModel, DDP or Float16Module around one, or the list of this rank's virtual
            pipeline stages.
        name: a loss of `LOSSES` that needs nothing but log-probs and entropy of single tokens.
        temperature: log-probs are those of softmax(logits / temperature).
        vocab_size: the true size, where padding of the vocabulary is to take no part. None: it does, as in Megatron's
            own cross-entropy.
        hyper: hyper-parameters of the loss; they stay as they are, also where the method has a schedule.

    Raises:
        ValueError: an unknown loss, one that needs more, a hyper-parameter that it does not have or that is out of
            range; a model that it cannot be put on. In forward, logits that are not one vocabulary shard.
    """
    loss = _loss_of_single_tokens(name)
    _try(name, loss, hyper)
    check_temperature(temperature)
    chunks = list(model) if isinstance(model, Sequence) else [model]
    models = [_language_module(chunk) for chunk in chunks]
    for inner in models:
        _require_suitable(inner, vocab_size)
    hook = LossHook()
    for inner in models:
        if inner.post_process:
            setattr(inner, _METHOD, _replacement(inner, loss, hyper, temperature, vocab_size, hook))
            hook._models.append(inner)
    return hook


def _loss_of_single_tokens(name: str) -> LossFn:
    if name not in LOSSES:
        raise ValueError(f"{name!r} is no loss; the losses are {', '.join(LOSSES)}")
    loss = LOSSES[name]
    needs = sorted(required_inputs(loss) - {"entropy"})
    if batch_sums(loss) is not None:
        needs.append("sums over the global batch")
    elif not is_token_local(loss):
        needs.append("whole sequences")
    if needs:
        raise ValueError(
            f"hook_loss has log-probs and entropy of single tokens only, and {name!r} needs {', '.join(needs)}; "
            f"the training loop of this project provides it (examples/pretrain_gft.py --loss {name})"
        )
    return loss


def _try(name: str, loss: LossFn, hyper: dict[str, Any]) -> None:
    """Every loss checks its hyper-parameters when it is called."""
    known = loss_hyper_parameters()[name]
    for key in hyper:
        if key not in known:
            raise ValueError(f"the loss {name!r} has no hyper-parameter {key!r}; it has {', '.join(known) or 'none'}")
    try:
        with torch.device("cpu"):  # a script may build its model under torch.device("meta")
            try_loss(loss, hyper)
    except TypeError as error:
        raise ValueError(f"the loss {name!r} cannot take the hyper-parameters {hyper}: {error}") from error


def _language_module(chunk: torch.nn.Module) -> LanguageModule:
    inner = chunk
    while not isinstance(inner, LanguageModule):
        inner = getattr(inner, "module", None)
        if inner is None:
            raise ValueError(
                f"hook_loss needs a LanguageModule of Megatron-Core (GPTModel), bare or wrapped, got "
                f"{type(chunk).__name__}; of a multimodal model, pass the language model inside"
            )
    return inner


def _require_suitable(model: LanguageModule, vocab_size: int | None) -> None:
    if model.config.mtp_num_layers:
        raise ValueError(
            f"mtp_num_layers is {model.config.mtp_num_layers}; hook_loss needs a model without multi-token prediction, "
            f"whose heads would be trained by the same loss"
        )
    if _METHOD in vars(model):
        raise ValueError(f"this model's {_METHOD} is replaced already; call remove() of the other hook first")
    if vocab_size is not None and not 1 <= vocab_size <= model.vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}; the model has {model.vocab_size} columns, padding included")


def _replacement(
    model: LanguageModule,
    loss: LossFn,
    hyper: dict[str, Any],
    temperature: float,
    vocab_size: int | None,
    hook: LossHook,
) -> Callable[[Tensor, Tensor], Tensor]:
    # A plain function over these, not over the model: copy.deepcopy of a model copies no process group then.
    tp_group, padded_size = model.tp_group, model.vocab_size
    with_entropy = "entropy" in required_inputs(loss)

    def token_losses(labels: Tensor, logits: Tensor) -> Tensor:  # [b, s], [s, b, v/p] -> [b, s]
        width, num_ranks = logits.shape[-1], tp_group.size()
        if width * num_ranks != padded_size:
            raise ValueError(
                f"hook_loss needs one shard of the vocabulary, {padded_size // num_ranks} columns, got {width}; "
                f"build the model with parallel_output=True and do not gather its output"
            )
        labels = labels.t()
        known = (labels >= 0) & (labels < (vocab_size or padded_size))
        log_probs, entropy = vocab_parallel_log_probs(
            logits,
            labels.masked_fill(~known, IGNORED_LABEL),
            tp_group=tp_group,
            temperature=temperature,
            with_entropy=with_entropy,
            inplace_backward=True,
            vocab_size=vocab_size,
        )
        per_token_loss, metrics = loss(_inputs(log_probs, known, entropy), **hyper)
        hook.metrics = {"nll": masked_mean(-log_probs, known), **metrics}
        return per_token_loss.view(labels.shape).t().contiguous()

    return token_losses


def _inputs(log_probs: Tensor, mask: Tensor, entropy: Tensor | None) -> LossInputs:  # [s, b] each
    sequences = torch.arange(log_probs.shape[1], device=log_probs.device)
    return LossInputs(
        log_probs=log_probs.flatten(),
        mask=mask.flatten(),
        sequence_ids=sequences.repeat(log_probs.shape[0]),
        group_ids=sequences,
        sources=torch.full_like(sequences, Source.EXPERT),
        entropy=None if entropy is None else entropy.flatten(),
    )
