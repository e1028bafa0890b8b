"""Groups from an engine and a reward that fail on command: what must never become a sample, and what is counted.

The engine here is scripted, because a real one does not fail when it is told to; test_local_engine.py has the real one.
"""

import asyncio
import math
from collections import Counter

import numpy as np
import pytest
import torch

from gft_megatron.groups import GroupKey, Prompt, RecordedResponse, Source, WeightSpan
from gft_megatron.rewards import Reward, RewardError
from gft_megatron.rollout.bank import Bank
from gft_megatron.rollout.collect import Collector, Enough
from gft_megatron.rollout.counts import CollectCounts
from gft_megatron.rollout.draws import Draw
from gft_megatron.rollout.engine import (
    Completion,
    EngineFailed,
    FinishReason,
    Partial,
    RequestAborted,
    RequestRefused,
    RolloutEngine,
    SamplingParams,
)
from gft_megatron.rollout.hints import Hints
from gft_megatron.rollout.outcome import Rollout, rollout_metrics
from gft_megatron.rollout.recipe import GroupRecipe
from gft_megatron.rollout.samples import SampleMaker

EOS = 1


class ScriptedEngine(RolloutEngine):
    """Draws [2, 3, EOS]; `failures[i]` is raised by the i-th request instead."""

    scope = "rank"
    is_reproducible = True
    weight_version = 7

    def __init__(self, failures=None, truncate=False):
        self.failures = failures or {}
        self.truncate = truncate
        self.requests = []

    async def generate(self, request):
        index = len(self.requests)
        self.requests.append(request)
        await asyncio.sleep(0)
        if index in self.failures:
            raise self.failures[index](request.request_id, "as told")
        tokens = np.array([2, 3, 4] if self.truncate else [2, 3, EOS])
        return Completion(
            request_id=request.request_id,
            token_ids=tokens,
            log_probs=np.array([-1.0, -2.0, -3.0], np.float32),
            finish_reason=FinishReason.LENGTH if self.truncate else FinishReason.STOP,
            weight_spans=(WeightSpan(7, 0, 3),),
        )

    async def abort(self, request_ids=None):
        raise AssertionError

    async def update_weights(self, named_tensors, version):
        raise AssertionError

    async def close(self):
        pass


class ScriptedReward(Reward):
    """Looks the text up; a missing one is a failure."""

    def __init__(self, scores):
        self.scores = scores
        self.asked = Counter()

    async def score(self, response, label, metadata):
        self.asked[response] += 1
        if response not in self.scores:
            raise RewardError("timeout", response)
        return self.scores[response]


def prompt_with(*responses, row=3):
    recorded = tuple(RecordedResponse(text, np.array([5, EOS]), source) for text, source in responses)
    return Prompt(row=row, token_ids=np.array([8, 9]), label="x", responses=recorded)


def make_collector(engine=None, reward=None, *, seed=5, max_concurrent_samples=4):
    return Collector(
        SampleMaker(
            engine=engine or ScriptedEngine(),
            reward=reward or ScriptedReward({"2 3": 0.0, "expert": 1.0, "good": 1.0, "bad": 0.0}),
            decode=lambda ids: " ".join(map(str, ids)),
            seed=seed,
            max_concurrent_samples=max_concurrent_samples,
        )
    )


def make_recipe(*, max_new_tokens=3, **recipe):
    recipe = {"n_expert": 0, "n_teacher": 0, "n_self": 0, "needs_advantages": True, **recipe}
    return GroupRecipe(sampling=SamplingParams(max_new_tokens=max_new_tokens), **recipe)


def collect(prompts, *, engine=None, scores=None, collector=None, rollout_id=0, ids=None, **recipe):
    if collector is None:
        collector = make_collector(engine, None if scores is None else ScriptedReward(scores))
    ids = list(range(len(prompts))) if ids is None else ids
    draws = [Draw(GroupKey(rollout_id, group_id), group_id, row) for row, group_id in enumerate(ids)]
    collected = asyncio.run(collector.collect(prompts, draws, make_recipe(**recipe)))
    return collected.groups, collected.batch, collected.counts


