"""The SGLang engine among servers that fail: nothing false becomes a completion, all is counted, nothing is left.

The servers are fakes, because a real one does not fail when it is told to; tests/sglang has the real ones.
"""

import asyncio
import random
import resource
import uuid
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from fake_sglang import EOS, TOKENS, VOCAB_SIZE, WRONG, FakeServer

from gft_megatron.groups import WeightSpan
from gft_megatron.rollout.engine import (
    EngineFailed,
    FinishReason,
    GenerateRequest,
    RequestAborted,
    RequestRefused,
    SamplingParams,
    figures_of_all,
)
from gft_megatron.rollout.sglang import client
from gft_megatron.rollout.sglang.client import ModelFacts
from gft_megatron.rollout.sglang.engine import EngineLimits, SGLangEngine
from gft_megatron.rollout.sglang.fleet import FleetLost, HealthLimits
from gft_megatron.rollout.sglang.http import FailureKind, Http, Keys
from gft_megatron.rollout.sglang.watcher import ProbeLimits

MODEL = ModelFacts(vocab_size=VOCAB_SIZE, max_positions=64, eos_token_ids={EOS})


class FakeSync:
    """Sets the version of fakes."""

    def __init__(self, servers):
        self.servers = {server.url: server for server in servers}
        self.failing = {}
        self.pushed = []
        self.caught_up = []
        self.newest = None
        self.hold = None  # an event that a push waits for

    async def release_memory(self, urls):
        self.released = list(urls)
        for url in urls:
            self.servers[url].version = "released"
        return {}

    async def push(self, urls, named_tensors, version, *, allow_running):
        self.pushed.append((list(urls), list(named_tensors), version, allow_running))
        if self.hold is not None:
            await self.hold.wait()
        self.newest = str(version)
        taken = [url for url in urls if url not in self.failing]
        for url in taken:
            self.servers[url].version = self.newest
        failed = {url: self.failing[url] for url in urls if url in self.failing}
        return SimpleNamespace(acknowledged=tuple(taken), failed=failed, seconds=0.5)

    async def catch_up(self, url):
        self.caught_up.append(url)
        await asyncio.sleep(0)
        if url in self.failing:
            return False
        self.servers[url].version = self.newest
        return True

    async def close(self):
        pass


class Site:
    """Fakes and an engine on them, weights 0 given."""

    def __init__(self, *faults, start=True, **options):
        self.events = []
        self.faults = faults
        self.options = options
        self.started = start

    async def __aenter__(self):
        self.servers = [await FakeServer(fault, events=self.events).start() for fault in self.faults]
        self.urls = [server.url for server in self.servers]
        self.sync = FakeSync(self.servers)
        health = {"suspect_sec": 0.1, "dead_sec": 0.2, "stale_dead_sec": 30, "start_sec": 0.3}
        limits = {"lost_sec": 5.0, "request_sec": 10, "abort_sec": 5.0, "backoff_sec": 0.01}
        self.engine = SGLangEngine(
            lambda: self.urls,
            **{
                "keys": Keys(),
                "model": MODEL,
                "weight_sync": lambda http: self.sync,
                "health": HealthLimits(**health | self.options.pop("health", {})),
                "probes": ProbeLimits(every_sec=0.02, timeout_sec=self.options.pop("probe_timeout", 1.0)),
                "limits": EngineLimits(**limits | self.options.pop("limits", {})),
                **self.options,
            },
        )
        if self.started:
            await self.engine.update_weights([], 0)
        return self

    async def __aexit__(self, *_):
        await self.engine.close()
        assert self.figures()["in_flight"] == 0, "a slot is left"
        for server in self.servers:
            await server.stop()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if left:  # of the fakes' connections
            await asyncio.wait(left, timeout=1)
        assert not [task for task in left if not task.done()]

    def generate(self, **changes):
        return self.engine.generate(request(**changes))

    def figures(self):
        return self.engine.figures()

    def failures(self):
        return {name.partition("/")[2]: n for name, n in self.figures().items() if name.startswith("failures/")}

    async def until(self, condition, seconds=10):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    async def served_again(self, server):
        await self.until(lambda: server.url in self.engine._fleet.servable())


