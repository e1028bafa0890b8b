"""The states of a server: every event in every state, against a table and against rules that hold whatever happens."""

import random
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from gft_megatron.rollout.sglang import fleet
from gft_megatron.rollout.sglang.fleet import HealthLimits, State
from gft_megatron.rollout.sglang.http import FailureKind
from gft_megatron.rollout.sglang.routing import choose_worker, prompt_key

LIMITS = HealthLimits(suspect_sec=10, dead_sec=30, stale_dead_sec=600, start_sec=300, misses=3, failures=3)
EXPECTED = "7"
STARTING, STALE, SUSPECT, HEALTHY, DEAD = State

# The eight ways a server can be in one of the five states: proved and doubted count too.
KINDS_OF_WORKERS = {
    "starting": {"state": STARTING},
    "stale": {"state": STALE, "version": "6"},
    "stale, proved": {"state": STALE, "version": "6", "proved": True},
    "doubted": {"state": STALE, "version": EXPECTED, "proved": True, "doubted": True},
    "suspect": {"state": SUSPECT, "version": EXPECTED},
    "healthy": {"state": HEALTHY, "version": EXPECTED, "proved": True},
    "dead": {"state": DEAD, "version": EXPECTED},
    "dead, doubted": {"state": DEAD, "version": EXPECTED, "doubted": True},
}

GUILTY = [
    FailureKind.UNREACHABLE, FailureKind.TIMED_OUT, FailureKind.NO_PROGRESS, FailureKind.BROKEN_OFF,
    FailureKind.SERVER_ERROR, FailureKind.MALFORMED,
]  # fmt: skip
INNOCENT = [FailureKind.OVERLOADED, FailureKind.REFUSED, FailureKind.ABORTED]

EVENTS = {
    "told the newest": lambda w: w.answered(EXPECTED, EXPECTED, 100),
    "told older": lambda w: w.answered("6", EXPECTED, 100),
    "told default": lambda w: w.answered("default", EXPECTED, 100),
    "told, none expected": lambda w: w.answered("default", None, 100),
    "took the newest": lambda w: w.acknowledged(EXPECTED, EXPECTED, 100),
    "took older": lambda w: w.acknowledged("6", EXPECTED, 100),
    "update failed": lambda w: w.rejected("why", 100),
    "newer expected": lambda w: w.expects("8", 100),
    "the same expected": lambda w: w.expects(EXPECTED, 100),
    "completed": lambda w: w.completed(100),
    **{f"failed, {kind}": lambda w, kind=kind: w.failed(kind, "why", LIMITS, 100) for kind in FailureKind},
    "unanswered": lambda w: w.unanswered("why", LIMITS, 100),
    "unanswered for long": lambda w: w.unanswered("why", LIMITS, 300),
    "third unanswered": lambda w: replace(w, misses=2).unanswered("why", LIMITS, 100),
    **{f"third failed, {kind}": lambda w, kind=kind: replace(w, failures=2).failed(kind, "why", LIMITS, 100)
       for kind in FailureKind},
    "silent 9 s": lambda w: w.silent(9, LIMITS, 100),
    "silent 10 s": lambda w: w.silent(10, LIMITS, 100),
    "silent 30 s": lambda w: w.silent(30, LIMITS, 100),
    "silent 600 s": lambda w: w.silent(600, LIMITS, 100),
}  # fmt: skip