def test_mixed_group_becomes_a_batch():
    prompt = prompt_with(("expert", Source.EXPERT), ("bad", Source.TEACHER))
    (group,), batch, counts = collect([prompt], n_expert=1, n_teacher=1, n_self=2)
    assert [sample.source for sample in group.samples] == [0, 1, 2, 2]
    assert batch.sources.tolist() == [0, 1, 2, 2]
    assert batch.rewards.tolist() == [1, 0, 0, 0]
    expected = np.array([1, 0, 0, 0]) - 0.25
    np.testing.assert_allclose(batch.advantages.numpy(), expected / expected.std(ddof=0) * math.sqrt(3 / 4), rtol=1e-5)
    assert batch.tokens.tolist() == [8, 9, 5, EOS, 8, 9, 5, EOS, 8, 9, 2, 3, EOS, 8, 9, 2, 3, EOS]
    assert batch.prompt_lengths.tolist() == [2] * 4 and batch.lengths.tolist() == [4, 4, 5, 5]
    assert batch.weight_versions.tolist() == [-1, -1, 7, 7]
    assert batch.rollout_log_probs[-3:].tolist() == [-1, -2, -3] and batch.rollout_log_probs[:10].isnan().all()
    assert (counts.refilled_samples, counts.failed_samples, counts.reward_errors, counts.dropped_groups) == (0, 0, 0, 0)


def test_missing_recorded_responses_are_refilled_with_own_samples():
    prompt = prompt_with(("expert", Source.EXPERT), ("good", Source.TEACHER))
    (group,), _, counts = collect([prompt], n_expert=1, n_teacher=3, n_self=4)
    assert Counter(sample.source for sample in group.samples) == {0: 1, 1: 1, 2: 6}
    assert counts.refilled_samples == 2


def test_more_recorded_responses_than_asked_are_drawn_anew_each_rollout():
    prompt = prompt_with(*((f"t{i}", Source.TEACHER) for i in range(6)))
    scores = {f"t{i}": i for i in range(6)}
    chosen = [
        tuple(s.text for s in collect([prompt], scores=scores, n_teacher=3, rollout_id=i)[0][0].samples)
        for i in range(8)
    ]
    assert all(len(set(texts)) == 3 for texts in chosen) and len(set(chosen)) > 1
    again = [
        tuple(s.text for s in collect([prompt], scores=scores, n_teacher=3, rollout_id=i)[0][0].samples)
        for i in range(8)
    ]
    assert chosen == again


@pytest.mark.parametrize("failure", [EngineFailed, RequestAborted, RequestRefused])
def test_a_group_is_complete_or_absent(failure):
    engine = ScriptedEngine({1: failure})
    prompt = prompt_with(("expert", Source.EXPERT), ("bad", Source.TEACHER))
    (group,), batch, counts = collect([prompt] * 2, engine=engine, n_expert=1, n_teacher=1, n_self=2)
    # Request 1 is the second sample of the first group: its three other responses go with it.
    assert len(group.samples) == 4 and batch.group_ids.tolist() == [1] * 4
    assert (counts.failed_samples, counts.dropped_groups) == (1, 1)
    ids = [request.request_id for request in engine.requests]
    assert len(set(ids)) == len(ids) and {len(i) for i in ids} == {32}


def test_a_failed_score_is_no_reward_of_zero():
    fails = prompt_with(("expert", Source.EXPERT), ("hangs", Source.TEACHER), ("bad", Source.TEACHER))
    scored = prompt_with(("good", Source.EXPERT), ("bad", Source.TEACHER))
    (group,), batch, counts = collect([fails, scored], n_expert=1, n_teacher=2)
    assert [sample.text for sample in group.samples] == ["good", "bad"] and batch.group_ids.tolist() == [1, 1]
    assert (counts.reward_errors, counts.dropped_groups) == (1, 1)
    np.testing.assert_allclose(batch.advantages.numpy(), [math.sqrt(0.5), -math.sqrt(0.5)], rtol=1e-5)


def test_a_failure_that_ends_the_run_is_told_as_it_is():
    class Lost(Exception):
        def __init__(self, request_id, message):
            super().__init__(message)

    engine = ScriptedEngine({5: Lost})
    with pytest.raises(Lost, match="as told"):
        collect([prompt_with()] * 8, engine=engine, n_self=2)


