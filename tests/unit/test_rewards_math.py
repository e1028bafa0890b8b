"""Verdicts of the mathematics reward, and that no answer can hang, crash or starve it unnoticed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from gsm8k_files import MODEL_SOLUTIONS, needs_gsm8k

from gft_megatron.rewards import RewardError
from gft_megatron.rewards import math as math_reward
from gft_megatron.rewards.math import MathReward

T = TypeVar("T")
HANGS = r"\boxed{10^{10^{10}}}"  # SymPy computes the number
GROWS = r"\boxed{2^{3000000000}}"  # 400 MB of binary digits, fast
NEEDS_A_WORKER = (r"\boxed{\frac{2}{4}}", "1/2")

EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    ("1/2", r"\frac12"),
    (r"-\frac{1}{2}", "-0.5"),
    ("0.333333", "1/3"),
    (r"50\%", "0.5"),
    ("2:3", "2/3"),
    ("5.00", "5"),
    ("$1,000$", "1000"),
    ("007", "7"),
    ("18 dollars", "18"),
    ("18", "18 dollars"),
    (r"5\text{ cm}", "5"),
    (r"90^\circ", "90"),
    ("\u22123", "-3"),
    ("x=5", "5"),
    ("(0,1]", "(0, 1 ]"),
    (r"x \in [0,1]", "[0,1]"),
    ("3<x", "x>3"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\sqrt[3]{8}", "2"),
    (r"3\pi", "9.42477796"),
    ("10^{10}", "10000000000"),
    ("x^2+2x+1", "(x+1)^2"),
    ("ab", "ba"),
    ("i+1", "1+i"),
    (r"\text{(C)}", "C"),
    ("East", "east"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]
DIFFERENT = [
    ("0.33", "1/3"),
    ("5.001", "5"),
    ("-3", "3"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "2"),
    (r"\frac{1}{0}", "5"),
    ("12 apples and 3 pears", "12"),
    ("east", "seat"),
    ("C", "D"),
    ("", "18"),
    (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("{" * 5000 + "5" + "}" * 5000, "5"),
    ("3 " * 5000, "5"),
]


def run(use: Callable[[MathReward], Awaitable[T]], **options: float) -> T:
    """Use a reward in an event loop of its own and close it."""

    async def whole() -> T:
        reward = MathReward(**options)
        try:
            return await use(reward)
        finally:
            await reward.close()

    return asyncio.run(whole())


async def error_of(scoring: Awaitable[float]) -> RewardError:
    with pytest.raises(RewardError) as caught:
        await scoring
    return caught.value


async def the_only_worker(reward: MathReward) -> int:
    """The process id of the worker of a pool of one, after its first answer."""
    assert await reward.score(*NEEDS_A_WORKER, {}) == 1.0
    [worker] = reward._pool._running
    return worker.process.pid


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_verdicts() -> None:
    async def use(reward: MathReward) -> list[float]:
        pairs = EQUAL + DIFFERENT
        return await asyncio.gather(*(reward.score(f"so \\boxed{{{given}}}", label, {}) for given, label in pairs))

    scores = run(use, num_workers=2)
    wrong = [pair for pair, score in zip(EQUAL + DIFFERENT, scores, strict=True) if score != (pair in EQUAL)]
    assert wrong == []


@pytest.mark.parametrize(
    "response, label, score",
    [
        ("The answer is 18 dollars.", "18", 1.0),
        ("so $\\frac{1}{2}$ of it", "0.5", 1.0),
        ("\\frac{1}{2}", "0.5", 1.0),
        ("He buys 3 apples and 4 pears: 7", "7", 1.0),
        ("He buys 3 apples and 4 pears: 7", "3", 0.0),
        ("first \\boxed{3}, then \\boxed{\\frac{8}{2}}", "4", 1.0),
        ("first \\boxed{3}, then \\boxed{\\frac{8}{2}}", "3", 0.0),
    ],
)
def test_answers_in_sentences(response: str, label: str, score: float) -> None:
    assert run(lambda reward: reward.score(response, label, {}), num_workers=1) == score


@needs_gsm8k
def test_agreement_with_gsm8k_model_solutions(record_property: Callable[[str, object], None]) -> None:
    rows = [json.loads(line) for line in MODEL_SOLUTIONS.open()]
    solutions = [(row["ground_truth"], value) for row in rows for value in row.values() if isinstance(value, dict)]
    assert len(solutions) == 4 * 1319

    async def use(reward: MathReward) -> list[float]:
        return await asyncio.gather(*(reward.score(value["solution"], label, {}) for label, value in solutions))

    scores = run(use, num_workers=2)
    agreement = sum(score == value["is_correct"] for score, (_, value) in zip(scores, solutions, strict=True))
    record_property("agreement", agreement / len(solutions))
    assert agreement >= 0.97 * len(solutions)
    assert 0.2 < sum(scores) / len(scores) < 0.8  # both verdicts are common


def test_hanging_answer_is_an_error_and_the_pool_goes_on() -> None:
    async def use(reward: MathReward) -> None:
        pid = await the_only_worker(reward)
        hanging = asyncio.ensure_future(error_of(reward.score(HANGS, "5", {})))
        waiting = asyncio.ensure_future(reward.score(*NEEDS_A_WORKER, {}))
        assert (await hanging).kind == "timeout"
        assert await waiting == 1.0
        assert not is_running(pid)

    run(use, num_workers=1, timeout_sec=2.0)


def test_memory_hog_is_an_error_and_the_pool_goes_on() -> None:
    async def use(reward: MathReward) -> None:
        pid = await the_only_worker(reward)
        error = await error_of(reward.score(GROWS, "5", {}))
        assert error.kind == "crash" and "took more than 134217728 bytes" in str(error)
        assert await reward.score(*NEEDS_A_WORKER, {}) == 1.0
        assert not is_running(pid)

    run(use, num_workers=1, timeout_sec=60.0, max_memory_bytes=2**27)


@pytest.mark.parametrize("sent, kind", [(signal.SIGKILL, "crash"), (signal.SIGSTOP, "timeout")])
def test_worker_lost_in_the_middle_of_an_answer(sent: signal.Signals, kind: str) -> None:
    async def use(reward: MathReward) -> None:
        pid = await the_only_worker(reward)
        scoring = asyncio.ensure_future(error_of(reward.score(HANGS, "5", {})))
        await asyncio.sleep(0.2)
        assert not scoring.done()
        os.kill(pid, sent)
        assert (await scoring).kind == kind
        assert await reward.score(*NEEDS_A_WORKER, {}) == 1.0

    run(use, num_workers=1, timeout_sec=2.0)


def test_worker_lost_while_idle_costs_no_answer() -> None:
    async def use(reward: MathReward) -> None:
        os.kill(await the_only_worker(reward), signal.SIGKILL)
        [worker] = reward._pool._running
        await worker.process.wait()
        assert await reward.score(*NEEDS_A_WORKER, {}) == 1.0

    run(use, num_workers=1)


def test_cancelled_scoring_leaves_no_stale_reply() -> None:
    async def use(reward: MathReward) -> None:
        await the_only_worker(reward)
        scoring = asyncio.ensure_future(reward.score(r"\boxed{\frac{1}{3}}", "1/2", {}))
        await asyncio.sleep(0)
        scoring.cancel()
        assert await reward.score(*NEEDS_A_WORKER, {}) == 1.0

    run(use, num_workers=1)


def test_plain_answers_start_no_process() -> None:
    async def use(reward: MathReward) -> None:
        for response, label, score in [("#### 18", "18", 1.0), ("A: 18.0", "18", 1.0), ("A: 17", "18", 0.0)]:
            assert await reward.score(response, label, {}) == score
        assert not reward._pool._running

    run(use)


def test_workers_die_with_the_pool_and_with_their_parent(tmp_path: Path) -> None:
    pid = run(the_only_worker, num_workers=1)
    assert not is_running(pid)

    program = tmp_path / "parent.py"
    program.write_text(
        "import asyncio, os, signal\n"
        "from gft_megatron.rewards.math import MathReward\n"
        "async def main():\n"
        "    reward = MathReward(num_workers=2, timeout_sec=3)\n"
        f"    await asyncio.gather(*(reward.score(*{NEEDS_A_WORKER!r}, {{}}) for _ in range(2)))\n"
        f"    hangs = asyncio.ensure_future(reward.score({HANGS!r}, '5', {{}}))\n"
        "    await asyncio.sleep(0.5)\n"
        "    assert not hangs.done()\n"
        "    print(*(worker.process.pid for worker in reward._pool._running), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(math_reward.__file__).parents[2])}
    killed = subprocess.run([sys.executable, program], env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    pids = list(map(int, killed.stdout.split()))
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"workers {pids} outlive their parent"
        time.sleep(0.05)


def test_worker_does_not_import_torch() -> None:
    script = Path(math_reward.__file__).with_name("math_worker.py")
    code = f"import runpy, sys; runpy.run_path({str(script)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
