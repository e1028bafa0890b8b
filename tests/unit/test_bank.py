"""The ledger of finished groups: cut off, damaged, resumed, compacted and filled up, against a dict that cannot break.

The bytes are read here by a parser of the test's own, written from the format's description.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gft_megatron.groups import Group, GroupKey, Prompt, Sample, Source, WeightSpan
from gft_megatron.rollout.bank import Bank
from gft_megatron.rollout.bank.records import group_record

FINGERPRINT = "f" * 64


@pytest.fixture
def no_fsync(monkeypatch):
    """For tests that kill by copying files: what the page cache holds is what they see."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def group(number: int, length: int = 5) -> Group:
    """Differs in every field with `number`, and has each field in each form."""
    draw = np.random.default_rng(number)
    log_probs = -draw.random(length).astype(np.float32)
    log_probs[0] = np.nan  # a hint
    expert = Sample(
        Source.EXPERT, draw.integers(0, 200_000, length), f"expert {number}\x00\ud800\U0001f600", float("nan"),
        response=number % 3, token_groups=draw.integers(0, 9, length),
    )  # fmt: skip
    own = Sample(
        Source.SELF, draw.integers(0, 200_000, length + 1), "", number / 3, truncated=True,
        rollout_log_probs=log_probs, weight_spans=(WeightSpan(number, 0, 2), WeightSpan(number + 1, 2, length)),
    )  # fmt: skip
    return Group(Prompt(row=number, token_ids=np.zeros(2, np.int64), label=""), (expert, own))