class HeldEngine(ScriptedEngine):
    """Answers when it is told to; counts what it holds."""

    is_reproducible = False

    def __init__(self, drawn_when_aborted=()):
        super().__init__()
        self.drawn = drawn_when_aborted
        self.held = {}
        self.most_held = 0

    async def generate(self, request):
        self.requests.append(request)
        self.held[request.request_id] = answer = asyncio.get_running_loop().create_future()
        self.most_held = max(self.most_held, len(self.held))
        try:
            tokens = await answer
        finally:
            del self.held[request.request_id]
        log_probs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
        return Completion(
            request.request_id, np.array(tokens), log_probs, FinishReason.STOP, (WeightSpan(7, 0, len(tokens)),)
        )

    def answer(self, number, tokens):
        self.held[self.requests[number].request_id].set_result(tokens)

    async def abort(self, request_ids=None):
        drawn = np.array(self.drawn, np.int64)
        for request_id in request_ids:
            partial = Partial(drawn, -np.ones(len(drawn), np.float32), (WeightSpan(6, 0, len(drawn)),))
            self.held[request_id].set_exception(RequestAborted(request_id, "aborted", partial))


async def turns(number=20):
    for _ in range(number):
        await asyncio.sleep(0)


ANY_REWARD = type("Any", (dict,), {"__contains__": lambda self, key: True, "__missing__": lambda self, key: len(key)})()


def draws_of(number, rollout_id=0):
    return [Draw(GroupKey(rollout_id, i), i, i) for i in range(number)]


def test_enough_groups_stop_the_rest_and_the_rest_goes_on_later():
    async def scenario():
        engine = HeldEngine(drawn_when_aborted=[4, 4])
        collector = make_collector(engine, ScriptedReward(ANY_REWARD), max_concurrent_samples=8)
        prompts = [prompt_with() for _ in range(5)]
        first = asyncio.create_task(
            collector.collect(prompts, draws_of(5), make_recipe(n_self=2, max_new_tokens=9),
                              enough=Enough(1, skip_zero_variance=True), keep_partial=True)
        )  # fmt: skip
        await turns()
        assert len(engine.requests) == 8, "four groups of two; the fifth waits"
        engine.answer(0, [2, EOS]), engine.answer(1, [2, EOS])  # equal rewards: complete, and not what is wanted
        engine.answer(2, [2, EOS]), engine.answer(3, [2, 2, EOS])
        engine.answer(4, [3, EOS])  # one of the third group's two is done
        await turns()
        done = await first
        assert [group.prompt is prompts[i] for i, group in enumerate(done.groups)] == [True, True]
        assert [draw.row for draw in done.left] == [2, 3, 4] and not engine.held
        assert done.counts.dropped_groups == done.counts.failed_samples == 0

        later = asyncio.create_task(collector.collect(prompts, done.left[:2], make_recipe(n_self=2, max_new_tokens=9)))
        await turns()
        resumed = engine.requests[-3:]
        assert [request.prompt_ids for request in resumed] == [(8, 9, 4, 4)] * 3, "one of four was already whole"
        assert {request.sampling.max_new_tokens for request in resumed} == {7}
        for i in range(3):
            engine.answer(len(engine.requests) - 3 + i, [5, EOS])
        done = await later
        assert [sample.token_ids.tolist() for group in done.groups for sample in group.samples] == [
            [3, EOS], [4, 4, 5, EOS], [4, 4, 5, EOS], [4, 4, 5, EOS],
        ]  # fmt: skip
        whole = done.groups[1].samples[0]
        assert whole.rollout_log_probs.tolist() == [-1, -1, -1, -2]
        assert whole.weight_spans == (WeightSpan(6, 0, 2), WeightSpan(7, 2, 4))
        assert done.counts.resumed_samples == 3
        ids = [request.request_id for request in engine.requests]
        assert len(set(ids)) == len(ids), "a resumed request has a name of its own"

    asyncio.run(scenario())


def test_a_response_goes_on_from_its_own_hint():
    """The share of hints falls from rollout to rollout; what was drawn behind one hint does not answer another."""

    async def scenario():
        engine = HeldEngine(drawn_when_aborted=[4, 4])
        collector = make_collector(engine, ScriptedReward(ANY_REWARD), max_concurrent_samples=4)
        prompts = prompts_with_expert(2)
        first = asyncio.create_task(
            collector.collect(prompts, draws_of(2), make_recipe(n_self=2, max_new_tokens=12, hints=Hints(2, 1.0)),
                              enough=Enough(1, skip_zero_variance=False), keep_partial=True)
        )  # fmt: skip
        await turns()
        engine.answer(0, [2, EOS]), engine.answer(1, [2, EOS])
        left = (await first).left
        later = asyncio.create_task(
            collector.collect(prompts, left, make_recipe(n_self=2, max_new_tokens=12, hints=Hints(2, 0.0)))
        )
        await turns()
        assert [request.prompt_ids for request in engine.requests[-2:]] == [(8, 9, *EXPERT[:7], 4, 4)] * 2
        engine.answer(4, [5, EOS]), engine.answer(5, [5, EOS])
        (group,) = (await later).groups
        assert {tuple(sample.token_ids.tolist()) for sample in group.samples} == {(*EXPERT[:7], 4, 4, 5, EOS)}

    asyncio.run(scenario())