def request(prompt=(3, 4), new=8, rid=None, **sampling):
    return GenerateRequest(rid or uuid.uuid4().hex, prompt, SamplingParams(new, **sampling))


def once(fault):
    """The first request to any of the servers that share this."""
    faults = [fault]
    return lambda body: faults.pop() if faults else None


def always(fault):
    return lambda body: fault


KINDS = {
    **dict.fromkeys(WRONG, "malformed"),
    "torn_sse": "malformed", "no_json": "malformed", "empty": "malformed",
    "finish abort": "aborted",
    "old weights": "stale", "default weights": "stale", "some old weights": "stale",
    "hang": "no_progress", "lost": "no_progress",
    "status 500": "server_error", "status 502": "server_error",
    "status 429": "overloaded", "status 503": "overloaded",
    "reset": "broken_off", "half": "broken_off",
}  # fmt: skip


def check_whole(completion, rid):
    assert completion.request_id == rid and completion.token_ids.tolist() == TOKENS
    assert completion.token_ids.dtype == np.int64 and completion.log_probs.dtype == np.float32
    assert completion.log_probs.tolist() == [-0.5, -1.5, -2.5, -3.5]
    assert completion.finish_reason is FinishReason.STOP and completion.weight_spans == (WeightSpan(0, 0, 4),)


@pytest.mark.parametrize("fault", KINDS)
def test_a_fault_is_no_completion_and_the_request_goes_to_another_server(fault):
    async def main():
        shared = once(fault)
        async with Site(shared, shared) as site:
            asked = request()
            check_whole(await site.engine.generate(asked), asked.request_id)
            happened = [event for event in site.events if event[0] != "trial"]
            (_, first, rid), (_, aborted_at, aborted), (_, second, retry) = happened
            assert [event[0] for event in happened] == ["generate", "abort", "generate"]
            assert (aborted_at, aborted) == (first, rid), "the old one has to be given up before there is a new one"
            assert second != first and rid == asked.request_id
            assert retry != rid and len(retry) == 32
            assert site.failures() == {KINDS[fault]: 1} and site.figures()["retries"] == 1

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["NaN", "status 500", "reset", "hang", "finish abort", "status 429"])
@pytest.mark.parametrize("num_servers", [1, 4])
def test_three_tries_and_no_more(fault, num_servers):
    async def main():
        async with Site(*[always(fault)] * num_servers) as site:
            with pytest.raises(EngineFailed, match="3 tries failed"):
                await site.generate()
            asked = [event for event in site.events if event[0] == "generate"]
            assert len(asked) == 3 and len({rid for _, _, rid in asked}) == 3
            assert len({url for _, url, _ in asked}) == min(3, num_servers)
            assert site.failures() == {KINDS[fault]: 3} and site.figures()["retries"] == 2

    asyncio.run(main())


def test_one_of_ten_requests_fails_and_every_sample_comes():
    async def main():
        draw = random.Random(3)
        kinds = ["status 500", "NaN", "reset", "half", "cut off"]
        injected = Counter()

        def sometimes(body):
            if draw.random() >= 0.1:
                return None
            fault = draw.choice(kinds)
            injected[KINDS[fault]] += 1
            return fault

        async with Site(*[sometimes] * 4, health={"failures": 1000}) as site:
            asked = [request(prompt=(3, i % 8)) for i in range(150)]
            completions = await asyncio.gather(*map(site.engine.generate, asked), return_exceptions=True)
            for one, completion in zip(asked, completions, strict=True):
                if not isinstance(completion, EngineFailed):  # one of a thousand
                    check_whole(completion, one.request_id)
            assert sum(isinstance(c, EngineFailed) for c in completions) <= 2
            assert site.failures() == injected and injected.total() > 5

    asyncio.run(main())