def check_samples(got: tuple[Sample, ...], expected: tuple[Sample, ...]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        for name in ("source", "text", "truncated", "weight_spans", "response"):
            assert getattr(one, name) == getattr(other, name) and type(getattr(one, name)) is type(getattr(other, name))
        assert struct.pack("d", one.reward) == struct.pack("d", other.reward)
        for name in ("token_ids", "rollout_log_probs", "token_groups"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None), name
            if mine is not None:
                assert mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes() and mine.flags.writeable


def key(number: int) -> GroupKey:
    return GroupKey(number // 4, number % 4)


def open_bank(folder, *, at=0, rank=0, num_ranks=1, fingerprint=FINGERPRINT) -> Bank:
    return Bank.open(folder, rank=rank, num_ranks=num_ranks, fingerprint=fingerprint, checkpoint_iteration=at)


def filled(folder, numbers, **options) -> Bank:
    bank = open_bank(folder, **options)
    bank.append([(key(number), group(number)) for number in numbers])
    return bank


def restored(folder, *, length=5, **options) -> set[int]:
    """The numbers of the groups that come back, each compared with what was recorded."""
    bank = open_bank(folder, **options)
    numbers = set()
    for found in list(bank.restored):
        row, samples = bank.take(found)
        assert key(row) == found
        check_samples(samples, group(row, length).samples)
        numbers.add(row)
    assert not bank.restored
    bank.close()
    return numbers


def ledger(folder, rank=0) -> Path:
    return folder / f"rank_{rank:05d}.ledger"


def records(path: Path) -> list[tuple[int, int, int, dict]]:
    """(offset, size, kind, head) of an undamaged file."""
    data, found, offset = path.read_bytes(), [], 0
    while offset < len(data):
        magic, version, kind, _, head, body, crc, frame_crc = struct.unpack_from("<4sBBHIQII", data, offset)
        start, size = offset + 28, 28 + head + body
        assert (magic, version) == (b"\xffGFT", 1)
        assert zlib.crc32(data[offset : offset + 24]) == frame_crc
        assert zlib.crc32(data[start : offset + size]) == crc
        found.append((offset, size, kind, json.loads(data[start : start + head])))
        offset += size
    return found


def test_every_field_comes_back_bit_for_bit(tmp_path):
    filled(tmp_path, range(3)).close()
    assert restored(tmp_path) == {0, 1, 2}
    first = records(ledger(tmp_path))[0]
    assert first[2] == 1 and first[3]["key"] == [0, 0] and first[3]["fingerprint"] == FINGERPRINT


def test_names_are_on_the_disk_before_anything_is_recorded(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    open_bank(tmp_path / "run" / "bank").close()
    assert {str(tmp_path / "run"), str(tmp_path / "run" / "bank")} <= set(synced)


def test_cut_off_anywhere_the_groups_before_are_kept(tmp_path, no_fsync):
    bank = filled(tmp_path / "whole", [])
    for number in range(6):
        bank.append([(key(number), group(number, length=2))])
    data = ledger(tmp_path / "whole").read_bytes()
    ends = [offset + size for offset, size, *_ in records(ledger(tmp_path / "whole"))]
    last = range(ends[-2], len(data) + 1)  # every byte of the last record, and some of the others
    cuts = {*last, *random.Random(1).sample(range(len(data)), 200 - min(len(last), 100))}
    folder = tmp_path / "cut"
    folder.mkdir()
    for cut in cuts:
        ledger(folder).write_bytes(data[:cut])
        bank = open_bank(folder)
        whole = sum(end <= cut for end in ends)
        assert sorted(bank.restored) == [key(number) for number in range(whole)], cut
        torn = cut - ([0, *ends])[whole]
        assert [(damage.size, damage.at_end) for damage in bank.report.damages] == ([(torn, True)] if torn else [])
        assert ("torn tail" in str(bank.report)) == bool(torn)
        assert ledger(folder).stat().st_size == cut - torn
        # The file goes on as if nothing had been there, and once more says nothing of damage.
        bank.append([(key(9), group(9, length=2))])
        bank.close()
        assert restored(folder, length=2) == {*range(whole), 9}
        again = open_bank(folder)
        assert again.report.damages == () and "\n" not in str(again.report)
        again.close()


def test_one_flipped_byte_costs_one_record(tmp_path, no_fsync):
    bank = filled(tmp_path, range(2))
    bank.mark_consumed([key(0)], 1)
    bank.append([(key(2), group(2))])
    bank.mark_dropped({key(3): "failed"})
    bank.append([(key(4), group(4))])
    bank.close()
    data = ledger(tmp_path).read_bytes()
    draw = random.Random(2)
    for hit, (offset, size, kind, head) in enumerate(records(ledger(tmp_path))):
        frame = range(offset, offset + 28)
        for place in [*frame, *draw.sample(range(offset + 28, offset + size), min(20, size - 28)), offset + size - 1]:
            if place - offset in (6, 7):
                continue  # two bytes that say nothing, but are summed
            damaged = bytearray(data)
            damaged[place] ^= 1 << draw.randrange(8)
            ledger(tmp_path).write_bytes(damaged)
            bank = open_bank(tmp_path, at=1)
            expected = {1, 2, 4} - {row for row in [head.get("row")] if kind == 1}
            expected |= {0} if kind == 3 else set()  # without its mark, the group is as if never trained on
            assert {stored.entry.row for stored in bank.restored.values()} == expected, (hit, place - offset)
            assert bank.dropped == ({} if kind == 2 else {key(3): "failed"})
            (damage,) = bank.report.damages
            assert (damage.offset, damage.size) == (offset, size) and damage.at_end == (hit == 5)
            bank.close()


def test_what_a_checkpoint_has_behind_it_is_discarded(tmp_path):
    bank = filled(tmp_path, range(4))
    for number, iteration in ((0, 9), (1, 10), (2, 11)):
        bank.mark_consumed([key(number)], iteration)
    bank.close()
    assert restored(tmp_path, at=10) == {2, 3}
    assert restored(tmp_path, at=11) == {2, 3}  # that a mark was undone is not forgotten
    assert restored(tmp_path, at=9) == {1, 2, 3}
    bank = open_bank(tmp_path, at=9)
    assert (bank.report.restored, bank.report.undone, bank.report.discarded) == (3, 0, 1)
    bank.mark_consumed([key(1)], 10)
    bank.mark_consumed([key(2)], 12)
    bank.close()
    bank = open_bank(tmp_path, at=10)
    assert (bank.report.restored, bank.report.undone, bank.report.discarded) == (2, 1, 2)
    assert "2 groups restored; 1 of them trained on after the checkpoint; 2 discarded" in str(bank.report)
    bank.close()


def test_a_key_marked_again_in_another_order_after_a_restart(tmp_path):
    """The old mark of an undone step must not count again once the step's number is reached a second time."""
    bank = filled(tmp_path, [0])
    bank.mark_consumed([key(0)], 12)
    bank.close()
    bank = open_bank(tmp_path, at=10)
    assert bank.take(key(0)) is not None and bank.take(key(0)) is None
    bank.mark_consumed([key(0)], 15)
    bank.close()
    assert restored(tmp_path, at=13) == {0}


def test_a_dropped_group_stays_dropped_until_a_checkpoint_has_it(tmp_path):
    bank = filled(tmp_path, [0])
    bank.mark_dropped({key(0): "too late", key(1): "no samples"})
    bank.mark_consumed([key(1)], 2)
    bank.close()
    bank = open_bank(tmp_path, at=1)
    assert bank.dropped == {key(0): "too late", key(1): "no samples"} and not bank.restored
    bank.close()
    bank = open_bank(tmp_path, at=1)
    bank.mark_consumed([key(0), key(1)], 2)
    bank.close()
    assert open_bank(tmp_path, at=2).dropped == {}


def test_groups_of_other_settings_are_not_used_nor_lost(tmp_path):
    filled(tmp_path, [0, 1]).close()
    bank = filled(tmp_path, [1, 2], fingerprint="other")
    assert bank.report.other_settings == 2 and not bank.restored
    assert "2 made with other settings" in str(bank.report)
    bank.close()
    assert restored(tmp_path, fingerprint="other") == {1, 2}
    assert restored(tmp_path) == {0}  # the later record of a key is the one that stands


def test_a_ledger_of_another_format_is_named(tmp_path):
    filled(tmp_path, [0]).close()
    data = bytearray(ledger(tmp_path).read_bytes())
    data[4] = 2
    data[24:28] = zlib.crc32(data[:24]).to_bytes(4, "little")
    ledger(tmp_path).write_bytes(data)
    with pytest.raises(ValueError, match=r"rank_00000.ledger holds records of format 2, expected 1.*move the file"):
        open_bank(tmp_path)


def test_more_ranks_and_fewer(tmp_path):
    """Every rank sees what all recorded, whoever they were; a file without an owner goes when it is of no use."""
    for rank, bank in enumerate([open_bank(tmp_path, rank=rank, num_ranks=3) for rank in range(3)]):
        bank.append([(key(number), group(number)) for number in range(rank, 12, 3)])
        bank.mark_consumed([key(rank)], 4)
        bank.close()
    one = open_bank(tmp_path, at=4)
    assert sorted(one.restored) == [key(number) for number in range(3, 12)] and one.report.discarded == 3
    assert all(one.take(key(number)) for number in range(3, 12))
    one.mark_consumed([key(number) for number in range(3, 12)], 5)
    one.compact(4)
    assert ledger(tmp_path, 2).exists()  # the checkpoint of step 4 needs it
    one.compact(5)
    assert not ledger(tmp_path, 1).exists() and not ledger(tmp_path, 2).exists()
    one.close()
    assert restored(tmp_path, at=5) == set()


def test_a_file_without_an_owner_stays_while_its_marks_are_needed(tmp_path):
    """Group 0 lies in rank 0's file, which has too little to forget yet; its mark in rank 1's, which has no owner."""
    filled(tmp_path, range(5)).close()
    first, second = (open_bank(tmp_path, rank=rank, num_ranks=2) for rank in range(2))
    assert second.take(key(0)) is not None
    second.mark_consumed([key(0)], 1)
    first.close()
    second.close()
    for _ in range(2):
        bank = open_bank(tmp_path, at=1)
        assert sorted(bank.restored) == [key(number) for number in range(1, 5)]
        bank.compact(1)
        assert ledger(tmp_path, 1).exists()
        bank.close()
    bank = open_bank(tmp_path, at=1)
    bank.mark_consumed([key(number) for number in range(1, 5)], 2)
    bank.compact(2)
    bank.close()
    bank = open_bank(tmp_path, at=2)
    bank.compact(2)
    assert not ledger(tmp_path, 1).exists() and not bank.restored


def test_what_is_undone_in_another_file_stays_undone(tmp_path):
    """Rank 1's marks of step 2 are undone by rank 0, whose file is then rewritten without what it forgets."""
    first, second = (open_bank(tmp_path, rank=rank, num_ranks=2) for rank in range(2))
    second.append([(key(1), group(1))])
    second.mark_consumed([key(1)], 2)
    first.close()
    second.close()
    bank = filled(tmp_path, [0], at=1)
    bank.mark_consumed([key(0)], 2)
    bank.compact(2)
    bank.close()
    assert restored(tmp_path, at=2) == {1}


def test_marks_of_groups_in_other_files_outlive_a_compaction(tmp_path):
    filled(tmp_path, [0, 1], rank=0, num_ranks=2).close()
    other = open_bank(tmp_path, rank=1, num_ranks=2)
    other.append([(key(7), group(7))])
    assert other.take(key(0)) is not None
    other.mark_consumed([key(0), key(7)], 1)
    other.compact(1)
    assert [kind for _, _, kind, _ in records(ledger(tmp_path, 1))] == [3]
    other.close()
    assert restored(tmp_path, rank=0, num_ranks=2, at=1) == {1}


def test_a_group_whose_file_was_compacted_by_its_owner_is_still_found(tmp_path):
    owner = filled(tmp_path, [0, 1, 2], rank=0, num_ranks=2)
    reader = open_bank(tmp_path, rank=1, num_ranks=2)
    owner.mark_consumed([key(0), key(1)], 1)
    owner.compact(1)
    row, samples = reader.take(key(2))
    assert row == 2
    check_samples(samples, group(2).samples)
    assert reader.take(key(0)) is None


def test_compaction_rewrites_when_half_can_go(tmp_path):
    bank = filled(tmp_path, range(8))
    before = ledger(tmp_path).stat().st_size
    bank.mark_consumed([key(number) for number in range(3)], 1)
    bank.compact(1)
    assert ledger(tmp_path).stat().st_size > before
    bank.mark_consumed([key(number) for number in range(3, 6)], 2)
    bank.compact(1)
    assert ledger(tmp_path).stat().st_size > before  # the second step is ahead of this checkpoint
    bank.compact(2)
    assert [head["row"] for *_, head in records(ledger(tmp_path))] == [6, 7]
    bank.append([(key(8), group(8))])
    bank.mark_consumed([key(6)], 3)
    bank.close()
    assert restored(tmp_path, at=3) == {7, 8}


def test_what_is_behind_every_checkpoint_is_held_nowhere(tmp_path, no_fsync):
    bank = open_bank(tmp_path)
    for step in range(1, 101):
        keys = [GroupKey(step, i) for i in range(4)]
        bank.append([(name, group(0)) for name in keys])
        bank.mark_consumed(keys, step)
        bank.compact(step - 2)
    held = {name: len(value) for name, value in vars(bank).items() if isinstance(value, dict | list)}
    assert max(held.values()) <= 32 and ledger(tmp_path).stat().st_size < 32 * 1024, held
    bank.close()


def in_a_fork(work) -> tuple[int, str]:
    """Exit status and output of a function in a process of its own, which may be killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 1)
        try:
            os.write(1, str(work()).encode())
        finally:  # nothing of pytest's may run twice
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def kill_at_call(number: int) -> None:
    """SIGKILL to this process before the `number`-th call from now on that may change the disk."""
    left = [number]

    def counted(real):
        def call(*arguments, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*arguments, **options)

        return call

    for name in ("fsync", "replace", "ftruncate", "pwrite", "dup2", "open", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("what", ["recovery", "compaction"])
def test_killed_in(tmp_path, what):
    """At each step of it: the next start finds what this one would have found."""
    made = tmp_path / "made"
    bank = filled(made, range(6))
    bank.mark_consumed([key(0), key(1), key(2), key(3)], 1)
    bank.mark_consumed([key(4)], 2)
    bank.close()
    with ledger(made).open("ab") as file:
        file.write(b"\xffGFT torn")
    step, status = 0, None
    while status != 0:
        folder = tmp_path / str(step)
        shutil.copytree(made, folder)

        def work(folder=folder, step=step):
            if what == "recovery":
                kill_at_call(step)
            bank = open_bank(folder, at=1)
            if what == "compaction":
                kill_at_call(step)
                bank.compact(1)

        status, _ = in_a_fork(work)
        assert status in (0, -signal.SIGKILL)
        assert restored(folder, at=1) == {4, 5}, step
        assert restored(folder, at=2) == {4, 5}, step
        assert not list(folder.glob("*.partial"))
        step += 1
    assert step > 3


def test_full_disk_is_named_and_costs_nothing_that_was_recorded(tmp_path):
    large = [(key(number), group(number, length=1000)) for number in range(2, 9)]

    def work():
        bank = filled(tmp_path, [0, 1])
        bank.mark_consumed([key(0)], 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        try:
            bank.append(large)
        except OSError as error:
            bank.append([(key(9), group(9))])
            return error

    _, message = in_a_fork(work)
    assert f"{ledger(tmp_path)}: File too large" in message
    free = int(message.split(" bytes are free")[0].split()[-1])
    assert 0 < free <= shutil.disk_usage(tmp_path).total
    assert [kind for _, _, kind, _ in records(ledger(tmp_path))] == [1, 1, 3, 1]
    assert restored(tmp_path, at=1) == {1, 9}


def test_full_disk_in_a_compaction_leaves_the_file(tmp_path):
    def work():
        bank = filled(tmp_path, range(8))
        bank.mark_consumed([key(number) for number in range(4)], 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            bank.compact(1)
        except OSError as error:
            return error

    _, message = in_a_fork(work)
    assert f"{ledger(tmp_path)}: File too large" in message
    assert len(records(ledger(tmp_path))) == 9 and not list(tmp_path.glob("*.partial"))
    assert restored(tmp_path, at=1) == {4, 5, 6, 7}


def test_what_is_held_in_memory_is_an_index(tmp_path, no_fsync):
    """10,000 groups of 8 x 1,000 tokens are 1.3 GB on the disk: tools/bench_bank.py makes them. Here it is 52 MB."""
    large = Group(group(0).prompt, group(0, length=1000).samples * 4)
    bank = open_bank(tmp_path)
    for first in range(0, 400, 20):
        bank.append([(key(number), large) for number in range(first, first + 20)])
    for first in range(400, 10_000, 400):
        bank.append([(key(number), group(0)) for number in range(first, first + 400)])
    bank.close()
    size = ledger(tmp_path).stat().st_size
    tracemalloc.start()
    bank = open_bank(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(bank.restored) == 10_000 and peak < 10e6 < size / 4, (peak, size)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 11), min_size=1, max_size=3)),
        st.tuples(st.just("drop"), st.integers(0, 11)),
        st.tuples(st.just("consume"), st.lists(st.integers(0, 11), min_size=1, max_size=4)),
        st.tuples(st.just("save"), st.just(None)),
        st.tuples(st.just("kill"), st.tuples(st.integers(1, 3), st.integers(0, 2), st.floats(0, 1))),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_any_history_against_a_dict(operations, no_fsync, tmp_path_factory):
    """Append, drop, train, save, compact, kill within a write and start again on another number of ranks, in any order.

    The dict knows what each key holds and which step used it. Keys are appended and trained on as a run does it: never
    again once a step has used them, each step by the rank that collects the key.
    """
    folder = tmp_path_factory.mktemp("bank")
    torn = group_record(key(77), FINGERPRINT, 77, group(77).samples)
    content: dict[int, str] = {}
    used: dict[int, int] = {}
    iteration, checkpoints = 0, [0]
    banks = [open_bank(folder)]
    for name, value in operations:
        if name == "append":
            for number in sorted(set(value)):
                if number not in content:
                    banks[number % len(banks)].append([(key(number), group(number))])
                    content[number] = "group"
        elif name == "drop":
            if value not in used:
                banks[value % len(banks)].mark_dropped({key(value): "why"})
                content[value] = "dropped"
        elif name == "consume":
            iteration += 1
            numbers = [number for number in sorted(set(value)) if number in content and number not in used]
            for rank, bank in enumerate(banks):
                bank.mark_consumed([key(n) for n in numbers if n % len(banks) == rank], iteration)
            used |= dict.fromkeys(numbers, iteration)
        elif name == "save":
            checkpoints = [*checkpoints[-1:], iteration]
            for bank in banks:
                bank.compact(checkpoints[0])
        else:
            num_ranks, back, share = value
            for bank in banks:
                bank.close()
            with ledger(folder, len(banks) - 1).open("ab") as file:  # killed within a write
                file.write(torn[: int(share * (len(torn) - 1))])
            iteration = checkpoints[-1 - back % len(checkpoints)]
            checkpoints = [c for c in checkpoints if c <= iteration]
            used = {number: step for number, step in used.items() if step <= iteration}
            banks = [
                open_bank(folder, at=iteration, rank=rank, num_ranks=num_ranks)
                for rank in random.Random(share).sample(range(num_ranks), num_ranks)
            ]
            banks.sort(key=lambda bank: bank._path)
            for bank in banks:
                expected = {number for number in content if number not in used}
                found = {4 * k.rollout_id + k.group_id for k in bank.restored}
                assert found == {n for n in expected if content[n] == "group"}
                assert {4 * k.rollout_id + k.group_id for k in bank.dropped} == expected - found
            for number in sorted(found):
                row, samples = banks[number % num_ranks].take(key(number))
                assert row == number
                check_samples(samples, group(number).samples)
    for bank in banks:
        bank.close()
    shutil.rmtree(folder)