# Columns: starting, stale, stale and proved, doubted, suspect, healthy, dead, dead and doubted.
A, T, U, H, D = State
TABLE = {
    "told the newest": (U, U, H, T, U, H, T, T),
    "told older": (T, T, T, T, T, T, T, T),
    "told default": (T, T, T, T, T, T, T, T),
    "told, none expected": (T, T, T, T, T, T, T, T),
    "took the newest": (U, U, H, H, U, H, T, T),
    "took older": (T, T, T, T, T, T, T, T),
    "update failed": (A, T, T, T, T, T, D, D),
    "newer expected": (A, T, T, T, T, T, D, D),
    "the same expected": (A, T, T, T, U, H, D, D),
    "completed": (A, T, T, T, H, H, D, D),
    **{f"failed, {kind}": (A, T, T, T, U, U, D, D) for kind in GUILTY},
    **{f"third failed, {kind}": (A, D, D, D, D, D, D, D) for kind in GUILTY},
    **{f"{which}, {kind}": (A, T, T, T, U, H, D, D) for kind in INNOCENT for which in ("failed", "third failed")},
    **{f"{which}, {FailureKind.STALE}": (A, T, T, T, T, T, D, D) for which in ("failed", "third failed")},
    "unanswered": (A, T, T, T, U, U, D, D),
    "unanswered for long": (D, T, T, T, U, U, D, D),
    "third unanswered": (A, D, D, D, D, D, D, D),
    "silent 9 s": (A, T, T, T, U, H, D, D),
    "silent 10 s": (A, T, T, T, U, U, D, D),
    "silent 30 s": (A, T, T, T, D, D, D, D),
    "silent 600 s": (A, D, D, D, D, D, D, D),
}  # fmt: skip


def check_table(tested):
    assert set(TABLE) == set(EVENTS)
    for event, states in TABLE.items():
        for (name, facts), state in zip(KINDS_OF_WORKERS.items(), states, strict=True):
            worker = tested.Worker("http://w", 0.0, **{**facts, "state": tested.State(facts["state"])})
            after = EVENTS[event](worker)
            assert after.state == state, f"{name}, {event}: {after.state}, {state} was expected"
            assert after.since == (0 if after.state == facts["state"] else 300 if "for long" in event else 100)


def check_lives(tested):
    """Random lives. Whatever happens, a server serves only if what is said here happened since its last death."""
    draw = random.Random(5)
    events = [name for name in EVENTS if name != "newer expected"]  # these lives have one version
    for _ in range(100):
        worker = tested.Worker("http://w", 0.0)
        told = doubted = completed = False
        for _ in range(40):
            name = draw.choice(events)
            before, worker = worker, EVENTS[name](worker)
            if name in ("told the newest", "took the newest") and before.state != DEAD:
                told = True
            if name.startswith(("told older", "told default", "told, none", "took older")) or name.endswith("stale"):
                told = False
            if name.startswith("took"):
                doubted = False
            if name == "update failed":
                doubted = True
            if name == "completed" and before.state not in (DEAD, STARTING):
                completed = True
            if name.endswith(tuple(GUILTY)) or "unanswered" in name:
                completed = False
            if worker.state == DEAD:
                told = completed = False
            assert before.state != DEAD or worker.state in (DEAD, STALE), "the dead have to come back stale"
            if worker.state == HEALTHY:
                assert told and completed and not doubted and worker.version == EXPECTED, name


def check_sequences(tested):
    def after(*events, **facts):
        worker = tested.Worker("http://w", 0.0, **facts)
        for event in events:
            worker = EVENTS[event](worker)
        return worker

    assert after("told the newest", "completed").state == HEALTHY
    dead = ("told the newest", "completed", *["failed, server_error"] * 3)
    assert after(*dead).state == DEAD
    assert after(*dead, "told the newest", "the same expected").state == STALE, "another process may live there"
    assert after(*dead, "told the newest", "told the newest").state == SUSPECT
    assert after(*dead, "told the newest", "completed").state == STALE
    assert after(*dead, "told the newest", "told the newest", "completed").state == HEALTHY
    assert after("told the newest", "unanswered", "told the newest", "unanswered", "unanswered").state == SUSPECT
    answering = ("told the newest", "unanswered", "unanswered", "completed", "unanswered")
    assert after(*answering).state == SUSPECT, "a response is more than an answer to a probe"
    failed = "failed, malformed"
    assert after("told the newest", failed, failed, "completed", failed, failed).state == SUSPECT
    assert after("update failed", "told the newest").state == STALE, "while it starts, too"
    assert after("told the newest", "completed", "failed, stale", "the same expected").state == STALE
    assert after("told the newest", "completed", "silent 10 s", "told older", "told the newest").state == SUSPECT
    assert after("told the newest", failed).last_failure == "why"


def check(tested):
    check_table(tested)
    check_lives(tested)
    check_sequences(tested)