def test_a_server_that_dies_with_its_requests():
    async def main():
        async with Site(always("hang"), always(None)) as site:
            dying, other = site.servers
            asked = [request(prompt=(3, i)) for i in range(30)]
            tasks = [asyncio.create_task(site.engine.generate(one)) for one in asked]
            await site.until(lambda: len(dying.running) + len(other.generated()) == 30)
            assert dying.running
            await dying.stop()
            for one, completion in zip(asked, await asyncio.gather(*tasks), strict=True):
                check_whole(completion, one.request_id)
            await site.until(lambda: site.figures()["workers_dead"] == 1)
            before = len(dying.generated())
            await asyncio.gather(*(site.generate(prompt=(3, i)) for i in range(30)))
            assert len(dying.generated()) == before, "the dead are sent nothing"
            # It comes back with the weights that it was started with.
            dying.fault, dying.version, site.sync.failing = always(None), "default", {dying.url: "no room"}
            await dying.start()
            await site.until(lambda: dying.url in site.sync.caught_up)
            await asyncio.gather(*(site.generate(prompt=(3, i)) for i in range(30)))
            assert len(dying.generated()) == before, "stale"
            site.sync.failing = {}
            await site.served_again(dying)
            await asyncio.gather(*(site.generate(prompt=(3, i)) for i in range(30)))
            assert len(dying.generated()) > before and dying.version == "0"

    asyncio.run(main())


def test_a_host_that_vanishes_answers_nothing_at_all():
    async def main():
        async with Site(always("hang"), always(None), probe_timeout=0.05, health={"dead_sec": 60}) as site:
            gone, other = site.servers
            asked = [request(prompt=(3, i)) for i in range(12)]
            tasks = [asyncio.create_task(site.engine.generate(one)) for one in asked]
            await site.until(lambda: gone.running)
            gone.silent.set()
            for one, completion in zip(asked, await asyncio.gather(*tasks), strict=True):
                check_whole(completion, one.request_id)
            assert site.engine._fleet.state(gone.url) == "dead"
            assert set(site.failures()) == {"no_progress"}, "nobody waited for the end of request_sec"

    asyncio.run(main())


def test_no_server_is_one_clear_error():
    async def main():
        async with Site(always("hang"), always("hang"), limits={"lost_sec": 0.2}) as site:
            tasks = [asyncio.create_task(site.generate(prompt=(3, i))) for i in range(6)]
            await site.until(lambda: sum(len(server.running) for server in site.servers) == 6)
            for server in site.servers:
                await server.stop()
            errors = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(error) for error in errors} == {FleetLost}
            assert all(url in str(errors[0]) for url in site.urls) and "dead" in str(errors[0])
            with pytest.raises(FleetLost):
                await site.generate()

    asyncio.run(main())


def test_servers_that_never_came():
    async def main():
        async with Site(limits={"lost_sec": 0.2}, start=False) as site:
            site.urls = ["http://127.0.0.1:9"]
            await site.engine.update_weights([("a", None)], 0)
            assert site.sync.pushed == [([], [("a", None)], 0, False)], "a collective: consumed all the same"
            with pytest.raises(FleetLost, match="127.0.0.1:9 dead"):
                await site.generate()

    asyncio.run(main())


def test_no_weights_no_samples():
    async def main():
        async with Site(always(None), start=False) as site:
            with pytest.raises(EngineFailed, match="no weights"):
                await site.generate()

    asyncio.run(main())


def test_what_a_server_would_not_survive_is_not_sent():
    async def main():
        async with Site(always(None)) as site:
            for wrong in (
                {"prompt": ()}, {"prompt": (3, VOCAB_SIZE)}, {"prompt": (-1,)}, {"prompt": (3,) * 60, "new": 5},
                {"prompt": (3,) * 58, "new": 1}, {"new": 0}, {"rid": "1"}, {"rid": "A" * 32},
            ):  # fmt: skip
                with pytest.raises(RequestRefused):
                    await site.generate(**wrong)
            assert site.servers[0].generated() == [] and site.failures() == {}
            await site.generate(prompt=(3,) * 57, new=7)

    asyncio.run(main())


