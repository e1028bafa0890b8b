"""Every loss gives one rank's loss and gradients under every way of dividing its batch.

What compares a response with the global batch (CADFT's z-score, SFT-GO's worst group, the means of CHORD and UFT), what
weighs whole responses that context-parallel ranks share (GSPO, iw-SFT, PoFT), the reference model's log-probs and its
whole distribution (ASFT): all have to be put together from parts here.
"""

from pathlib import Path

import pytest
import torch
from hf_models import SIZES, save_model
from torchrun import torchrun
from transformers import AutoModelForCausalLM, Qwen2Config

from gft_megatron.losses import LOSSES

WORKER = Path(__file__).with_name("losses_worker.py")
LAYOUTS = {1: ["one", "one+long"], 2: ["tp2", "tp2sp", "pp2", "cp2", "dp2", "dp2+long"]}
# Wide initial weights: probabilities on both sides of every threshold.
MODEL = {**SIZES, "num_hidden_layers": 2, "hidden_size": 32, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    policy = save_model(tmp_path_factory.mktemp("policy"), Qwen2Config(tie_word_embeddings=False, **MODEL))
    reference = tmp_path_factory.mktemp("reference")
    model = AutoModelForCausalLM.from_pretrained(policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(reference)
    return [policy, reference]


def work(folders: list[Path], out: Path, num_ranks: int, layouts: list[str], *options: str) -> dict[str, dict]:
    policy, reference = folders
    done = torchrun(
        WORKER, "--model", policy, "--reference", reference, "--out", out, "--layouts", *layouts, *options,
        num_ranks=num_ranks,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: torch.load(out / f"{name}.pt", weights_only=True) for name in layouts}


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory) -> dict[str, dict]:
    """results[layout][case]"""
    out = tmp_path_factory.mktemp("out")
    return {
        name: result
        for num_ranks, layouts in LAYOUTS.items()
        for name, result in work(folders, out, num_ranks, layouts).items()
    }


def gradient_error(got: dict, expected: dict) -> float:
    """Largest norm of a tensor's difference, relative to the tensor's own norm."""
    one, other = expected["gradients"], got["gradients"]
    return max(float((other[name].double() - one[name].double()).norm() / one[name].double().norm()) for name in one)


def differs(got: dict, expected: dict) -> str | None:
    if got["metrics"].keys() != expected["metrics"].keys():
        return f"metrics {sorted(got['metrics'].keys() ^ expected['metrics'].keys())}"
    for name, value in expected["metrics"].items():
        if got["metrics"][name] != pytest.approx(value, rel=1e-6, abs=1e-7):
            return f"{name} {got['metrics'][name]}, not {value}"
    if not torch.allclose(got["sample_nll"], expected["sample_nll"], rtol=1e-5):
        return "sample_nll"
    error = gradient_error(got, expected)
    return None if error < 1e-5 else f"a gradient is off by {error:.1e} of its norm"


@pytest.mark.parametrize("layout", [name for names in LAYOUTS.values() for name in names if name != "one"])
def test_layout_equals_one_rank(results, layout):
    one, other = results["one"], results[layout]
    assert LOSSES.keys() <= one.keys() == other.keys()
    wrong = {case: what for case in one if (what := differs(other[case], one[case]))}
    assert not wrong, wrong


def test_the_batch_was_divided(results):
    counts = {layout: {case["num_micro_batches"] for case in result.values()} for layout, result in results.items()}
    assert counts["one"] == {4} and counts["one+long"] == {2} and counts["dp2"] == {2} and counts["dp2+long"] == {1}


@pytest.mark.parametrize(
    ("mutation", "layout", "cases"),
    [
        ("batch of this rank", "dp2", ["cadft", "sft_go", "uft", "chord_mu, separate means"]),
        ("batch of this micro-batch", "dp2", ["cadft", "sft_go"]),
        ("sequences in parts", "cp2", ["cadft", "gspo", "iw_sft", "poft", "sft_go each sample"]),
    ],
)
def test_a_wrong_reduction_shows(folders, results, tmp_path, mutation, layout, cases):
    broken = work(folders, tmp_path, 2, [layout], "--mutate", mutation, "--cases", *cases)[layout]
    assert [case for case in cases if differs(broken[case], results["one"][case]) is None] == []