def test_only_so_many_requests_are_with_the_engine_and_the_queue_is_numbers():
    async def scenario():
        engine = HeldEngine()
        collector = make_collector(engine, ScriptedReward(ANY_REWARD), max_concurrent_samples=6)
        asked = []

        class Rows:
            def __getitem__(self, row):
                asked.append(row)
                return prompt_with()

        collecting = asyncio.create_task(collector.collect(Rows(), draws_of(100), make_recipe(n_self=3)))
        await turns()
        assert len(engine.held) == 6 and len(asked) == 6
        while not collecting.done():
            for request_id in list(engine.held):
                engine.held[request_id].set_result([2, EOS])
            await turns()
        assert engine.most_held == 6 and len((await collecting).groups) == 100 and len(asked) == 100

    asyncio.run(scenario())


def test_cancelling_a_collection_cancels_its_requests():
    async def scenario():
        engine = HeldEngine()
        collector = make_collector(engine)
        collecting = asyncio.create_task(collector.collect([prompt_with()] * 4, draws_of(4), make_recipe(n_self=2)))
        await turns()
        assert engine.held
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting
        assert not engine.held and len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


def test_supervised_groups_need_neither_rewards_nor_an_engine():
    reward = ScriptedReward({})
    collector = Collector(SampleMaker(None, reward, str, 0, 1))
    prompt = prompt_with(("expert", Source.EXPERT))
    (group,), batch, counts = collect([prompt], collector=collector, n_expert=1, n_teacher=1, needs_advantages=False)
    assert len(group.samples) == 1 and batch.advantages.tolist() == [1.0] and batch.rewards.isnan().all()
    assert not reward.asked and counts.refilled_samples == 0


def test_recorded_responses_are_scored_once():
    prompt = prompt_with(("expert", Source.EXPERT), ("bad", Source.TEACHER))
    reward = ScriptedReward({"expert": 1.0, "bad": 0.0})
    collector = make_collector(reward=reward)
    for rollout_id in range(3):
        collect([prompt], collector=collector, n_expert=1, n_teacher=1, rollout_id=rollout_id)
    assert reward.asked == {"expert": 1, "bad": 1}


def test_a_rewritten_response_has_a_reward_of_its_own():
    reward = ScriptedReward({"e": 1.0, "new": 0.0})
    collector = make_collector(reward=reward)
    rewards = []
    for text in ("e", "new", "new", "e"):
        _, batch, _ = collect([prompt_with((text, Source.EXPERT))], collector=collector, n_expert=1)
        rewards += batch.rewards.tolist()
    assert rewards == [1.0, 0.0, 0.0, 1.0]
    assert reward.asked == {"e": 1, "new": 1}


def test_truncated_samples_are_marked_and_keep_their_last_token():
    prompt = prompt_with(("expert", Source.EXPERT))
    (group,), batch, _ = collect(
        [prompt], engine=ScriptedEngine(truncate=True), scores={"expert": 1.0, "2 3 4": 0.0}, n_expert=1, n_self=1
    )
    assert batch.truncated.tolist() == [False, True]
    assert group.samples[1].text == "2 3 4"


def test_samples_for_an_evaluation():
    engine = ScriptedEngine({1: RequestRefused})
    collector = make_collector(engine, ScriptedReward({"2 3": 0.5}))
    drawn = asyncio.run(collector.sample([prompt_with()] * 2, 3, SamplingParams(max_new_tokens=3), name="eval/0"))
    assert [[sample.reward for sample in samples] for samples in drawn] == [[0.5, 0.5], [0.5, 0.5, 0.5]]


