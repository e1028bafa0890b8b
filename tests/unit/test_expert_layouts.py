"""Layouts that a model with experts cannot have are refused before anything is built, by the flag's name."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from hf_models import CONFIGS, CONFIGS_WITH_EXPERTS

from gft_megatron.config import ModelConfig, ParallelConfig
from gft_megatron.convert import ModelShape
from gft_megatron.training.model import require_divisible, transformer_config
from gft_megatron.training.parallel import lay_out

MIXTRAL = ModelShape.from_hf(CONFIGS_WITH_EXPERTS["mixtral"]())
DENSE = ModelShape.from_hf(CONFIGS["qwen2"]())


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        (MIXTRAL, {"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size 2 needs --sequence-parallel"),
        (MIXTRAL, {"expert_model_parallel_size": 3}, r"--expert-model-parallel-size 3 .*allowed: \[1, 2, 4\]"),
        (MIXTRAL, {"expert_tensor_parallel_size": 3}, "--expert-tensor-parallel-size 3 .*80; allowed: "),
        (DENSE, {"expert_model_parallel_size": 2}, "--expert-model-parallel-size 2: this qwen2 model has no experts"),
        (DENSE, {"expert_tensor_parallel_size": 2}, "--expert-tensor-parallel-size 2: .*no experts; leave it at 1"),
    ],
)
def test_layouts_that_do_not_divide_the_model(shape: ModelShape, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_divisible(shape, ParallelConfig(**sizes))


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (2, {"expert_model_parallel_size": 4}, "over 2 ranks: .*--expert-model-parallel-size 4 x"),
        (6, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "over 6 ranks"),
        (4, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, "gloo cannot"),
    ],
)
def test_layouts_that_do_not_divide_the_ranks(
    monkeypatch: pytest.MonkeyPatch, world_size: int, sizes: dict[str, int], message: str
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        lay_out(ParallelConfig(**sizes))


def test_the_auxiliary_loss_is_off_and_can_be_turned_on() -> None:
    def coefficient(**overrides: float) -> float:
        model = ModelConfig(hf_checkpoint="none")
        return transformer_config(MIXTRAL, model, ParallelConfig(), dict(overrides)).moe_aux_loss_coeff

    assert coefficient() == 0.0
    assert coefficient(moe_aux_loss_coeff=0.001) == 0.001
