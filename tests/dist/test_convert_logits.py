"""A converted model is the same function: Megatron's logits are those of transformers, and the export is the original.

Each family, tied and untied, under tensor, pipeline and expert parallelism, with a vocabulary that needs padding.
transformers computes the reference in float64, Megatron in float32. Not covered: bfloat16 and Transformer Engine (a
GPU's test).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hf_models import CONFIGS, CONFIGS_WITH_EXPERTS, SIZES, save_model
from safetensors.torch import load_file
from torchrun import torchrun
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).with_name("convert_logits_worker.py")
LAYOUTS = ["1x1", "2x1", "4x1", "2x2"]  # TP x PP
LAYOUTS_OF_EXPERTS = ["1x1x1", "1x1x2", "2x2x2", "2x1x1x2"]  # TP x PP x EP (x ETP)
if find_spec("megatron.core.transformer.mla_qk_norm_config"):  # megatron-core 0.19: refused, see training/model.py
    CONFIGS_WITH_EXPERTS = {
        name: config for name, config in CONFIGS_WITH_EXPERTS.items() if name != "deepseek-v3-uncompressed"
    }
NUM_LAYERS = 4
# Wide weights and long sequences: attention that depends on its positions, so that a wrong rope is seen.
INITIALIZER_RANGE = 0.15
BATCH_SIZE, LENGTH = 16, 200


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tokens = torch.randint(SIZES["vocab_size"], (BATCH_SIZE, LENGTH), generator=torch.Generator().manual_seed(5))
    root = tmp_path_factory.mktemp("models")
    for name, make_config in {**CONFIGS, **CONFIGS_WITH_EXPERTS}.items():
        config = make_config()
        config.num_hidden_layers, config.initializer_range = NUM_LAYERS, INITIALIZER_RANGE
        if hasattr(config, "layer_types"):
            config.layer_types = ["full_attention"] * NUM_LAYERS
        torch.save(tokens, save_model(root / name, config) / "tokens.pt")
    return {name: root / name for name in (*CONFIGS, *CONFIGS_WITH_EXPERTS)}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, torch.Tensor]:  # [b, s, v] float64
    logits = {}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        with torch.no_grad():
            logits[name] = model(torch.load(folder / "tokens.pt", weights_only=True)).logits
    return logits


@pytest.fixture(scope="module")
def written(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAYOUT/FAMILY/logits.pt and hf/"""
    out = tmp_path_factory.mktemp("out")
    done = torchrun(
        WORKER, "--out", out, "--layouts", *LAYOUTS, *LAYOUTS_OF_EXPERTS, "--folders", *folders.values(), num_ranks=4
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS + LAYOUTS_OF_EXPERTS)
def test_logits_and_export(
    folders: dict[str, Path], expected: dict[str, torch.Tensor], written: Path, layout: str
) -> None:
    for name in CONFIGS if layout in LAYOUTS else CONFIGS_WITH_EXPERTS:
        folder = folders[name]
        padded = torch.load(written / layout / name / "logits.pt", weights_only=True)
        logits = padded[..., : SIZES["vocab_size"]].double()
        # Logits reach 6; fp32 rounding was 2e-5 at most on every layout.
        torch.testing.assert_close(logits, expected[name], atol=1e-4, rtol=0)
        assert torch.count_nonzero(padded[..., SIZES["vocab_size"] :]) == 0
        original = load_file(folder / "model.safetensors")
        exported = load_file(written / layout / name / "hf" / "model.safetensors")
        assert exported.keys() == original.keys()
        for tensor_name, tensor in original.items():
            assert torch.equal(exported[tensor_name], tensor), tensor_name
