"""The engine on two real SGLang servers: what its numbers mean, and that a server's death costs no sample."""

import asyncio
import math
import time

import numpy as np
import pytest
import torch
from engine_site import Site, check_whole, model_facts, request
from transformers import AutoModelForCausalLM

from gft_megatron.rollout.engine import FinishReason, RequestAborted, RequestRefused
from gft_megatron.rollout.sglang.client import ModelFacts
from gft_megatron.rollout.sglang.fleet import State
from gft_megatron.rollout.sglang.http import Http, WorkerError
from gft_megatron.rollout.sglang.loads import read_load


@pytest.fixture(scope="module")
def facts(sglang_model):
    return model_facts(sglang_model)


# A cut at top_p moves the model's log-probs by -log(top_p) at least: more than what is allowed here by far.
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5}, {"temperature": 1.7, "top_p": 0.6}, {"temperature": 0}])
def test_log_probs_are_of_the_model_at_that_temperature_before_any_cut(
    sglang_workers, sglang_keys, sglang_model, facts, sampling
):
    draw = np.random.default_rng(0)
    asked = [request(draw.integers(facts.vocab_size, size=n).tolist(), **sampling) for n in (1, 2, 5, 17) * 4]

    async def main():
        async with Site(sglang_workers, sglang_keys, facts) as site:
            # Others of another temperature share the servers' batches.
            others = [request(temperature=3.0) for _ in range(8)]
            return await asyncio.gather(*map(site.engine.generate, [*asked, *others]))

    completions = asyncio.run(main())
    model = AutoModelForCausalLM.from_pretrained(sglang_model, dtype=torch.float32).double().eval()
    temperature = sampling.get("temperature", 1.0) or 1.0
    worst = 0.0
    for one, completion in zip(asked, completions, strict=False):
        check_whole(completion, one, facts)
        ids = torch.tensor([[*one.prompt_ids, *completion.token_ids.tolist()]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(one.prompt_ids) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(-1, torch.from_numpy(completion.token_ids)[:, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(completion.log_probs - expected).max()))
        if sampling == {"temperature": 0}:
            assert completion.token_ids.tolist() == logits.argmax(-1).tolist()
    assert worst < 1e-4
    if "top_p" in sampling:  # the tokens are of the likeliest 0.6: what is compared is not what they were drawn by
        assert -math.log(sampling["top_p"]) > 100 * worst


def test_the_end_token_ends_a_response_and_is_its_last(sglang_workers, sglang_keys, sglang_model, facts):
    """Any token may be the end: here the likeliest one after a prompt, so that responses do end."""
    model = AutoModelForCausalLM.from_pretrained(sglang_model, dtype=torch.float32)
    with torch.no_grad():
        end = int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    ends = ModelFacts(
        vocab_size=facts.vocab_size, max_positions=facts.max_positions, eos_token_ids={end, *facts.eos_token_ids}
    )

    async def main():
        async with Site(sglang_workers, sglang_keys, ends) as site:
            greedy = await site.engine.generate(request(temperature=0.0))
            assert greedy.token_ids.tolist() == [end] and greedy.finish_reason is FinishReason.STOP
            asked = [request(new=200, temperature=1.5) for _ in range(16)]
            completions = await asyncio.gather(*map(site.engine.generate, asked))
            for one, completion in zip(asked, completions, strict=True):
                check_whole(completion, one, ends)
            assert {completion.finish_reason for completion in completions} >= {FinishReason.STOP}
            # The end token at the very last place allowed is an end, not a cut.
            assert (await site.engine.generate(request(new=1, temperature=0.0))).finish_reason is FinishReason.STOP

    asyncio.run(main())


def test_prompts_up_to_the_last_position(sglang_workers, sglang_keys, facts):
    async def main():
        async with Site(sglang_workers, sglang_keys, facts) as site:
            longest = facts.max_positions - 7
            completion = await site.engine.generate(request((5,) * longest, new=7))
            assert len(completion.token_ids) == 5 or completion.finish_reason is FinishReason.STOP
            for prompt in ((5,) * (longest + 1), (5, facts.vocab_size), (5, -1), ()):
                with pytest.raises(RequestRefused):
                    await site.engine.generate(request(prompt, new=1))
            for url in sglang_workers:
                await site.served_again(url)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["aborted", "cancelled"])
def test_what_is_given_up_is_given_up_on_the_server(sglang_workers, sglang_keys, facts, how):
    async def main():
        async with Site(sglang_workers, sglang_keys, facts) as site:
            # Greedy: what a random model draws ends soon, what it holds most likely repeats itself for ever.
            asked = [request((5, i), new=1900, temperature=0.0) for i in range(12)]
            tasks = [asyncio.create_task(site.engine.generate(one)) for one in asked]
            async with asyncio.timeout(30):
                while await site.on_servers() < 12:
                    await asyncio.sleep(0.02)
            started = time.monotonic()
            if how == "aborted":
                await site.engine.abort([one.request_id for one in asked])
            else:
                for task in tasks:
                    task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            await site.until_idle()
            assert time.monotonic() - started < 30, "1900 tokens of 12 requests take longer"
            for end in ends:
                assert isinstance(end, RequestAborted if how == "aborted" else asyncio.CancelledError)
            if how == "aborted":
                for one, end in zip(asked, ends, strict=True):
                    assert end.request_id == one.request_id and len(end.partial.token_ids) < 1900
                    assert len(end.partial.log_probs) == len(end.partial.token_ids)

    asyncio.run(main())


def test_a_killed_server_costs_no_sample_and_serves_again_only_with_the_weights(
    sglang_workers, sglang_keys, sglang_launcher, facts
):
    """64 groups of 8, all in flight, and kill -9."""
    killed, other = sglang_workers

    async def main():
        async with Site(sglang_workers, sglang_keys, facts) as site:
            for url in sglang_workers:
                await site.served_again(url)
            asked = [request((5, 6, 7 + i), new=200) for i in range(64) for _ in range(8)]
            tasks = [asyncio.create_task(site.engine.generate(one)) for one in asked]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # by then the others are on the servers
            there = set(site.engine._calls.at(killed))
            assert 0 < len(there) < 511
            site.sync.refuse = {killed}
            sglang_launcher.kill(killed)
            async with asyncio.timeout(60):
                while site.engine._fleet.state(killed) is not State.DEAD:
                    await asyncio.sleep(0.01)
            completions = await asyncio.gather(*tasks)
            for one, completion in zip(asked, completions, strict=True):
                check_whole(completion, one, facts)
            assert len({completion.request_id for completion in completions}) == 512
            long = [tuple(c.log_probs.tolist()) for c in completions if len(c.token_ids) > 8]  # by chance never equal
            assert len(set(long)) == len(long) > 256, "a sample was handed out twice"
            figures = site.engine.figures()
            assert 0 < figures["retries"] <= len(there) and figures["failures/broken_off"] > 0
            # It comes back with the weights that it was started with.
            async with asyncio.timeout(240):
                while killed not in site.sync.asked:
                    await asyncio.sleep(0.1)
            assert site.engine._fleet.state(killed) is State.STALE
            await asyncio.gather(*(site.engine.generate(request((5, i), new=2)) for i in range(16)))
            assert not (await read_load(site.http, killed, timeout_sec=30)).mark[0], "it was sent something"
            site.sync.refuse = set()
            await site.served_again(killed)
            before = (await read_load(site.http, killed, timeout_sec=30)).mark
            await asyncio.gather(*(site.engine.generate(request((5, i), new=4)) for i in range(32)))
            assert (await read_load(site.http, killed, timeout_sec=30)).mark != before

    asyncio.run(main())


def test_without_the_admin_key_nobody_changes_a_server(sglang_workers, sglang_keys):
    async def main():
        async with Http(type(sglang_keys)(api=sglang_keys.api)) as http:
            for path, body in (
                ("/update_weight_version", {"new_version": "1"}),
                ("/abort_request", {"abort_all": True}),
            ):
                with pytest.raises(WorkerError, match="40[13]"):
                    await http.call(sglang_workers[0], path, body, timeout_sec=30, admin=True)

    asyncio.run(main())