def test_a_refused_request_is_not_tried_again():
    async def main():
        async with Site(always("status 400"), always("status 400")) as site:
            with pytest.raises(RequestRefused, match="as told"):
                await site.generate()
            assert site.failures() == {"refused": 1} and site.figures()["workers_healthy"] == 2

    asyncio.run(main())


def test_what_is_asked_of_a_server():
    async def main():
        bodies = []
        async with Site(lambda body: bodies.append(body)) as site:
            await site.generate(temperature=0.5, top_p=0.9, prompt=(3,) * 57, new=7)
            (body,) = bodies
            asked = body["sampling_params"]
            assert body["input_ids"] == [3] * 57 and body["return_logprob"] and "stream" not in body
            assert asked["stop_token_ids"] == [EOS] and asked["temperature"] == 0.5 and asked["top_p"] == 0.9
            assert asked["max_new_tokens"] == 5, "SGLang leaves two positions unused"
            assert asked["skip_special_tokens"] is False and asked["top_k"] == -1

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancelled", "aborted", "all aborted"])
def test_a_request_that_is_given_up_leaves_nothing_on_the_server(how):
    async def main():
        async with Site(always("slow"), always("slow")) as site:
            asked = [request(prompt=(3, i)) for i in range(8)]
            tasks = [asyncio.create_task(site.engine.generate(one)) for one in asked]
            await site.until(lambda: sum(len(server.running) for server in site.servers) == 8)
            if how == "cancelled":
                for task in tasks:
                    task.cancel()
            else:
                await site.engine.abort(None if how == "all aborted" else [one.request_id for one in asked])
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            await site.until(lambda: sum(name == "abort" for name, _, _ in site.events) == 8)
            assert {rid for name, _, rid in site.events if name == "abort"} == {one.request_id for one in asked}
            await site.until(lambda: not any(server.running for server in site.servers))
            if how == "cancelled":
                assert {type(end) for end in ends} == {asyncio.CancelledError}
            else:
                assert {type(end) for end in ends} == {RequestAborted}
                assert [end.request_id for end in ends] == [one.request_id for one in asked]
                assert ends[0].partial.token_ids.tolist() == TOKENS[:2]
            assert site.failures() == {} and site.figures()["retries"] == 0

    asyncio.run(main())


def test_an_abort_that_is_not_answered_is_not_waited_for():
    async def main():
        async with Site(always("hang"), health={"dead_sec": 60}, limits={"abort_sec": 0.1}) as site:
            asked = request()
            task = asyncio.create_task(site.engine.generate(asked))
            await site.until(lambda: site.servers[0].running)
            await site.engine.abort([asked.request_id])
            with pytest.raises(RequestAborted):
                await task

    asyncio.run(main())


def test_a_waiting_request_can_be_aborted():
    async def main():
        async with Site(always(None)) as site:
            await site.servers[0].stop()
            site.engine._fleet.silent(site.urls[0], 1000, 0)
            tasks = [asyncio.create_task(site.generate()) for _ in range(3)]
            await site.until(lambda: len(site.engine._waiters) == 3)
            tasks[0].cancel()
            await site.engine.abort()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(end) for end in ends] == [asyncio.CancelledError, RequestAborted, RequestAborted]

    asyncio.run(main())


def test_a_server_that_does_not_take_new_weights_is_left_out_until_it_does():
    async def main():
        async with Site(always(None), always(None)) as site:
            bad, good = site.servers
            site.sync.failing = {bad.url: "no room"}
            bad.version = "1"  # it may even say that it has them
            await site.engine.update_weights(iter([("a", 1), ("b", 2)]), 1)
            assert site.sync.pushed[-1] == ([bad.url, good.url], [("a", 1), ("b", 2)], 1, False)
            assert site.engine.weight_version == 1 and site.figures()["sync_sec"] == 0.5
            asked = len(bad.generated())
            completions = await asyncio.gather(*(site.generate(prompt=(3, i)) for i in range(16)))
            assert {c.weight_spans for c in completions} == {(WeightSpan(1, 0, 4),)}
            assert len(bad.generated()) == asked
            site.sync.failing = {}
            await site.served_again(bad)

    asyncio.run(main())


