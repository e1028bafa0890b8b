"""Every loss gives one rank's loss and gradients under every way of dividing its batch.

What compares a response with the global batch (CADFT's z-score, SFT-GO's worst group, the means of CHORD and UFT), what
weighs whole responses that context-parallel ranks share (GSPO, iw-SFT, PoFT), the reference model's log-probs and its
whole distribution (ASFT): all have to be put together from parts here.
"""

import math
from pathlib import Path

import pytest
import torch
from hf_models import SIZES, save_model
from ragged_batch import ragged_groups
from torchrun import torchrun
from transformers import AutoModelForCausalLM, Qwen2Config

from gft_megatron.losses import LOSSES

WORKER = Path(__file__).with_name("losses_worker.py")
LAYOUTS = ["one", "one+long", "tp2sp", "pp2", "cp2", "dp2", "dp2+long"]
BROKEN = ["dp2+batch of this rank", "dp2+batch of this micro-batch", "cp2+sequences in parts"]
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


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory) -> dict[str, dict]:
    """results[layout][case]"""
    policy, reference = folders
    out = tmp_path_factory.mktemp("out")
    jobs = [*LAYOUTS, *BROKEN]
    done = torchrun(
        WORKER, "--model", policy, "--reference", reference, "--out", out, "--jobs", *jobs, num_ranks=2
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {job: torch.load(out / f"{job}.pt", weights_only=True) for job in jobs}


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


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_layout_equals_one_rank(results, layout):
    one, other = results["one"], results[layout]
    assert LOSSES.keys() <= one.keys() == other.keys()
    wrong = {case: what for case in one if (what := differs(other[case], one[case]))}
    assert not wrong, wrong


def test_the_batch_was_divided(results):
    counts = {layout: {case["num_micro_batches"] for case in results[layout].values()} for layout in LAYOUTS}
    assert counts["one"] == {4} and counts["one+long"] == {2} and counts["dp2"] == {2} and counts["dp2+long"] == {1}


@pytest.mark.parametrize("job", BROKEN)
def test_a_wrong_reduction_shows(results, job):
    broken = results[job]  # of the cases that have to show it
    assert broken and [case for case in broken if differs(broken[case], results["one"][case]) is None] == []


def test_groups_by_excess_loss_equal_float64(folders, results):
    """The ceil(0.3 r) tokens of a response whose loss exceeds the reference's most, and the mean loss of the rest."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders]
    batch = ragged_groups()
    important, others = [], []
    for ids, prompt in zip(batch.tokens.split(batch.lengths.tolist()), batch.prompt_lengths.tolist(), strict=True):
        with torch.no_grad():
            nll, ref_nll = (
                -model(ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1).gather(-1, ids[prompt:, None])[:, 0]
                for model in models
            )
        order = (nll - ref_nll).argsort(descending=True)
        count = math.ceil(0.3 * len(nll))
        important.append(nll[order[:count]])
        others.append(nll[order[count:]])
    metrics = results["one"]["sft_go, groups by excess loss"]["metrics"]
    assert metrics["group_1_nll"] == pytest.approx(float(torch.cat(important).mean()), rel=1e-5)
    assert metrics["group_0_nll"] == pytest.approx(float(torch.cat(others).mean()), rel=1e-5)