def test_every_event_in_every_state():
    check_table(fleet)


def test_rules_hold_in_random_lives():
    check_lives(fleet)


def test_what_two_events_in_a_row_do():
    check_sequences(fleet)


# Each takes one protection away, or weakens it.
MUTATIONS = [
    ("if self.state is State.DEAD:\n            # It", "if False:\n            # It"),
    ("failures=0, version=None)._to(State.STALE", "failures=0, version=None)._to(State.HEALTHY"),
    ("if self.doubted or version != expected:", "if version != expected:"),
    ("if self.doubted or version != expected:", "if self.doubted:"),
    ("return known._to(State.HEALTHY if self.proved else State.SUSPECT, now)", "return known._to(State.HEALTHY, now)"),
    ("worker = replace(self, doubted=True, last_failure=reason)", "worker = self"),
    ("if self.doubted or self.version != expected:", "if self.version != expected:"),
    ("if self.doubted or self.version != expected:", "if self.doubted:"),
    ("if self.state in (State.DEAD, State.STARTING):  # late", "if False:  # late"),
    ("replace(self, proved=True, failures=0, misses=0)", "replace(self, proved=True, failures=0)"),
    ("return proved if self.state is State.STALE else proved._to", "return proved._to"),
    ("if kind in _INNOCENT or self.state is State.DEAD:", "if self.state is State.DEAD:"),
    ("if kind in _INNOCENT or self.state is State.DEAD:", "if kind in _INNOCENT:"),
    ("if kind is FailureKind.STALE:", "if False:"),
    ("worker = replace(worker, proved=False, failures=self.failures + 1)", "worker = replace(worker, proved=False)"),
    ("worker = replace(worker, proved=False, failures", "worker = replace(worker, failures"),
    ("return worker if self.state is State.STALE else worker._to(State.SUSPECT, now)\n\n    def unanswered",
     "return worker\n\n    def unanswered"),
    ("replace(self, proved=False, misses=self.misses + 1", "replace(self, misses=self.misses + 1"),
    ("if now - self.since >= limits.start_sec else worker", "if False else worker"),
    ("if self.state is State.DEAD or worker.misses >= limits.misses:", "if self.state is State.DEAD:"),
    ("limits.stale_dead_sec if self.state is State.STALE else limits.dead_sec", "limits.dead_sec"),
    ("worker = replace(self, proved=False, last_failure=f", "worker = replace(self, last_failure=f"),
    ("if seconds >= limit:\n            return worker._to(State.DEAD, now)", "if False:\n            return worker"),
]  # fmt: skip


def copy_with(monkeypatch, old, new):
    copy = types.ModuleType("copy_of_fleet")
    monkeypatch.setitem(sys.modules, "copy_of_fleet", copy)  # dataclasses look there
    exec(Path(fleet.__file__).read_text().replace(old, new), copy.__dict__)
    return copy


def test_an_unchanged_copy_passes(monkeypatch):
    check(copy_with(monkeypatch, "", ""))


@pytest.mark.parametrize("mutation", range(len(MUTATIONS)))
def test_without_a_protection_a_check_fails(mutation, monkeypatch):
    old, new = MUTATIONS[mutation]
    assert old in Path(fleet.__file__).read_text(), f"the mutation no longer fits the code: {old}"
    with pytest.raises(AssertionError):
        check(copy_with(monkeypatch, old, new))


def pair_of(limits=LIMITS):
    both = fleet.Fleet(limits)
    both.listed(["http://a", "http://b"], 0)
    both.weights_expected("0", 0)
    for url in both.workers:
        both.answered(url, "0", 1)
        both.completed(url, 2)
    return both


def test_new_weights_make_everybody_stale_until_they_are_acknowledged():
    both = pair_of()
    assert both.servable() == ["http://a", "http://b"]
    both.weights_expected("1", 3)
    assert both.servable() == []
    both.acknowledged("http://a", "1", 4)
    both.rejected("http://b", "no room", 4)
    assert both.servable() == ["http://a"] and both.reachable() == ["http://a", "http://b"]
    both.answered("http://b", "1", 5)
    assert both.servable() == ["http://a"], "what it tells counts nothing"
    both.acknowledged("http://b", "1", 6)
    assert both.servable() == ["http://a", "http://b"]


