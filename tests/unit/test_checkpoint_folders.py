"""Which checkpoint a run resumes from, when everything on disk may be missing, garbled or half-written."""

import os
from pathlib import Path

import pytest

from gft_megatron.training.checkpoint import TRACKER, CheckpointError, _publish, _remove_old, find_checkpoint


def make(root, iteration, *files):
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    for name in files or ("metadata.json", "run_state.json"):
        (folder / name).write_text("{}")
    return folder


def test_never_saved_is_a_fresh_start(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere") == (None, None)
    assert find_checkpoint(tmp_path) == (None, None)


def test_tracker_is_followed_even_to_an_older_checkpoint(tmp_path):
    older, _ = make(tmp_path, 4), make(tmp_path, 8)
    (tmp_path / TRACKER).write_text("4\n")
    assert find_checkpoint(tmp_path) == (older, None)


@pytest.mark.parametrize("text", ["", "abc", "99", "-4", "4.0", "\x00\xff", "release", "9" * 400])
def test_garbled_tracker_falls_back_to_the_newest_complete_folder(tmp_path, text):
    make(tmp_path, 4)
    newest = make(tmp_path, 8)
    make(tmp_path, 12, "metadata.json")  # a copy that was cut off
    (tmp_path / "iter_0000016.partial").mkdir()
    (tmp_path / TRACKER).write_text(text, encoding="latin-1")
    folder, warning = find_checkpoint(tmp_path)
    assert folder == newest
    assert TRACKER in warning and "iter_0000008" in warning


def test_missing_tracker_falls_back_with_a_warning(tmp_path):
    newest = make(tmp_path, 8)
    folder, warning = find_checkpoint(tmp_path)
    assert folder == newest and "missing" in warning


@pytest.mark.parametrize("text", ["12", "abc", ""])
def test_tracker_without_any_complete_folder_is_an_error(tmp_path, text):
    """Not step 0: something was saved here and is gone."""
    make(tmp_path, 12, "run_state.json")
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=TRACKER):
        find_checkpoint(tmp_path)


def test_what_is_published_is_on_the_disk_first(tmp_path, monkeypatch):
    """In the order of the calls: files, their folder, its name, the tracker, the tracker's name."""
    partial = make(tmp_path, 4).rename(tmp_path / "iter_0000004.partial")
    (partial / "random_state").mkdir()
    told = []

    def record(name):
        real = getattr(os, name)

        def call(*arguments):
            path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else arguments[0])
            told.append((name, path.relative_to(tmp_path).as_posix()))
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "replace"):
        record(name)
    _publish(partial, tmp_path / "iter_0000004", 4)
    old = partial.name
    assert sorted(told[:3]) == [
        ("fsync", f"{old}/{name}") for name in ("metadata.json", "random_state", "run_state.json")
    ]
    new = TRACKER + ".new"
    assert told[3:] == [
        ("fsync", old), ("rename", old), ("fsync", "."), ("fsync", new), ("replace", new), ("fsync", "."),
    ]  # fmt: skip
    assert find_checkpoint(tmp_path) == (tmp_path / "iter_0000004", None)


def test_old_folders_are_removed_and_newer_ones_of_an_overtaken_run_stay(tmp_path):
    for iteration in (2, 4, 6, 8, 20):
        make(tmp_path, iteration)
    _remove_old(tmp_path, keep=2, newest=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000006", "iter_0000008", "iter_0000020"]
