"""Weights of a mixture of experts, each rank with half of them, reach a real server that computes with all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ports import free_ports
from programs import load_program
from push_from_ranks import Push, log_probs_at, push_from_ranks
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM

from gft_megatron.rollout.sglang.http import Keys
from gft_megatron.rollout.sglang.launcher import Launcher, LaunchOptions

TOKENS = [7, 31, 97, 5, 50, 77, 12, 9, 90, 41, 8, 8]


def mixtral(folder: Path, seed: int) -> Path:
    tiny = load_program("tools/make_tiny_model.py")
    tiny.write_tiny_model(
        tiny.TinyModel(
            output=folder, family="mixtral", hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
            num_kv_heads=2, seed=seed, init_std=0.3,
            tie_embeddings=False,  # SGLang does not tie a Mixtral
        )
    )  # fmt: skip
    return folder


@pytest.mark.on_request  # a server of its own; test_weight_sync.py has the rest of the way with a dense model
def test_halves_of_the_experts_make_a_server_whole(sglang_python: Path, sglang_keys: Keys, tmp_path: Path) -> None:
    before, after = mixtral(tmp_path / "before", 1), mixtral(tmp_path / "after", 2)
    model = AutoModelForCausalLM.from_pretrained(after, dtype=torch.float32)
    with torch.no_grad():
        expected = log_probs_at(model(torch.tensor([TOKENS])).logits[0, :-1], TOKENS)
    options = LaunchOptions(
        python=sglang_python, model=before, num_workers=1, device="cpu", port=free_ports(1), ready_timeout_sec=600
    )
    (tmp_path / "logs").mkdir()
    with Launcher(options, sglang_keys, tmp_path / "logs") as launcher:
        launcher.start()
        pushes = [
            Push(1, 1, "distributed", after, version=1, ep_size=2),
            Push(1, 1, "disk", before, version=2, ep_size=2),
            Push(1, 1, "disk", after, version=3, ep_size=2),
        ]
        run_on_ranks(push_from_ranks, 2, pushes, tuple(launcher.urls), sglang_keys, TOKENS, tmp_path)
    for version in (1, 3):
        megatron, server = torch.load(tmp_path / f"{version}.pt", weights_only=True)
        torch.testing.assert_close(megatron, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(server, expected, atol=1e-4, rtol=0)
    _, server = torch.load(tmp_path / "2.pt", weights_only=True)
    assert (server - expected).abs().max() > 0.1