def test_a_server_that_was_away_and_has_the_newest_weights_needs_no_update():
    async def main():
        async with Site(always(None)) as site:
            server = site.servers[0]
            site.sync.failing = {server.url: "only with the next weights"}  # as by broadcast
            await server.stop()
            await site.until(lambda: site.figures()["workers_dead"] == 1)
            await server.start()
            await site.served_again(server)
            assert site.sync.caught_up == []

    asyncio.run(main())


def test_a_pause_for_new_weights_is_no_silence():
    async def main():
        async with Site(always("slow"), probe_timeout=0.05, asynchronous=True) as site:
            server = site.servers[0]
            task = asyncio.create_task(site.generate())
            await site.until(lambda: server.running)
            site.sync.hold = asyncio.Event()
            server.silent.set()  # its probes hang, as they may while weights change
            update = asyncio.create_task(site.engine.update_weights([], 1))
            await site.until(lambda: len(site.sync.pushed) == 2)
            assert site.sync.pushed[-1][3] is True
            await asyncio.sleep(0.4)  # twice what would be its death
            assert site.engine._fleet.state(server.url) == "healthy" and not task.done()
            server.silent.clear()
            site.sync.hold.set()
            await update
            assert site.engine._fleet.servable() == site.urls
            await site.engine.abort()
            with pytest.raises(RequestAborted):
                await task

    asyncio.run(main())


def test_an_engine_that_does_not_control_waits_for_the_servers_word():
    async def main():
        async with Site(always(None), weight_sync=None, start=False) as site:
            server = site.servers[0]
            consumed = []
            await site.engine.update_weights((consumed.append(i) for i in range(3)), 4)
            assert consumed == [0, 1, 2]
            task = asyncio.create_task(site.generate())
            await site.until(lambda: site.figures()["workers_stale"] == 1)
            assert server.generated() == []
            server.version = "4"
            assert (await task).weight_spans == (WeightSpan(4, 0, 4),)

    asyncio.run(main())


def test_weights_that_others_bring_may_take_longer_than_a_lost_fleet():
    async def main():
        async with Site(always(None), weight_sync=None, start=False, limits={"lost_sec": 0.1}) as site:
            server = site.servers[0]
            await site.engine.update_weights([], 4)
            task = asyncio.create_task(site.generate())
            await site.until(lambda: site.figures()["workers_stale"] == 1)
            await asyncio.sleep(0.5)  # five times as long
            assert not task.done()
            server.version = "4"
            assert (await task).weight_spans == (WeightSpan(4, 0, 4),)

    asyncio.run(main())


def test_a_full_server_that_makes_tokens_is_not_lost():
    async def main():
        async with Site(always("slow"), limits={"lost_sec": 0.2}) as site:
            server = site.servers[0]
            task = asyncio.create_task(site.generate())
            await site.until(lambda: server.running)
            server.hanging = 1  # a trial has to wait for room
            site.engine._fleet.failed(server.url, FailureKind.BROKEN_OFF, "why", 0)
            await asyncio.sleep(0.8)  # four times as long
            assert not task.done() and site.figures()["workers_suspect"] == 1
            await site.engine.abort()
            with pytest.raises(RequestAborted) as aborted:
                await task
            assert aborted.value.partial.token_ids.tolist() == TOKENS[:2]

    asyncio.run(main())


@pytest.mark.parametrize("controls", [True, False])
def test_addresses_that_cannot_be_read_at_the_start_are_told_when_the_weights_are_through(controls):
    async def main():
        async with Site(start=False, **({} if controls else {"weight_sync": None})) as site:

            def addresses():
                raise OSError("stale file handle")

            site.engine._overseer._addresses = addresses
            consumed = []
            await site.engine.update_weights((consumed.append(i) for i in range(3)), 0)
            assert consumed == [0, 1, 2], "a collective"
            with pytest.raises(OSError, match="stale file handle"):
                await site.generate()

    asyncio.run(main())


