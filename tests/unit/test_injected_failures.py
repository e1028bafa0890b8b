"""A tenth of all requests fail, and what is trained on is what it would have been without that.

Fake servers behind the real client and the real collection. What a server answers hangs on the request alone, so every
sample of the run with failures can be held against that of the run without.
"""

import asyncio
import random
import statistics
from collections import Counter, defaultdict

import numpy as np
import pytest
from fake_sglang import EOS
from test_sglang_faults import KINDS, Site

from gft_megatron.groups import GroupKey, Prompt
from gft_megatron.rewards import Reward
from gft_megatron.rollout.collect import Collector
from gft_megatron.rollout.draws import Draw
from gft_megatron.rollout.engine import SamplingParams
from gft_megatron.rollout.recipe import GroupRecipe
from gft_megatron.rollout.samples import SampleMaker
from gft_megatron.rollout.sglang.engine import _retry_id

NUM_GROUPS, GROUP_SIZE, TRIES = 50, 8, 3
NUM_LOST = 3
# A server that stands still is not among them: it takes with it requests that were not chosen here.
FAULTS = [
    "status 500", "status 429", "status 503", "reset", "half", "no_json", "empty", "NaN", "a log-prob less",
    "fewer tokens than told", "token too large", "token negative", "cut off", "finish abort", "old weights",
]  # fmt: skip


class Requests:
    """What the fakes are asked, under the names of first tries, and what becomes of each try."""

    def __init__(self, faults=None):
        self.faults = faults or {}  # name: the faults of its tries, in turn
        self.prompts = {}  # name: its prompt
        self.tries = Counter()
        self.injected = Counter()
        self._names = {}  # id of a try: name

    def fault(self, body):
        name = self._name(body)
        number = self.tries[name]
        self.tries[name] += 1
        fault = next(iter(self.faults.get(name, ())[number:]), None)
        if fault is not None:
            self.injected[fault] += 1
        return fault

    def tokens(self, body):
        return answer_to(self._name(body))

    def _name(self, body):
        rid = body["rid"]
        if rid not in self._names:
            self.prompts[rid] = tuple(body["input_ids"])
            self._names |= {rid: rid, **{_retry_id(rid, number): rid for number in range(1, TRIES)}}
        return self._names[rid]


def answer_to(name):
    draw = random.Random(name)
    return [*draw.choices(range(5, 32), k=3), EOS]


def reward_of(text):
    return sum(map(int, text.split())) % 11 / 10


class SumReward(Reward):
    async def score(self, response, label, metadata):
        return reward_of(response)


async def collect(requests):
    prompts = [Prompt(row=i, token_ids=np.array([3 + i % 20, 3 + i // 20]), label="") for i in range(NUM_GROUPS)]
    draws = [Draw(GroupKey(4, i), i, i) for i in range(NUM_GROUPS)]
    recipe = GroupRecipe(
        n_expert=0, n_teacher=0, n_self=GROUP_SIZE, sampling=SamplingParams(max_new_tokens=9), needs_advantages=True
    )
    async with Site(*[requests.fault] * 3) as site:
        for server in site.servers:
            server.tokens = requests.tokens
        maker = SampleMaker(site.engine, SumReward(), lambda ids: " ".join(map(str, ids)), 6, 64)
        collected = await Collector(maker).collect(prompts, draws, recipe)
        return collected, site.failures(), site.figures()["retries"]


def chosen_faults(prompts, draw):
    """A tenth of the requests fail once or twice; in some groups one request fails each time."""
    of_group = defaultdict(list)
    for name, prompt in sorted(prompts.items()):
        of_group[prompt].append(name)
    lost = draw.sample(sorted(of_group), NUM_LOST)
    others = [name for prompt, names in sorted(of_group.items()) if prompt not in lost for name in names]
    failing = {draw.choice(of_group[prompt]): TRIES for prompt in lost}
    failing |= {name: draw.randint(1, TRIES - 1) for name in draw.sample(others, len(prompts) // 10 - NUM_LOST)}
    dealt = (FAULTS * sum(failing.values()))[: sum(failing.values())]  # each of them as often as any other
    draw.shuffle(dealt)
    return {name: [dealt.pop() for _ in range(tries)] for name, tries in failing.items()}, lost


def facts(sample):
    """Of a sample, bit for bit."""
    assert sample.token_ids.dtype == np.int64 and sample.rollout_log_probs.dtype == np.float32
    arrays = sample.token_ids.tobytes(), sample.rollout_log_probs.tobytes()
    return sample.source, arrays, sample.text, sample.reward, sample.truncated, sample.weight_spans


@pytest.mark.parametrize("seed", range(2))
def test_what_is_left_is_as_if_nothing_had_failed(seed):
    undisturbed = Requests()
    plain, failures, retries = asyncio.run(collect(undisturbed))
    assert len(undisturbed.prompts) == NUM_GROUPS * GROUP_SIZE and not failures and not retries
    faults, lost = chosen_faults(undisturbed.prompts, random.Random(seed))
    assert len(faults) == len(undisturbed.prompts) // 10

    requests = Requests(faults)
    with_failures, failures, retries = asyncio.run(collect(requests))
    assert requests.prompts.items() <= undisturbed.prompts.items()
    assert requests.injected == Counter(fault for tries in faults.values() for fault in tries)
    assert set(requests.injected) == set(FAULTS)
    by_kind = Counter()
    for fault, number in requests.injected.items():
        by_kind[KINDS[fault]] += number
    assert failures == by_kind
    assert retries == requests.injected.total() - NUM_LOST
    counts = with_failures.counts
    assert (counts.failed_samples, counts.dropped_groups, counts.reward_errors) == (NUM_LOST, NUM_LOST, 0)

    whole = [i for i, group in enumerate(plain.groups) if tuple(group.prompt.token_ids.tolist()) not in lost]
    assert len(whole) == NUM_GROUPS - NUM_LOST
    assert with_failures.keys == [GroupKey(4, i) for i in whole]
    batch = with_failures.batch
    assert Counter(batch.group_ids.tolist()) == dict.fromkeys(whole, GROUP_SIZE)
    for i, group in zip(whole, with_failures.groups, strict=True):
        assert list(map(facts, group.samples)) == list(map(facts, plain.groups[i].samples))
        # What the servers had to say to this prompt, whoever drew it and at which try.
        prompt = tuple(group.prompt.token_ids.tolist())
        answers = sorted(answer_to(name) for name, asked in undisturbed.prompts.items() if asked == prompt)
        assert sorted(sample.token_ids.tolist() for sample in group.samples) == answers
        rewards = [sum(tokens[:-1]) % 11 / 10 for tokens in answers]
        mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
        for of in (batch, plain.batch):
            got = of.rewards[of.group_ids == i].double().numpy()
            np.testing.assert_allclose([got.mean(), got.std(ddof=1)], [mean, std], rtol=1e-7)
        of_group = batch.group_ids == i
        expected = (np.array([reward_of(sample.text) for sample in group.samples]) - mean) / (std + 1e-6)
        np.testing.assert_allclose(batch.advantages[of_group].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert batch.advantages[of_group].equal(plain.batch.advantages[plain.batch.group_ids == i])
