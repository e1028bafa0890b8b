"""Ports of this machine that nobody listens on."""

from __future__ import annotations

import random
import socket

_RANDOM = random.SystemRandom()  # tests seed the other one


def free_ports(count: int = 1) -> int:
    """The first of so many ports in a row that nobody listens on.

    Below those that the system gives to connections: a server takes its port half a minute from now.
    """
    while True:
        port = _RANDOM.randrange(12_000, 32_000 - count)
        if all(_is_free(port + index) for index in range(count)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