@pytest.mark.parametrize("error", [OSError("stale file handle"), ValueError("line 2: half an address")])
def test_addresses_that_cannot_be_read_for_a_while_cost_nothing(error):
    async def main():
        reads = []
        async with Site(always(None)) as site:

            def addresses():
                reads.append(len(reads))
                raise error

            site.engine._overseer._addresses = addresses
            await site.until(lambda: len(reads) > 2)
            await site.generate()
            other = await FakeServer(version="0", events=site.events).start()
            site.servers.append(other)
            site.engine._overseer._addresses = lambda: [other.url]
            await site.served_again(other)

    asyncio.run(main())


def test_an_update_that_is_cancelled_before_it_began_takes_all_tensors():
    async def main():
        async with Site(always(None), start=False, health={"start_sec": 30}) as site:
            site.servers[0].silent.set()
            consumed = []
            update = asyncio.create_task(site.engine.update_weights((consumed.append(i) for i in range(3)), 0))
            await site.until(lambda: site.figures()["workers_starting"] == 1)
            update.cancel()
            with pytest.raises(asyncio.CancelledError):
                await update
            assert consumed == [0, 1, 2] and site.sync.pushed == []

    asyncio.run(main())


@pytest.mark.parametrize("at_start", [True, False])
def test_other_keys_end_a_run_at_its_start_and_leave_a_server_out_later(at_start):
    async def main():
        async with Site(always(None), always(None), start=not at_start) as site:
            wrong, right = site.servers
            if not at_start:
                await site.generate()
            wrong.refusing = True
            if at_start:
                await site.engine.update_weights([], 0)
                with pytest.raises(ValueError, match="401.*GFT_SGLANG_API_KEY"):
                    await site.generate()
                return
            await site.until(lambda: site.figures()["workers_dead"] == 1)
            await asyncio.gather(*(site.generate(prompt=(3, i)) for i in range(8)))
            assert len(right.generated()) >= 8

    asyncio.run(main())


def test_a_server_that_ends_responses_elsewhere_ends_the_run():
    async def main():
        model = ModelFacts(vocab_size=VOCAB_SIZE, max_positions=64, eos_token_ids={2})
        async with Site(always(None), model=model) as site:
            with pytest.raises(
                ValueError, match=r"ends responses at token 1, and the end tokens of this run are \[2\]"
            ):
                await site.generate()

    asyncio.run(main())


