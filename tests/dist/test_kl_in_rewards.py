"""--kl-in reward: advantages of rewards less the divergence from the reference, however the batch is divided.

The divergence of each response is computed anew in float64, by transformers, one response after another.
"""

import functools

import numpy as np
import pytest
import torch
from hf_models import SIZES, save_model
from ragged_batch import ragged_groups
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM, Qwen2Config

TEMPERATURE = 0.8
COEFFICIENT = 0.5
LAYOUTS = {
    "tp2": ("--tensor-model-parallel-size", "2"),
    "pp2": ("--pipeline-model-parallel-size", "2"),
    "cp2": ("--context-parallel-size", "2"),
    "dp2": (),
}
FLAGS = (
    "--prompt-data", "a.jsonl", "--train-iters", "1", "--seq-length", "64", "--rollout-max-response-len", "32",
    "--make-vocab-size-divisible-by", "1", "--loss", "grpo", "--kl-coef", "0.5", "--kl-in", "reward",
    "--kl-estimator", "k3", "--max-tokens-per-gpu", "120",
)  # fmt: skip
MODEL = {**SIZES, "num_hidden_layers": 2, "hidden_size": 32, "initializer_range": 0.2}


def shape_on_rank(rank, world_size, policy, reference_path, out):
    from gft_megatron.training import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    from gft_megatron.command_line import parse_args
    from gft_megatron.convert.hf_folder import HfFolder
    from gft_megatron.rollout.recipe import GroupRecipe
    from gft_megatron.training import model as models
    from gft_megatron.training.parallel import lay_out, seed_ranks
    from gft_megatron.training.prepare import with_kl_in_rewards
    from gft_megatron.training.reference import Reference
    from gft_megatron.training.step import Objective
    from gft_megatron.training.weights import load_weights

    init_num_microbatches_calculator(rank, None, 1, 1, 1)
    folder = HfFolder(policy)
    advantages = {}
    for name, layout in LAYOUTS.items():
        config = parse_args(["--hf-checkpoint", str(policy), *FLAGS, *layout])
        lay_out(config.parallel)
        seed_ranks(1)
        megatron_config = models.transformer_config(folder.shape, config.model, config.parallel, {})
        vocab_size = models.padded_vocab_size(folder.shape, config.model, config.parallel)
        chunks = models.build_chunks(
            folder.shape, megatron_config, vocab_size=vocab_size, max_sequence_length=64, device=torch.device("cpu")
        )
        load_weights(chunks, folder, padded_vocab_size=vocab_size)
        load = functools.partial(load_weights, chunks, HfFolder(reference_path), padded_vocab_size=vocab_size)
        reference = Reference(chunks, load)
        wrapped = models.wrap_in_ddp(chunks, megatron_config, config.parallel, {})
        recipe = GroupRecipe(
            n_expert=1, n_teacher=1, n_self=2, sampling=config.sampling, needs_advantages=True, overlong_buffer_len=20
        )
        objective = Objective(loss=config.loss_function, temperature=TEMPERATURE, vocab_size=folder.shape.vocab_size)
        batch = ragged_groups()
        shaped = with_kl_in_rewards(
            batch, config, recipe, wrapped, objective, reference, coefficient=config.value_at("kl_coef", 0)
        )
        assert torch.equal(shaped.rewards, batch.rewards), "rewards are told as they are"
        advantages[name] = shaped.advantages
        parallel_state.destroy_model_parallel()
    torch.save(advantages, out / f"{rank}.pt")


@torch.no_grad()
def token_log_probs(model, tokens, num_prompt):  # [prompt + response] -> [response]
    log_probs = (model(tokens[None]).logits[0] / TEMPERATURE).log_softmax(-1)
    return log_probs[num_prompt - 1 : -1].gather(-1, tokens[num_prompt:, None])[:, 0]


def expected_advantages(policy, reference):
    batch = ragged_groups()
    rewards, start = [], 0
    for i in range(batch.num_samples):
        num_prompt, length = int(batch.prompt_lengths[i]), int(batch.lengths[i])
        tokens = batch.tokens[start : start + length]
        start += length
        reward = float(batch.rewards[i])
        if batch.sources[i] == 2:
            difference = token_log_probs(policy, tokens, num_prompt) - token_log_probs(reference, tokens, num_prompt)
            reward -= COEFFICIENT * float((torch.exp(-difference) - 1 + difference).sum())
            reward -= min(max((length - num_prompt - (32 - 20)) / 20, 0.0), 1.0)
        rewards.append(reward)
    groups = np.array(rewards).reshape(6, 4)
    return ((groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-6)).ravel()


def test_advantages_of_penalised_rewards(tmp_path):
    policy = save_model(tmp_path / "policy", Qwen2Config(tie_word_embeddings=False, **MODEL))
    models = [AutoModelForCausalLM.from_pretrained(policy) for _ in range(2)]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    models[1].save_pretrained(tmp_path / "reference")
    run_on_ranks(shape_on_rank, 2, policy, tmp_path / "reference", tmp_path)
    expected = expected_advantages(*(model.double().eval() for model in models))
    unpenalised = ragged_groups().rewards.double().numpy().reshape(6, 4)
    assert np.abs(expected.reshape(6, 4) - (unpenalised - unpenalised.mean(1, keepdims=True))).max() > 0.5
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in LAYOUTS:
        assert results[0][name].numpy() == pytest.approx(expected, rel=2e-4, abs=2e-5), name
        assert torch.equal(results[0][name], results[1][name]), name
