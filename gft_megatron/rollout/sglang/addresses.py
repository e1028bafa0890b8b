"""Where the servers are: named one by one, or in a file that servers write as they come and go."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


def parse_url(text: str) -> str:
    """A server's address as we write it: http://HOST:PORT, nothing else.

    Raises:
        ValueError: it is none.
    """
    url = text.strip().rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts = port = None
    if (
        parts is None
        or not port
        or parts.scheme not in ("http", "https")
        or parts.path
        or parts.query
        or parts.fragment
    ):
        raise ValueError(f"{text.strip()!r} is no address of a server: expected http://HOST:PORT")
    if not _HOST.fullmatch(parts.netloc.rpartition(":")[0]):
        raise ValueError(f"{text.strip()!r}: expected http://HOST:PORT, with no user, password or other characters")
    return f"{parts.scheme}://{parts.netloc}"


def parse_urls(texts: Sequence[str]) -> tuple[str, ...]:
    """Addresses given on the command line.

    Raises:
        ValueError: one is none, or is given twice.
    """
    urls = tuple(map(parse_url, texts))
    twice = {url for url in urls if urls.count(url) > 1}
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} is given twice")
    return urls


class Discovery:
    """A file with one address a line, or a folder of such files; read again whenever it has changed.

    Blank lines, and what follows #, say nothing. Replace a file as a whole (mv): half an address may be an address too.
    A folder is for servers that come and go by themselves: each of their nodes has a file of its own there
    (`announce`), because appending to one file from many nodes loses lines on a shared disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[Path, tuple[int, int, int]] = {}
        self._urls: tuple[str, ...] = ()

    def urls(self) -> tuple[str, ...]:
        """The addresses now, each once. What is not there yet names none.

        Raises:
            ValueError: a line that is no address.
        """
        state = self._state()
        if state != self._seen:
            self._urls = tuple(dict.fromkeys(url for path in state for url in _read(path)))
            self._seen = state
        return self._urls

    def _state(self) -> dict[Path, tuple[int, int, int]]:
        paths = sorted(self._path.glob("*.urls")) if self._path.is_dir() else [self._path]
        state = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                now = path.stat()
                # A shared file system may tell times by the second: size and identity count too.
                state[path] = (now.st_mtime_ns, now.st_size, now.st_ino)
        return state


def own_address(host: str, port: int) -> str:
    """The address that this machine sends from to reach another."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
        probe.connect(found[4])  # of a datagram socket: sends nothing
        return probe.getsockname()[0]


def announce(folder: Path, urls: Sequence[str]) -> Path:
    """Write the addresses of this node's servers where `Discovery` finds them. Remove the returned file at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{socket.gethostname()}_{os.getpid()}.urls"
    temporary = path.with_suffix(".writing")
    with temporary.open("w") as file:
        file.writelines(f"{url}\n" for url in urls)
        file.flush()
        os.fsync(file.fileno())
    return temporary.replace(path)


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:  # its node has just gone
        return []
    urls = []
    for number, line in enumerate(lines, 1):
        address = line.partition("#")[0].strip()
        if not address:
            continue
        try:
            urls.append(parse_url(address))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return urls
