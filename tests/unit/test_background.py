"""Work of an event loop in another thread: its results, its end, and its rest."""

import asyncio
import threading
import time

import pytest

from gft_megatron.rollout.background import BackgroundLoop


@pytest.fixture
def loop():
    started = []
    loop = BackgroundLoop(lambda: started.append(threading.current_thread().name))
    yield loop
    loop.close()
    assert started == ["rollout"] and not any(thread.name == "rollout" for thread in threading.enumerate())


def test_results_and_errors_come_back(loop):
    async def give(value):
        await asyncio.sleep(0)
        if isinstance(value, Exception):
            raise value
        return value, threading.current_thread().name

    assert loop.run(give(3)) == (3, "rollout")
    with pytest.raises(ValueError, match="as told"):
        loop.run(give(ValueError("as told")))
    with pytest.raises(TimeoutError, match="its own"):
        loop.wait(loop.submit(give(TimeoutError("its own"))), watch=lambda: None)


def test_the_caller_may_look_while_it_waits(loop):
    go_on = asyncio.Event()

    async def work():
        await go_on.wait()
        return "done"

    async def let_go():
        go_on.set()

    seen = []

    def watch():
        seen.append(threading.current_thread().name)
        loop.run(let_go())

    assert loop.wait(loop.submit(work()), watch) == "done"
    assert seen == [threading.current_thread().name]


def test_an_interrupt_cancels_what_is_waited_for(loop):
    ended = threading.Event()

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.wait(loop.submit(work()), interrupt)
    assert ended.wait(10)


def test_a_start_that_fails_is_told_and_waited_for_by_nobody():
    def fail():
        raise ValueError("no such device")

    with pytest.raises(ValueError, match="no such device"):
        BackgroundLoop(fail)
    assert not any(thread.name == "rollout" for thread in threading.enumerate())


def test_nothing_runs_while_it_is_at_rest(loop):
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0)

    future = loop.submit(tick())
    while not ticks:
        time.sleep(0.001)
    with loop.at_rest():
        before = len(ticks)
        time.sleep(0.05)
        assert len(ticks) == before
    while len(ticks) == before:
        time.sleep(0.001)
    future.cancel()


def test_closing_ends_what_still_runs():
    loop = BackgroundLoop()
    ended = threading.Event()

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    loop.submit(work())
    loop.run(asyncio.sleep(0))
    loop.close()
    loop.close()
    assert ended.is_set()