def test_a_group_that_cannot_be_read_any_more_is_made_and_recorded_again(tmp_path):
    def collected(during=lambda: None):
        bank = Bank.open(tmp_path, rank=0, num_ranks=1, fingerprint="f", checkpoint_iteration=0)
        during()
        collector = make_collector(HeldEngine())
        collector.maker.engine.generate = ScriptedEngine().generate
        collector.bank = bank
        groups, _, counts = collect([prompt_with(row=i) for i in range(2)], collector=collector, n_self=2)
        bank.close()
        return len(groups), counts.restored_groups

    def damage():
        (file,) = tmp_path.iterdir()
        data = bytearray(file.read_bytes())
        data[60] ^= 1
        file.write_bytes(data)

    assert collected() == (2, 0) and collected() == (2, 2)
    assert collected(during=damage) == (2, 1)
    assert collected() == (2, 2)


def whole_rollout(batch):
    return Rollout(batch, batch, torch.zeros(batch.num_samples, dtype=torch.int64), CollectCounts(), [], [])


EXPERT = [11, 12, 13, 14, 15, 16, 17, EOS]


def prompts_with_expert(num):
    response = RecordedResponse("expert", np.array(EXPERT), Source.EXPERT)
    return [Prompt(row=i, token_ids=np.array([8, 9]), label="x", responses=(response,)) for i in range(num)]


def hinted(prompts, hints, **options):
    engine = ScriptedEngine()
    texts = [" ".join(map(str, [*EXPERT[:n], 2, 3])) for n in range(8)]
    options = {"scores": {text: float(n) for n, text in enumerate(texts)}, "max_new_tokens": 10, **options}
    return engine, *collect(prompts, engine=engine, n_self=4, hints=hints, **options)


def test_a_hint_is_a_part_of_the_response_that_nobody_drew():
    engine, groups, batch, _ = hinted(prompts_with_expert(8), Hints(3, 0.5))
    samples = [sample for group in groups for sample in group.samples]
    lengths = []
    for request, sample in zip(engine.requests, samples, strict=True):
        hint = sample.token_ids[:-3].tolist()
        lengths.append(len(hint))
        assert sample.source is Source.SELF and sample.token_ids.tolist() == [*EXPERT[: len(hint)], 2, 3, EOS]
        assert request.prompt_ids == (8, 9, *hint) and request.sampling.max_new_tokens == 10 - len(hint)
        assert np.isnan(sample.rollout_log_probs[: len(hint)]).all()
        assert sample.rollout_log_probs[len(hint) :].tolist() == [-1, -2, -3]
        assert sample.reward == len(hint), "the reward is of hint and continuation"
        assert sample.weight_spans == (WeightSpan(7, len(hint), len(hint) + 3),)
    assert set(lengths) == {0, 2, 4, 7}, "thirds of 7 tokens; all of them are the response without its end"
    assert batch.lengths.tolist() == [2 + length + 3 for length in lengths] and set(batch.prompt_lengths.tolist()) == {
        2
    }
    metrics = rollout_metrics(whole_rollout(batch))
    assert metrics["rollout/hint_length_mean"] == np.mean(lengths)


def test_segments_of_hints_are_binomial_and_the_same_again():
    def lengths(rollout_id, share=0.7):
        _, _, batch, _ = hinted(prompts_with_expert(100), Hints(7, share), rollout_id=rollout_id)
        return batch.lengths.numpy() - 5

    first = lengths(0)
    expected = [math.comb(7, n) * 0.7**n * 0.3 ** (7 - n) for n in range(8)]
    shares = np.bincount(first, minlength=8) / 400
    np.testing.assert_allclose(shares, expected, atol=4 * math.sqrt(0.25 / 400))
    assert first.tolist() == lengths(0).tolist() != lengths(1).tolist()
    assert set(lengths(0, share=1.0)) == {7} and set(lengths(0, share=0.0)) == {0}


def test_hints_do_not_depend_on_who_collects():
    prompts = prompts_with_expert(6)
    _, together, _, _ = hinted(prompts, Hints(5, 0.5))
    apart = [hinted([prompt], Hints(5, 0.5), ids=[i])[1][0] for i, prompt in enumerate(prompts)]
    tokens = [[[sample.token_ids.tolist() for sample in group.samples] for group in of] for of in (together, apart)]
    assert tokens[0] == tokens[1]


def test_no_expert_no_hint():
    teacher = prompt_with(("good", Source.TEACHER))
    engine, (group,), batch, _ = hinted([teacher], Hints(5, 1.0))
    assert {request.prompt_ids for request in engine.requests} == {(8, 9)} and batch.lengths.tolist() == [5] * 4
    assert "rollout/hint_length_mean" not in rollout_metrics(whole_rollout(batch))
