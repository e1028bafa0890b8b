"""Addresses from the command line and from discovery files, keys from the environment, releases by their names."""

from __future__ import annotations

import os
import re
import stat
import subprocess

import pytest

from gft_megatron.rollout.sglang.addresses import Discovery, announce, parse_url, parse_urls
from gft_megatron.rollout.sglang.dialect import Dialect
from gft_megatron.rollout.sglang.http import Keys
from gft_megatron.rollout.sglang.keys import generate_keys, keys_for_launch, read_keys, write_keys

API, ADMIN = "a" * 32, "b" * 32


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://10.0.0.7:30000", "http://10.0.0.7:30000"),
        (" node7:30000/ ", "http://node7:30000"),
        ("https://gpu-3.cluster_a.local:443", "https://gpu-3.cluster_a.local:443"),
        ("http://[::1]:30000", "http://[::1]:30000"),
    ],
)
def test_addresses(text, url):
    assert parse_url(text) == url


@pytest.mark.parametrize(
    "text",
    ["", "node7", "http://node7", "http://node7:0", "http://node7:99999", "http://node7:x", "ftp://node7:21", "http://:80",
     "http://node7:30000/v1", "http://user:secret@node7:30000", "http://a b:30000", "http://node7:30000?x=1",
     "http://node7:30000#x", "http://node7:30000,http://node8:30000"],
)  # fmt: skip
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        parse_url(text)


def test_an_address_given_twice():
    with pytest.raises(ValueError, match="http://node7:1 is given twice"):
        parse_urls(["http://node7:1", "node7:1/"])


def test_a_discovery_file_is_read_when_it_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "workers"
    found = Discovery(path)
    assert found.urls() == ()
    path.write_text("# the first rack\nhttp://node7:30000  # eight GPUs\n\nnode8:30000\nnode8:30000")
    assert found.urls() == ("http://node7:30000", "http://node8:30000")
    monkeypatch.setattr("gft_megatron.rollout.sglang.addresses._read", lambda path: pytest.fail("read again"))
    assert found.urls() == ("http://node7:30000", "http://node8:30000")
    monkeypatch.undo()
    before = path.stat()
    replacement = tmp_path / "new"
    replacement.write_text(path.read_text().replace("node8", "node9"))
    os.utime(replacement, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk that tells time by the hour
    replacement.replace(path)
    assert found.urls() == ("http://node7:30000", "http://node9:30000")
    path.write_text("http://node7:30000\nnode seven\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: 'node seven'")):
        found.urls()
    path.unlink()
    assert found.urls() == ()


def test_servers_announce_themselves_and_go(tmp_path):
    folder = tmp_path / "workers"
    found = Discovery(folder)
    mine = announce(folder, ["http://node7:30000", "http://node7:30001"])
    (folder / "node6_1.urls").write_text("http://node6:30000\n")
    (folder / "node8_1.writing").write_text("http://no")
    assert sorted(found.urls()) == ["http://node6:30000", "http://node7:30000", "http://node7:30001"]
    mine.unlink()
    assert found.urls() == ("http://node6:30000",)


def test_keys_come_from_the_environment_or_are_new():
    assert read_keys({}) == Keys()
    both = {"GFT_SGLANG_API_KEY": API, "GFT_SGLANG_ADMIN_KEY": ADMIN}
    assert keys_for_launch(both) == read_keys(both) == Keys(api=API, admin=ADMIN)
    assert read_keys({**both, "GFT_SGLANG_ADMIN_KEY": ""}) == Keys(api=API)
    keys = [keys_for_launch({}) for _ in range(50)]
    assert len({key for pair in keys for key in (pair.api, pair.admin)}) == 100
    for pair in keys:
        assert keys_for_launch({"GFT_SGLANG_API_KEY": pair.api, "GFT_SGLANG_ADMIN_KEY": pair.admin}) == pair
        assert len(pair.api) == 64 and pair.api not in repr(pair) and pair.admin not in repr(pair)


def test_one_key_of_two_is_refused_for_servers_of_ours():
    with pytest.raises(ValueError, match="GFT_SGLANG_ADMIN_KEY is not set"):
        keys_for_launch({"GFT_SGLANG_API_KEY": API})


@pytest.mark.parametrize("key", ["short", "-" + API, "with a space in it", "quote'" + API, API + "\n", "a" * 300])
def test_keys_that_a_server_or_a_log_would_garble_are_refused_unseen(key):
    with pytest.raises(ValueError, match="GFT_SGLANG_API_KEY holds") as error:
        read_keys({"GFT_SGLANG_API_KEY": key})
    assert key not in str(error.value)


def test_a_file_of_keys_is_for_its_owner_and_for_a_shell(tmp_path):
    path = tmp_path / "made" / "keys"
    keys = generate_keys()
    write_keys(path, Keys(api=API, admin=ADMIN))
    write_keys(path, keys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["keys"]
    shell = f". {path}; printf '%s %s' $GFT_SGLANG_API_KEY $GFT_SGLANG_ADMIN_KEY"
    assert subprocess.run(["sh", "-c", shell], capture_output=True, text=True).stdout == f"{keys.api} {keys.admin}"


@pytest.mark.parametrize(
    ("version", "begin_end", "ready"),
    [
        ("0.5.19", False, False),
        ("0.5.19.post1", False, False),
        ("0.5.20", False, True),
        ("0.5.21rc0", True, True),
        ("0.5.23+cu130", True, True),
        ("0.6.0", True, True),
        ("1.0.0", True, True),
    ],
)
def test_releases(version, begin_end, ready):
    assert Dialect.of_version(version) == Dialect(version, needs_begin_end=begin_end, has_ready=ready)


@pytest.mark.parametrize("version", ["0.5.18", "0.4.99", "0.5.6.post2", "main", ""])
def test_other_releases_are_refused_by_name(version):
    with pytest.raises(ValueError, match=f"(?s){re.escape(version)}.*0.5.19 or newer is needed"):
        Dialect.of_version(version)