def test_nothing_is_concluded_from_silence_while_paused():
    both = pair_of()
    both.paused = True
    for _ in range(5):
        both.unanswered("http://a", "nothing", 10)
        both.silent("http://b", 1000, 10)
    assert both.servable() == ["http://a", "http://b"]
    both.failed("http://a", FailureKind.BROKEN_OFF, "gone", 11)
    assert both.servable() == ["http://b"], "a broken connection is no silence"
    both.paused = False
    both.silent("http://b", 1000, 12)
    assert both.servable() == [] and both.state("http://b") is DEAD


def test_servers_come_and_go():
    both = pair_of()
    assert both.listed(["http://b", "http://c"], 5) == ["http://a"]
    assert both.state("http://c") is STARTING and both.state("http://a") is DEAD
    both.completed("http://a", 6)  # late answers of one that is no longer listed
    both.failed("http://a", FailureKind.MALFORMED, "", 6)
    assert list(both.workers) == ["http://b", "http://c"]


def test_hope():
    both = pair_of()
    assert not both.hopeless(5)
    for url in both.workers:
        both.silent(url, 30, 5)
    assert both.hopeless(5)
    both.listed([*both.workers, "http://c"], 6)
    assert not both.hopeless(7), "one is starting"
    assert both.hopeless(6 + LIMITS.start_sec)
    both.listed([], 7)
    assert both.hopeless(7)
    assert both.describe() == "none is listed"


def test_weights_that_are_on_their_way():
    both = pair_of()
    assert not both.awaits_weights(5)
    both.weights_expected("1", 5)
    both.rejected("http://a", "no room", 5)
    assert both.awaits_weights(5 + 599) and not both.awaits_weights(5 + 600)
    both.rejected("http://b", "no room", 6)
    assert not both.awaits_weights(7), "nobody brings them"


URLS = [f"http://10.0.0.{i}:30000" for i in range(8)]


def route(num_prompts, samples, urls=URLS):
    """Each prompt's servers; nothing finishes meanwhile."""
    loads = dict.fromkeys(urls, 0)
    placed = []
    for prompt in range(num_prompts):
        chosen = [choose_worker(loads, prompt_key((prompt, 1)))]
        loads[chosen[0]] += 1
        for _ in range(samples - 1):
            chosen.append(choose_worker(loads, prompt_key((prompt, 1))))
            loads[chosen[-1]] += 1
        placed.append(chosen)
    return placed, loads


def test_samples_of_a_prompt_stay_together_and_no_server_has_too_much():
    placed, loads = route(200, 8)
    assert max(loads.values()) <= 1.25 * 200 + 9 and min(loads.values()) > 100
    assert sum(len(set(chosen)) == 1 for chosen in placed) > 150
    assert route(200, 8)[0] == placed


def test_another_server_only_moves_its_own_prompts():
    idle = dict.fromkeys(URLS, 0)
    keys = [prompt_key((i,)) for i in range(400)]
    before = [choose_worker(idle, key) for key in keys]
    without = [choose_worker(dict.fromkeys(URLS[1:], 0), key) for key in keys]
    assert all(b == w or b == URLS[0] for b, w in zip(before, without, strict=True))
    assert 20 < before.count(URLS[0]) < 90


def test_a_server_that_failed_a_request_is_avoided_while_there_is_another():
    key = prompt_key((1, 2))
    first = choose_worker(dict.fromkeys(URLS, 0), key)
    second = choose_worker(dict.fromkeys(URLS, 0), key, {first})
    assert second != first
    assert choose_worker({first: 0}, key, {first}) == first
    assert choose_worker({first: 500, second: 0}, key, {second}) == first
    assert choose_worker({}, key) is None


def test_a_loaded_server_hands_on():
    key = prompt_key((1, 2))
    first = choose_worker(dict.fromkeys(URLS, 0), key)
    assert choose_worker({**dict.fromkeys(URLS, 0), first: 50}, key) != first
