"""What --fused-linear-loss and the settings around it refuse, and what it does to the inputs of a loss."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hf_models import CONFIGS

from gft_megatron import LOSSES, LossInputs
from gft_megatron.config import ModelConfig, ParallelConfig
from gft_megatron.convert import ModelShape
from gft_megatron.losses import is_token_local
from gft_megatron.losses.inputs import batch_sums
from gft_megatron.training.fused_linear import _WithZeroGradient, return_hidden_states
from gft_megatron.training.model import transformer_config


@pytest.mark.parametrize(
    "settings, ddp, message",
    [
        ({"mtp_num_layers": 1}, {}, "transformer.mtp_num_layers"),
        ({"use_mup": True}, {}, "transformer.use_mup"),
        ({"defer_embedding_wgrad_compute": True}, {}, "transformer.defer_embedding_wgrad_compute"),
        ({"params_dtype": torch.bfloat16}, {"grad_reduce_in_fp32": False}, "ddp.grad_reduce_in_fp32=true"),
    ],
)
def test_settings_that_need_logits_are_refused(settings: dict, ddp: dict, message: str) -> None:
    config = SimpleNamespace(**{"params_dtype": torch.float32} | settings)
    with pytest.raises(ValueError, match=message) as caught:
        return_hidden_states([], config, ddp)
    assert "--fused-linear-loss" in str(caught.value) and "\n" not in str(caught.value)


def test_a_mean_over_micro_batches_is_refused() -> None:
    """With or without the flag: Megatron would divide the sums by the number of micro-batches."""
    shape = ModelShape.from_hf(CONFIGS["qwen2"]())
    with pytest.raises(ValueError, match="calculate_per_token_loss=false: losses here are sums"):
        transformer_config(shape, ModelConfig(hf_checkpoint=""), ParallelConfig(), {"calculate_per_token_loss": False})


def test_some_tokens_of_a_batch_keep_all_their_numbers() -> None:
    """`at` must know every [n] field: one that it forgot would be read at the wrong tokens, without an error."""
    per_token = {field.name: torch.arange(7) * 10 + index for index, field in enumerate(dataclasses.fields(LossInputs))}
    sequences = {name: torch.arange(3) for name in ("group_ids", "sources", "advantages")}
    inputs = LossInputs(**per_token | sequences | {"batch": "whole"})
    chosen = inputs.at(torch.tensor([5, 2]))
    for name, values in per_token.items():
        if name in sequences:
            assert getattr(chosen, name) is sequences[name]
        elif name not in ("batch", "context_sum"):
            assert torch.equal(getattr(chosen, name), values[[5, 2]]), name
    assert chosen.batch == "whole"


# Losses in which a token's loss depends on other tokens.
NOT_TOKEN_LOCAL = {"gspo", "cadft", "sft_go", "iw_sft", "poft", "discriminative", "discriminative_mean"}


@pytest.mark.parametrize("name", LOSSES)
def test_token_local_losses_are(name: str) -> None:
    """The loss of some tokens alone is the loss of those tokens among all, for the losses that were declared so."""
    loss = LOSSES[name]
    assert is_token_local(loss) == (name not in NOT_TOKEN_LOCAL)
    generator = torch.Generator().manual_seed(3)
    inputs = LossInputs(
        log_probs=-torch.rand(30, generator=generator) * 3,
        entropy=torch.rand(30, generator=generator),
        mask=torch.ones(30, dtype=torch.bool),
        sequence_ids=torch.arange(30) // 8,
        group_ids=torch.zeros(4, dtype=torch.int64),
        sources=torch.tensor([0, 1, 2, 2]),
        advantages=torch.randn(4, generator=generator),
        old_log_probs=-torch.rand(30, generator=generator) * 3,
        rollout_log_probs=(-torch.rand(30, generator=generator) * 3).where(torch.arange(30) >= 16, torch.nan),
        ref_log_probs=-torch.rand(30, generator=generator) * 3,
        ref_kl=torch.rand(30, generator=generator),
        top_entropy=torch.rand(30, generator=generator),
        token_groups=torch.randint(2, (30,), generator=generator),
    )
    sums = batch_sums(loss)
    if is_token_local(loss) and sums is not None:  # known before the loop takes some tokens at a time
        inputs = dataclasses.replace(inputs, batch=sums(inputs))
    positions = torch.tensor([3, 9, 17, 18, 29])
    alone, among_all = loss(inputs.at(positions))[0], loss(inputs)[0][positions]
    assert torch.equal(alone, among_all) == is_token_local(loss)


def test_the_loss_of_a_stage_is_no_view() -> None:
    """Megatron's schedule for pipelines frees what a stage returns (deallocate_output_tensor), and refuses views."""
    loss, weight = torch.ones((), requires_grad=True), torch.ones(3, requires_grad=True)
    output = _WithZeroGradient.apply(loss * 2, weight)
    assert output._base is None
    output.backward()
    assert float(loss.grad) == 2.0 and torch.equal(weight.grad, torch.zeros(3))
