"""A rank's shard out of a Megatron checkpoint is its shard out of the Hugging Face folder, whatever the checkpoint was
cut up and padded for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, CONFIGS_WITH_EXPERTS, save_model

from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.hf_to_megatron import plan_hf_to_megatron
from gft_megatron.convert.mapping import megatron_parameters
from gft_megatron.convert.megatron_weights import MegatronWeights

ALL = CONFIGS | CONFIGS_WITH_EXPERTS
PADDED = 192  # of 131 rows; the checkpoint has 256


@pytest.mark.parametrize("name", ALL)
def test_every_shard_of_every_parameter(tmp_path: Path, name: str) -> None:
    folder = HfFolder(save_model(tmp_path / "hf", ALL[name]()))
    plan_hf_to_megatron(
        folder.path, tmp_path / "megatron", tp_size=2, make_vocab_size_divisible_by=128, dtype=None, workers=1
    ).run(lambda count: None)  # fmt: skip
    weights = MegatronWeights(tmp_path / "megatron", folder.shape)
    for parameter in [*megatron_parameters(folder.shape), "output_layer.weight"]:
        for tp_size in (1, 2, 4):
            for tp_rank in range(tp_size):
                share = {"tp_rank": tp_rank, "tp_size": tp_size, "padded_vocab_size": PADDED}
                found, expected = weights.load_shard(parameter, **share), folder.load_shard(parameter, **share)
                assert found.dtype is expected.dtype and torch.equal(found, expected), (parameter, share)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    config = CONFIGS["qwen2"]()
    folder = HfFolder(save_model(tmp_path / "hf", config))
    plan_hf_to_megatron(
        folder.path, tmp_path / "megatron", tp_size=1, make_vocab_size_divisible_by=1, dtype=None, workers=1
    ).run(lambda count: None)  # fmt: skip
    config.intermediate_size += 16
    other = HfFolder(save_model(tmp_path / "other", config))
    with pytest.raises(ValueError, match=r"linear_fc1.weight' has shape \[3, 160, 64\], config.json makes it \[3, 192"):
        MegatronWeights(tmp_path / "megatron", other.shape)