def test_log_probs_of_another_distribution_end_the_run():
    async def main():
        async with Site(always(None), start=False) as site:
            site.servers[0].uniform = False
            await site.engine.update_weights([], 0)
            with pytest.raises(ValueError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
                await site.generate()

    asyncio.run(main())


def test_servers_come_and_go():
    async def main():
        async with Site(always("slow"), always(None)) as site:
            leaving, staying = site.servers
            site.urls = [leaving.url]
            await site.until(lambda: list(site.engine._fleet.workers) == [leaving.url])
            asked = request()
            task = asyncio.create_task(site.engine.generate(asked))
            await site.until(lambda: leaving.running)
            site.urls = [staying.url]
            check_whole(await task, asked.request_id)
            assert staying.generated()

    asyncio.run(main())


def test_through_a_router_control_goes_straight_to_the_servers():
    async def main():
        router = await FakeServer(once("NaN"), version="0").start()
        async with Site(always("status 500"), always("status 500"), router_url=router.url, start=False) as site:
            router.events = site.events
            await site.engine.update_weights([], 0)
            asked = request()
            check_whole(await site.engine.generate(asked), asked.request_id)
            assert len(router.generated()) == 2 and all(not server.generated() for server in site.servers)
            aborts = {(url, rid) for name, url, rid in site.events if name == "abort"}
            assert aborts == {(url, asked.request_id) for url in site.urls}, "nobody knows which server has it"
            faults = ["late", "hang"]
            router.fault = lambda body: faults.pop()
            asked = request()  # the second try has as long as the first
            check_whole(await site.engine.generate(asked), asked.request_id)
            assert site.failures() == {"malformed": 1, "no_progress": 1}
            await router.stop()

    asyncio.run(main())


def test_servers_without_their_memory_are_left_alone_until_the_next_weights():
    async def main():
        async with Site(always(None), always(None)) as site:
            await site.generate()
            await site.engine.release_memory()
            assert sorted(site.sync.released) == sorted(site.urls)
            for _ in range(3):
                await asyncio.sleep(0.05)  # some probes' time
                assert site.figures()["workers_healthy"] == 2 and not site.sync.caught_up, "nobody looks"
            site.engine._fleet.failed(site.urls[0], FailureKind.SERVER_ERROR, "why", 0)  # an answer that came late
            trials = [event for event in site.events if event[0] == "trial"]
            await asyncio.sleep(0.1)
            assert site.figures()["workers_suspect"] == 1
            assert [event for event in site.events if event[0] == "trial"] == trials, "it would end itself"
            await site.engine.update_weights([], 1)
            completion = await site.generate()
            assert completion.weight_spans == (WeightSpan(1, 0, 4),)

    asyncio.run(main())


def test_many_requests_do_not_run_out_of_files():
    async def main():
        server = await FakeServer().start()
        async with Http(Keys()) as http:
            answers = await asyncio.gather(*(http.call(server.url, "/v1/loads", timeout_sec=30) for _ in range(100)))
        assert len(answers) == 100
        await server.stop()

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, before[1]))
    try:
        asyncio.run(main())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_figures():
    async def main():
        async with Site(always(None), always(None)) as site:
            await asyncio.gather(*(site.generate(prompt=(3, i)) for i in range(20)))
            figures = site.figures()
            assert figures["workers_healthy"] == 2 and figures["weight_version"] == 0
            tokens = [n for name, n in figures.items() if name.startswith("tokens/127.0.0.1:")]
            assert len(tokens) == 2 and min(tokens) > 0 and sum(tokens) == 20 * len(TOKENS)
            assert all(isinstance(figure, float) for figure in figures.values())

    asyncio.run(main())


@pytest.mark.parametrize(("tokens", "ended"), [([5, 6, EOS], "stop"), ([5] * 8, "length"), ([5, 6], None)])
def test_an_abort_that_came_after_the_end_costs_nothing(tokens, ended):
    asked = request()
    meta = {
        "id": asked.request_id, "completion_tokens": len(tokens), "finish_reason": {"type": "abort"},
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        "weight_versions": [{"version": "0", "start": 0, "end": len(tokens)}],
    }  # fmt: skip

    class Answers:
        async def call(self, *_, **__):
            return {"output_ids": tokens, "meta_info": meta}

    answer = client.generate(
        Answers(), "http://a:1", asked, MODEL, rid=asked.request_id, oldest_version=0, timeout_sec=1
    )
    if ended is None:
        with pytest.raises(RequestAborted) as aborted:
            asyncio.run(answer)
        assert aborted.value.partial.token_ids.tolist() == tokens
    else:
        assert asyncio.run(answer).finish_reason == ended


def test_figures_of_several_engines():
    one = {"tokens/a:1": 3.0, "failures/stale": 1.0, "retries": 2.0, "in_flight": 4.0, "running": 9.0, "sync_sec": 0.5}
    other = {"tokens/a:1": 5.0, "tokens/b:1": 1.0, "retries": 1.0, "in_flight": 0.0, "running": 8.0, "sync_sec": 0.0}
    assert figures_of_all([one, {}, other]) == {
        "tokens/a:1": 8.0, "tokens/b:1": 1.0, "failures/stale": 1.0, "retries": 3.0, "in_flight": 4.0,
        "running": 9.0, "sync_sec": 0.5,
    }  # fmt: skip
