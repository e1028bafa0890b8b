"""Every rank gets the same groups in the same order, whichever ranks collected them."""

import asyncio
import json
import time
from dataclasses import fields, replace
from datetime import timedelta

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import PreTrainedTokenizerFast

from gft_megatron.config import ParallelConfig
from gft_megatron.data.order import PromptOrder
from gft_megatron.data.prompts import prepare_prompts
from gft_megatron.data.store import PromptStore
from gft_megatron.groups import Batch, WeightSpan
from gft_megatron.rewards import Reward, build_reward
from gft_megatron.rollout.collect import Collector
from gft_megatron.rollout.engine import Completion, FinishReason, RolloutEngine, SamplingParams
from gft_megatron.rollout.recipe import GroupRecipe, RolloutRules
from gft_megatron.rollout.samples import SampleMaker

NUM_ROWS = 23


def make_store(path):
    words = {word: i for i, word in enumerate(["<eos>", *map(str, range(100))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    rows = [
        {
            "prompt": f"{i}",
            "label": f"{i % 7}",
            "responses": [
                {"text": f"{i % 7}", "source": "expert"},
                {"text": f"{i % 5} {i % 3}", "source": "teacher"},
                {"text": f"{i % 7}", "source": "teacher"},
            ],
        }
        for i in range(NUM_ROWS)
    ]
    data = path.with_suffix(".jsonl")
    data.write_text("\n".join(map(json.dumps, rows)))
    prepare_prompts(
        [data],
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"),
        store_path=path,
        quarantine_path=path.with_suffix(".bad"),
        max_prompt_length=8,
        max_response_length=8,
        vocab_size=101,
    )


class NoEngine:
    weight_version = -1
    is_reproducible = True

    async def update_weights(self, named_tensors, version):
        assert [name for name, _ in named_tensors] == ["a", "b"]
        self.weight_version = version

    async def close(self):
        pass


def gathered_tensors():
    """Each item is a collective, as in a real export: a rank that skips it alone leaves the others waiting."""
    for name in ("a", "b"):
        tensor = torch.ones(1)
        torch.distributed.all_reduce(tensor)
        yield name, tensor


class CoinEngine(RolloutEngine):
    """Answers a prompt of number i with i or with i + 1, as the request's name has it."""

    scope = "replica"
    is_reproducible = False
    weight_version = -1
    answer_sec = 0.0

    async def generate(self, request):
        await asyncio.sleep(self.answer_sec)
        token = request.prompt_ids[-1] + int(request.request_id, 16) % 2
        return Completion(
            request.request_id,
            np.array([token, 0]),
            np.zeros(2, np.float32),
            FinishReason.STOP,
            (WeightSpan(self.weight_version, 0, 2),),
        )

    async def abort(self, request_ids=None):
        pass  # whatever is in flight is done in the next turn of the loop

    async def update_weights(self, named_tensors, version):
        for _ in named_tensors:
            pass
        self.weight_version = version

    async def close(self):
        pass


class NumberReward(Reward):
    async def score(self, response, label, metadata):
        return float(int(response) % 7 == int(label))


class FullDisk:
    """A bank that can read and not write."""

    restored = {}

    def append(self, groups):
        pass

    def mark_consumed(self, *told):
        raise OSError("no room")

    compact = mark_consumed

    def mark_dropped(self, reasons):
        if reasons:
            self.mark_consumed()

    def close(self):
        pass


def number_workers(scope, has_engine, bank=None, watch=None):
    from gft_megatron.training.rollouts import RolloutWorkers

    engine = CoinEngine()
    maker = SampleMaker(engine, NumberReward(), lambda ids: str(ids[0] - 1), 3, 8)
    return engine, RolloutWorkers(Collector(maker, bank) if has_engine else None, scope, watch=watch)


def rollouts_ahead(rank, store):
    """Collected before their turn by the replica's first rank, resumed, and left out when they are too old."""
    from gft_megatron.training.rollouts import RolloutPlan

    seen = []
    engine, workers = number_workers("replica", rank == 0, watch=lambda news, figures: seen.append(news))
    order = PromptOrder(NUM_ROWS, seed=2)
    recipe = GroupRecipe(
        n_expert=0, n_teacher=0, n_self=4, sampling=SamplingParams(max_new_tokens=4), needs_advantages=True
    )
    rules = RolloutRules(
        num_groups=4, num_draws=4, skip_zero_variance=False, mask_truncated=False, refill=False, most_draws=40,
        max_staleness=1,
    )  # fmt: skip
    workers.update_weights(gathered_tensors(), 10)
    first = workers.collect(RolloutPlan(0, store, order, recipe, rules), version=10)
    assert first.staleness.tolist() == [0] * 16
    engine.answer_sec = 0.4
    workers.start(RolloutPlan(1, store, order, recipe, rules))
    workers.start(RolloutPlan(2, store, order, recipe, rules))
    assert workers.num_ahead == 2 and order.position == 12
    state = json.loads(json.dumps(workers.state_dict()))
    of_second = workers._ahead[0].news
    second = workers.collect(RolloutPlan(1, store, order, recipe, rules), version=11)
    engine.answer_sec = 0.0
    if rank == 0:
        assert seen and all(news is of_second for news in seen), "what is told is of the rollout that is waited for"
        assert (of_second.num_draws, of_second.num_groups, of_second.num_in_flight) == (4, 4, 0)
    assert second.staleness.tolist() == [1] * 16 and not second.counts.stale_groups
    if rank == 0:
        workers._ahead[0].mine.result()
        engine.weight_version = 12
    third = workers.collect(RolloutPlan(2, store, order, recipe, rules), version=12)
    assert third.counts.stale_groups == 4, "drawn with weights of two rollouts before"
    assert third.staleness.tolist() == [0] * 16 and order.position == 16
    assert not set(second.collected.rows.tolist()) & set(third.collected.rows.tolist())
    workers.close()

    engine, again = number_workers("replica", rank == 0)
    again.load_state_dict(state)
    again.update_weights(gathered_tensors(), 11)
    resumed = again.collect(RolloutPlan(1, store, order, recipe, rules), version=11)
    assert order.position == 16, "its rows had been drawn"
    for name in ("rows", "tokens", "rewards", "group_ids"):
        assert torch.equal(getattr(resumed.collected, name), getattr(second.collected, name)), name
    again.close()


def a_full_disk(rank, store):
    """Of one rank: the others hear of it, instead of waiting for that rank in the next collective."""
    from gft_megatron.training.exchange import FailedElsewhere
    from gft_megatron.training.rollouts import RolloutPlan

    engine, workers = number_workers("replica", rank == 0, FullDisk())
    recipe = GroupRecipe(
        n_expert=0, n_teacher=0, n_self=2, sampling=SamplingParams(max_new_tokens=4), needs_advantages=True
    )
    rules = RolloutRules(
        num_groups=2, num_draws=2, skip_zero_variance=False, mask_truncated=False, refill=False, most_draws=2
    )
    order = PromptOrder(NUM_ROWS, seed=4)
    workers.update_weights(gathered_tensors(), 0)
    rollout = workers.collect(RolloutPlan(0, store, order, recipe, rules), version=0)

    def collect_what_is_too_old():
        engine.weight_version = 0
        workers.collect(RolloutPlan(1, store, order, recipe, rules), version=3)

    for work in (lambda: workers.mark_trained(rollout, 1), lambda: workers.compact(1), collect_what_is_too_old):
        with pytest.raises(OSError if rank == 0 else FailedElsewhere, match="no room"):
            work()
    workers.close()


def over_sampling(rank, store):
    """Two collectors begin more groups than are wanted; what is left comes first in the next rollout."""
    from gft_megatron.training.rollouts import RolloutPlan

    engine, workers = number_workers("rank", True)
    order = PromptOrder(NUM_ROWS, seed=4)
    recipe = GroupRecipe(
        n_expert=0, n_teacher=0, n_self=2, sampling=SamplingParams(max_new_tokens=4), needs_advantages=True
    )
    rules = RolloutRules(
        num_groups=5, num_draws=9, skip_zero_variance=True, mask_truncated=False, refill=True, most_draws=60
    )
    workers.update_weights(gathered_tensors(), 0)
    rows = []
    for rollout_id in range(3):
        rollout = workers.collect(RolloutPlan(rollout_id, store, order, recipe, rules), version=0)
        assert rollout.trained.num_groups == 5 and len(rollout.own_keys) == len(rollout.own_groups)
        assert rollout.collected.group_ids.tolist() == sorted(rollout.collected.group_ids.tolist())
        rows.append(rollout.collected.rows.unique_consecutive().tolist())
        left = [row for *_, row in workers.state_dict()["left"]]
        assert sorted(sum(rows, []) + left) == sorted(PromptOrder(NUM_ROWS, seed=4).take(order.position))
    assert order.position > 9 + 2 * 4, "refilled too"

    workers.collect(RolloutPlan(3, store, order, recipe, replace(rules, skip_zero_variance=False)), version=0)
    left = [row for *_, row in workers.state_dict()["left"]]
    assert len(left) == 4 and workers._collector._spare, "finished, for a later rollout"
    workers.end_phase()
    position = order.position
    next_phase = RolloutPlan(4, store, order, replace(recipe, n_self=3), replace(rules, num_draws=5, refill=False))
    rollout = workers.collect(next_phase, version=0)
    assert rollout.collected.group_ids.unique(return_counts=True)[1].tolist() == [3] * 5, "made as this phase has it"
    assert {key.rollout_id for key in rollout.own_keys} <= {4}
    rows = rollout.collected.rows.unique_consecutive().tolist()
    assert rows[:4] == left and order.position == position + 1
    workers.close()


def samples_of_one_rank(rank, batch):
    """A rank without samples sends none, nor room for them: of most ranks there are none."""
    from gft_megatron.training.exchange import gather_batch

    room = []
    real = torch.distributed.all_gather

    def all_gather(parts, mine):
        room.append(sum(part.nbytes for part in parts))
        real(parts, mine)

    torch.distributed.all_gather = all_gather
    try:
        gathered = gather_batch(batch if rank == 1 else batch.select([]))
    finally:
        torch.distributed.all_gather = real
    assert sum(room) < 256 < batch.tokens.nbytes
    for field in fields(Batch):
        value, expected = getattr(gathered, field.name), getattr(batch, field.name)
        assert value.dtype == expected.dtype and value.numpy().tobytes() == expected.numpy().tobytes(), field.name


def work_that_outlasts_collectives(rank):
    """What one rank does alone may take hours, and those that wait for it go on waiting; a failure is told at once."""
    from gft_megatron.training.exchange import FailedElsewhere, all_or_none, on_rank_zero

    def work():
        if rank == 0:
            time.sleep(1.5)
        return rank

    def fail():
        work()
        if rank == 0:
            raise ValueError("as told")

    _set_pg_timeout(timedelta(seconds=0.5))
    try:
        assert all_or_none(work) == rank and on_rank_zero(work) == 0
        with pytest.raises(ValueError if rank == 0 else FailedElsewhere, match="as told"):
            all_or_none(fail)
    finally:
        _set_pg_timeout(timedelta(seconds=60))


def collect_on_rank(rank, world_size, scope, store_path, out):
    from gft_megatron.training import cpu

    cpu.install()
    from gft_megatron.training.parallel import is_replica_leader, lay_out
    from gft_megatron.training.rollouts import RolloutPlan, RolloutWorkers

    lay_out(ParallelConfig(tensor_model_parallel_size=2))
    has_engine = scope == "rank" or is_replica_leader()
    assert has_engine == (scope == "rank" or rank == 0)
    maker = SampleMaker(engine=NoEngine(), reward=build_reward("exact"), decode=str, seed=1, max_concurrent_samples=4)
    collector = Collector(maker)
    workers = RolloutWorkers(collector if has_engine else None, scope)
    for version in (0, 0, 1):  # an evaluation and a rollout at the same step: the second hand-over is none
        workers.update_weights(gathered_tensors(), version)
        assert maker.engine.weight_version == (version if has_engine else -1)
    recipe = GroupRecipe(
        n_expert=1, n_teacher=1, n_self=0, sampling=SamplingParams(max_new_tokens=1), needs_advantages=True
    )
    order = PromptOrder(NUM_ROWS, seed=2)
    rules = RolloutRules(
        num_groups=9, num_draws=9, skip_zero_variance=True, mask_truncated=False, refill=False, most_draws=90
    )
    plain = workers.collect(RolloutPlan(0, PromptStore(store_path), order, recipe, rules), version=0)
    rules = replace(rules, refill=True)
    refilled = workers.collect(RolloutPlan(0, PromptStore(store_path), order, recipe, rules), version=0)
    assert plain.collected.num_groups == 9 and 0 < plain.trained.num_groups < 9
    assert refilled.trained.num_groups == 9 and refilled.collected.num_groups > 9
    assert order.position == 9 + refilled.collected.num_groups
    fields = {
        f"{name}.{part}.{field}": getattr(getattr(rollout, part), field)
        for name, rollout in (("plain", plain), ("refilled", refilled))
        for part in ("trained", "collected")
        for field in ("tokens", "lengths", "group_ids", "sources", "rewards", "advantages")
    }
    torch.save(fields, out / f"{scope}{rank}.pt")
    workers.close()
    if scope == "replica":
        rollouts_ahead(rank, PromptStore(store_path))
        a_full_disk(rank, PromptStore(store_path))
    else:
        over_sampling(rank, PromptStore(store_path))
        samples_of_one_rank(rank, refilled.collected)
        work_that_outlasts_collectives(rank)


def test_all_ranks_get_the_same_groups(tmp_path):
    store = tmp_path / "prompts.arrow"
    make_store(store)
    for scope in ("rank", "replica"):
        run_on_ranks(collect_on_rank, 2, scope, store, tmp_path)
    results = [
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("rank0", "rank1", "replica0", "replica1")
    ]
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name
    assert results[0]["plain.collected.group_ids"].tolist() == [i for i in range(9) for _ in range(2)]
