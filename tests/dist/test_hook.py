"""hook_loss in a foreign Megatron script: the same batch gives the loss and gradients of this project's own loop.

Own loop: packed, on one rank. Foreign: padded rows, a loss_func of its own, under every layout. Real Megatron-Core
schedules and DDP on gloo.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from hf_models import SIZES, save_model
from torchrun import torchrun
from transformers import Qwen2Config

import gft_megatron
from gft_megatron import LOSSES
from gft_megatron.config import loss_hyper_parameters
from gft_megatron.losses import required_inputs
from gft_megatron.losses.inputs import over_batch

WORKER = Path(__file__).with_name("hook_worker.py")
LAYOUTS = ["one", "tp2", "tp2sp", "pp2", "pp2vpp2", "cp2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Wide initial weights: probabilities far from uniform, so that DFT's coefficients differ.
    config = Qwen2Config(tie_word_embeddings=True, **{**SIZES, "num_hidden_layers": 4, "initializer_range": 0.15})
    return save_model(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    done = torchrun(WORKER, "--model", model, "--out", out, "--layouts", *LAYOUTS, num_ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: torch.load(out / f"{name}.pt", weights_only=True) for name in LAYOUTS}


def gradient_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest norm of a tensor's difference, relative to the tensor's own norm."""
    assert got.keys() == expected.keys()
    return max(float((got[name] - value).norm() / value.norm()) for name, value in expected.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dft_through_the_hook_equals_our_own_loop(results, layout):
    own, hooked = results["one"]["own"], results[layout]["hooked"]
    assert hooked["num_tokens"] == own["num_tokens"]
    assert hooked["loss"] == pytest.approx(own["loss"], rel=1e-6)
    assert gradient_error(hooked["gradients"], own["gradients"]) < 1e-5


def test_without_the_process_group_it_is_another_loss(results):
    """The test of the test."""
    assert gradient_error(results["tp2"]["broken"]["gradients"], results["one"]["own"]["gradients"]) > 1e-2


@pytest.mark.parametrize(("layout", "case"), [("one", "losses"), ("tp2", "losses"), ("one", "bf16")])
def test_sft_and_a_removed_hook_are_megatrons_own_cross_entropy(results, layout, case):
    losses = results[layout][case]
    known = losses["labels"] >= 0
    assert known.any() and not known.all()
    for name in ("sft", "eaft"):  # eaft with weights of 1: it reads the entropy
        torch.testing.assert_close(losses[name][known], losses["before"][known], rtol=1e-5, atol=1e-5)
        assert not losses[name][~known].any()
    nll = losses["before"][known]
    torch.testing.assert_close(losses["dft"][known], nll * (-nll).exp(), rtol=1e-5, atol=1e-5)
    assert torch.equal(losses["after"], losses["before"])
    assert (losses["dft"] - losses["before"]).abs().max() > 0.1, "or nothing was hooked"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_handle_tells_metrics_and_removes(results, layout):
    metrics = results[layout]["hooked"]["metrics"]
    assert {"nll", "coefficient_mean"} <= set(metrics)
    assert all(not requires_grad for _, requires_grad in metrics.values())
    assert 0 < metrics["coefficient_mean"][0] < 1 < metrics["nll"][0]
    assert results[layout]["removed"]


def test_what_a_model_cannot_take_is_refused_in_one_line(results):
    refused = {**results["one"]["refused"], "gathered": results["tp2"]["gathered"]}
    expected = {
        "twice": "call remove() of the other hook first",
        "no language model": "got Linear",
        "vocab_size": "vocab_size is 132; the model has 131 columns",
        "mtp": "mtp_num_layers is 1",
        "gathered": "66 columns, got 132",
    }
    assert refused.keys() == expected.keys()
    for case, words in expected.items():
        assert words in refused[case] and "\n" not in refused[case], refused[case]


@pytest.mark.parametrize(
    ("name", "hyper", "words"),
    [
        ("dfd", {}, "'dfd' is no loss; the losses are gft, dft, sft"),
        ("dft", {"tau": 0.5}, "'dft' has no hyper-parameter 'tau'; it has none"),
        ("eaft", {"tau": 0.5}, "it has entropy_power, entropy_scale"),
        ("eaft", {"entropy_power": -1.0}, "entropy_power is -1.0; it has to be"),
        ("eaft", {"entropy_power": "high"}, "cannot take the hyper-parameters"),
        ("dft", {"temperature": 0.0}, "temperature must be positive"),
        *(
            (name, {}, min(needed))
            for name, loss in LOSSES.items() if (needed := required_inputs(loss) - {"entropy"})
        ),
    ],
)  # fmt: skip
def test_what_is_no_loss_of_single_tokens_is_refused_in_one_line(name, hyper, words):
    with pytest.raises(ValueError) as caught:
        gft_megatron.hook_loss(torch.nn.Identity(), name, **hyper)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("decorate", "words"),
    [(lambda loss: loss, "needs whole sequences"), (over_batch(lambda inputs: {}), "needs sums over the global batch")],
)
def test_a_loss_of_more_than_its_token_is_refused(monkeypatch, decorate, words):
    def mine(inputs):
        raise AssertionError("is not called")

    monkeypatch.setitem(LOSSES, "mine", decorate(mine))
    with pytest.raises(ValueError, match=words):
        gft_megatron.hook_loss(torch.nn.Identity(), "mine")


def test_no_hyper_parameter_has_a_name_of_the_hooks_own():
    own = set(inspect.signature(gft_megatron.hook_loss).parameters)
    assert not own & {key for parameters in loss_hyper_parameters().values() for key in parameters}


def test_the_example_of_a_plain_loop_learns():
    done = torchrun("examples/hook_megatron_core.py", num_ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
    nll = [float(x) for x in re.findall(r"'nll': ([0-9.]+)", done.stdout)]
    assert len(nll) == 2 * 10 and max(nll[-2:]) < 0.6 * min(nll[:2])
