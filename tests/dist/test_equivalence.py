"""The same batch of packed, ragged groups gives the same loss, gradients and further losses under every layout.

One rank is compared with a float64 computation by transformers, every layout with one rank. Real Megatron-Core
schedules, DDP and optimizers on gloo. Not covered: bf16 (its rounding hides what is looked for here).
"""

import math
from pathlib import Path

import pytest
import torch
from hf_models import DEEPSEEK_V3, QWEN3_MOE, SIZES, YARN, save_model
from ragged_batch import ragged_groups
from torchrun import torchrun
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig
from transformers.core_model_loading import revert_weight_conversion

WORKER = Path(__file__).with_name("equivalence_worker.py")
LAYOUTS = {
    "qwen2": [
        "one", "one+fused",
        "tp2", "tp2sp", "pp2", "pp2vpp2", "dp2", "dp2distopt", "dp2overlap", "cp2",
        "tp2+fused", "tp2sp+fused", "dp2overlap+fused",
        "tp2pp2sp", "tp2pp2sp+fused", "tp2cp2+fused",
        # The path of the losses that need the whole batch, linear_log_probs: sequence-parallel, and with an embedding
        # that shares its weight under overlapped reduction.
        "tp2sp+fused+not-token-local", "dp2overlap+fused+not-token-local",
    ],
    "qwen3": ["one", "tp2", "cp2", "tp2sp+fused", "pp2overlap+fused", "dp2overlap+fused"],
    # With tp2sp each rank holds every expert whole and sends it its own half of the tokens.
    "mixtral": ["one", "tp2sp", "etp2tp2sp", "ep2", "ep2distopt+resumed"],
    "qwen3-moe": ["one", "ep2overlap", "ep2cp2+fused", "ep2pp2+resumed"],
    "deepseek-v3": ["one", "ep2tp2sp", "ep2cp2"],
}  # fmt: skip
CASES = [(family, name) for family, names in LAYOUTS.items() for name in names if name != "one"]
BROKEN = ["dp2+per-micro-batch", "cp2+no-gradient-sum", "tp2+fused+no-hidden-sum"]
WITHOUT_GATHER = "tp2+no-all-gather"
# Wide initial weights: probabilities on both sides of tau, and gradients worth comparing.
MODEL = {**SIZES, "num_hidden_layers": 4, "initializer_range": 0.15}
FAMILIES = {
    # tied embeddings across pipeline stages, biases
    "qwen2": lambda: Qwen2Config(tie_word_embeddings=True, **MODEL),
    # norms inside the heads, which every tensor-parallel rank holds whole
    "qwen3": lambda: Qwen3Config(head_dim=16, tie_word_embeddings=False, **MODEL),
    "mixtral": lambda: MixtralConfig(num_local_experts=4, tie_word_embeddings=False, **MODEL),
    # experts in every second layer, weights of a token's experts that do not sum to 1
    # latent attention and a sigmoid router with a bias; dense first layer
    "deepseek-v3": lambda: DeepseekV3Config(
        q_lora_rank=16, rope_parameters=YARN, **{**DEEPSEEK_V3, **MODEL, "num_key_value_heads": 8}
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(decoder_sparse_step=2, tie_word_embeddings=True, **QWEN3_MOE, **MODEL),
}
TAU = 0.05  # as in the worker


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder for each family."""
    root = tmp_path_factory.mktemp("models")
    for name, config in FAMILIES.items():
        save_model(root / name, config())
    return root


@pytest.fixture(scope="module")
def results(models, tmp_path_factory) -> dict[str, dict[str, dict]]:
    """Everything that the workers computed: results[family][layout]."""
    out = tmp_path_factory.mktemp("out")
    layouts = {**LAYOUTS, "qwen2": [*LAYOUTS["qwen2"], "tp2+sft", *BROKEN, WITHOUT_GATHER]}
    jobs = [f"{family}+{name}" for family, names in layouts.items() for name in names]
    done = torchrun(WORKER, "--models", models, "--out", out, "--jobs", *jobs, num_ranks=4)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        family: {name: torch.load(out / f"{family}+{name}.pt", weights_only=True) for name in names}
        for family, names in layouts.items()
    }


def gradient_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest norm of a tensor's difference, relative to the tensor's own norm."""
    assert got.keys() == expected.keys()
    return max(
        float((got[name].double() - value.double()).norm() / value.double().norm()) for name, value in expected.items()
    )


def later(result: dict, name: str) -> torch.Tensor:
    return torch.tensor([metrics[name] for metrics in result["later"]], dtype=torch.float64)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_layout_equals_one_rank(results, family, layout):
    one, other = results[family]["one"], results[family][layout]
    assert other["num_tokens"] == one["num_tokens"]
    for name in ("loss", "nll", "entropy_mean", "coefficient_mean", "rectified_frac"):
        assert other["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-6), name
    assert gradient_error(other["gradients"], one["gradients"]) < 1e-5
    # Adam magnifies rounding: it divides small gradients by their own size.
    torch.testing.assert_close(later(other, "loss"), later(one, "loss"), rtol=1e-4, atol=0)
    # Clipping divides by this norm: a layout that counts one rank's shards only trains on, with another step size.
    torch.testing.assert_close(later(other, "grad_norm"), later(one, "grad_norm"), rtol=1e-4, atol=0)


def test_overlapped_gather_exports_the_new_weights(results):
    """The optimizer leaves part of them to be gathered in the next forward pass; an export must not come before."""
    overlapped, plain = (results["qwen2"][name]["weights"] for name in ("dp2overlap", "dp2distopt"))
    assert overlapped.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(overlapped[name], plain[name])] == []


def in_float64(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")


@pytest.fixture(scope="module")
def double_model(models):
    return in_float64(models / "qwen2")


def float64_token_losses(model, token_loss):
    """token_loss(log p of the response tokens [r], advantage) of every response, by transformers in float64."""
    batch = ragged_groups()
    ends = batch.lengths.cumsum(0).tolist()
    losses = []
    for i, end in enumerate(ends):
        ids = batch.tokens[end - int(batch.lengths[i]) : end]
        prompt = int(batch.prompt_lengths[i])
        log_probs = model(ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        losses.append(token_loss(log_probs.gather(-1, ids[prompt:, None])[:, 0], float(batch.advantages[i])))
    return torch.cat(losses)


@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("qwen2", ["one", "tp2", "tp2pp2sp"]),
        ("mixtral", ["one", "ep2"]),
        ("qwen3-moe", ["one", "ep2overlap"]),
        ("deepseek-v3", ["one"]),
    ],
)
def test_gft_equals_float64(results, models, family, layouts):
    def gft(log_probs, advantage):
        coefficients = [math.exp(x) if math.exp(x) < TAU else 1.0 for x in log_probs.detach().tolist()]
        return -advantage * torch.tensor(coefficients, dtype=torch.float64) * log_probs

    model = in_float64(models / family)
    losses = float64_token_losses(model, gft)
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = revert_weight_conversion(model, gradients)  # under the names of the files
    for layout in layouts:
        result = results[family][layout]
        assert result["metrics"]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        assert 0.2 < result["metrics"]["rectified_frac"] < 0.999, "both branches of the coefficient have to be taken"
        assert gradient_error(result["gradients"], expected) < 1e-4


def test_sft_equals_transformers_own_loss(results, double_model):
    result = results["qwen2"]["tp2+sft"]
    batch = ragged_groups()
    ends = batch.lengths.cumsum(0).tolist()
    total = 0.0
    for i, end in enumerate(ends):
        ids = batch.tokens[end - int(batch.lengths[i]) : end].clone()
        labels = ids.clone()
        labels[: batch.prompt_lengths[i]] = -100
        with torch.no_grad():
            mean = double_model(ids[None], labels=labels[None]).loss
        total += float(mean) * int(batch.lengths[i] - batch.prompt_lengths[i])
    assert result["num_tokens"] == batch.num_response_tokens
    assert result["metrics"]["loss"] == pytest.approx(total / batch.num_response_tokens, rel=1e-6)


@pytest.mark.parametrize("job", BROKEN)
def test_a_broken_build_gives_other_gradients(results, job):
    """The tests of the tests: what they protect is taken away, and the figures no longer agree."""
    assert gradient_error(results["qwen2"][job]["gradients"], results["qwen2"]["one"]["gradients"]) > 1e-3


def test_without_the_all_gather_nothing_trains(results):
    """A label that no gathered shard owns has no log-prob: NaN, which stops the step, not a plausible number."""
    assert "not finite" in results["qwen2"][WITHOUT_GATHER]["error"]
