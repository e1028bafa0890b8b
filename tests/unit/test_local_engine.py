"""The embedded engine against transformers' own forward pass: same tokens, same log-probs, typed failures."""

import asyncio

import numpy as np
import pytest
import torch
from hf_models import CONFIGS_WITH_EXPERTS, save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config

from gft_megatron.groups import WeightSpan
from gft_megatron.rollout.engine import (
    EngineFailed,
    FinishReason,
    GenerateRequest,
    RequestAborted,
    RequestRefused,
    SamplingParams,
)
from gft_megatron.rollout.local import LocalEngine

PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.folder = tmp_path_factory.mktemp("model")
    config.save_pretrained(model.folder)
    return model


@pytest.fixture
def engine(model):
    engine = LocalEngine(model.folder, eos_token_ids=[EOS], pad_token_id=PAD, seed=3)
    asyncio.run(engine.update_weights(model.named_parameters(), version=5))
    yield engine
    asyncio.run(engine.close())


def draw(engine, prompts, sampling, prefix="r"):
    async def all_of_them():
        requests = [GenerateRequest(f"{prefix}{i:031d}", tuple(p), sampling) for i, p in enumerate(prompts)]
        return await asyncio.gather(*map(engine.generate, requests))

    return asyncio.run(all_of_them())


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [5, 6, 7]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_model(engine, model, temperature):
    completions = draw(engine, PROMPTS * 4, SamplingParams(max_new_tokens=9, temperature=temperature))
    for prompt, completion in zip(PROMPTS * 4, completions, strict=True):
        ids = torch.tensor([prompt + completion.token_ids.tolist()])
        with torch.no_grad():
            logits = model.double()(ids).logits[0, len(prompt) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(-1, torch.from_numpy(completion.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(completion.log_probs, expected.numpy(), atol=2e-5)
        assert completion.weight_spans == (WeightSpan(5, 0, len(completion.token_ids)),)
        if completion.finish_reason is FinishReason.STOP:
            assert completion.token_ids[-1] == EOS and EOS not in completion.token_ids[:-1]
        else:
            assert len(completion.token_ids) == 9 and EOS not in completion.token_ids
    assert {c.finish_reason for c in completions} == {FinishReason.STOP, FinishReason.LENGTH}


def test_greedy_tokens_are_the_argmax(engine, model):
    (completion,) = draw(engine, [[5, 6, 7]], SamplingParams(max_new_tokens=6, temperature=0.0))
    ids = [5, 6, 7]
    for token in completion.token_ids:
        with torch.no_grad():
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(int(token))


def test_samples_follow_the_distribution(engine, model):
    """2,000 first tokens: total variation distance to the exact distribution near what that many draws allow."""
    completions = draw(engine, [[5, 6, 7]] * 2000, SamplingParams(max_new_tokens=1))
    with torch.no_grad():
        exact = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1).numpy()
    drawn = np.bincount([c.token_ids[0] for c in completions], minlength=40) / 2000
    assert np.abs(drawn - exact).sum() / 2 < 0.06


def test_same_requests_same_weights_same_samples(engine):
    sampling = SamplingParams(max_new_tokens=9)
    torch.manual_seed(1)
    first = draw(engine, PROMPTS, sampling)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = draw(engine, PROMPTS, sampling)
    assert [c.token_ids.tolist() for c in first] == [c.token_ids.tolist() for c in second]
    assert [c.log_probs.tolist() for c in first] == [c.log_probs.tolist() for c in second]
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "sampling moved the global random state"
    other = draw(engine, PROMPTS, sampling, prefix="s")
    assert [c.token_ids.tolist() for c in first] != [c.token_ids.tolist() for c in other]


def test_requests_are_split_into_batches(model):
    engine = LocalEngine(model.folder, eos_token_ids=[EOS], pad_token_id=PAD, max_batch_size=3)
    asyncio.run(engine.update_weights(model.named_parameters(), version=0))
    assert len(draw(engine, PROMPTS * 5, SamplingParams(max_new_tokens=4))) == 20


def test_before_any_weights_every_request_fails(model):
    engine = LocalEngine(model.folder, eos_token_ids=[EOS], pad_token_id=PAD)
    with pytest.raises(EngineFailed, match="no weights yet"):
        draw(engine, [[5]], SamplingParams(max_new_tokens=1))


def test_incomplete_weights_are_refused(model):
    engine = LocalEngine(model.folder, eos_token_ids=[EOS], pad_token_id=PAD)
    with pytest.raises(EngineFailed, match="lacks.*model.norm.weight"):
        asyncio.run(
            engine.update_weights(((n, p) for n, p in model.named_parameters() if n != "model.norm.weight"), version=0)
        )
    assert engine.weight_version == -1


@pytest.mark.parametrize("name", CONFIGS_WITH_EXPERTS)
def test_experts_take_the_tensors_of_the_file(name, tmp_path):
    folder = save_model(tmp_path, CONFIGS_WITH_EXPERTS[name]())
    tensors = load_file(folder / "model.safetensors")
    engine = LocalEngine(folder, eos_token_ids=[EOS], pad_token_id=PAD)
    asyncio.run(engine.update_weights(tensors.items(), version=1))
    expected = AutoModelForCausalLM.from_pretrained(folder)
    taken = engine._model.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(taken[key], value), key
    lacking = [(key, value) for key, value in tensors.items() if "layers.1." not in key or "experts.3." not in key]
    with pytest.raises(EngineFailed, match=r"lacks \['model\.layers\.1\..*experts\.3\."):
        asyncio.run(engine.update_weights(lacking, version=2))


@pytest.mark.parametrize("prompt", [[40], [-1], [], [5] * 60])
def test_wrong_requests_are_refused_before_they_reach_the_model(engine, prompt):
    with pytest.raises(RequestRefused):
        draw(engine, [prompt], SamplingParams(max_new_tokens=8))


def test_aborted_requests_raise_and_the_others_finish(engine):
    async def run():
        sampling = SamplingParams(max_new_tokens=40)
        requests = [GenerateRequest(f"a{i:031d}", (5, 6, 7), sampling) for i in range(6)]
        tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
        await asyncio.sleep(0.02)
        await engine.abort([requests[2].request_id, requests[4].request_id])
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(run())
    assert [isinstance(result, RequestAborted) for result in results] == [False, False, True, False, True, False]
    assert not any(isinstance(result, EngineFailed) for result in results)


def test_requests_of_different_length_are_drawn_together(engine, monkeypatch):
    batches = []
    draw_batch = engine._draw
    monkeypatch.setattr(engine, "_draw", lambda batch: batches.append(batch) or draw_batch(batch))

    async def run(limits):
        requests = [
            GenerateRequest(f"d{i:031d}", (5, 6, 7), SamplingParams(max_new_tokens=n)) for i, n in enumerate(limits)
        ]
        return await asyncio.gather(*map(engine.generate, requests))

    limits = [1, 4, 9, 2] * 4
    whole, cut = asyncio.run(run([9] * 16)), asyncio.run(run(limits))
    assert list(map(len, batches)) == [16, 16]
    for limit, one, other in zip(limits, whole, cut, strict=True):
        # The random numbers are those of the batch, so a shorter request is the beginning of a longer one.
        assert other.token_ids.tolist() == one.token_ids[:limit].tolist()
        np.testing.assert_allclose(other.log_probs, one.log_probs[:limit], atol=1e-5)
        ended = EOS in one.token_ids[:limit]
        assert other.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert other.weight_spans == (WeightSpan(5, 0, len(other.token_ids)),)
