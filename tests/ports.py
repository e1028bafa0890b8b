"""Ports of this machine that nobody listens on."""

from __future__ import annotations

import socket


def free_ports(count: int = 1) -> int:
    """The first of so many in a row."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        if port + count < 65536 and all(_is_free(port + index) for index in range(count)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
