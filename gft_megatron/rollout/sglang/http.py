"""HTTP to one SGLang server: every call bounded in time, every failure of a known kind."""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Literal

import aiohttp

_CONNECT_SEC = 5.0
_LARGEST_ANSWER = 64 << 20  # bytes


class FailureKind(StrEnum):
    """What failures are counted by."""

    UNREACHABLE = "unreachable"
    """No connection was made."""
    TIMED_OUT = "timed_out"
    """A call took longer than its limit."""
    NO_PROGRESS = "no_progress"
    """A generation stood still."""
    BROKEN_OFF = "broken_off"
    """The connection ended before the whole answer had come."""
    OVERLOADED = "overloaded"
    """429 or 503: another time, or elsewhere."""
    SERVER_ERROR = "server_error"
    """5xx."""
    REFUSED = "refused"
    """4xx: the request itself is wrong, or its key."""
    MALFORMED = "malformed"
    """An answer that is not what was asked for: no JSON, a field missing, NaN, a token that is none."""
    ABORTED = "aborted"
    """The server gave up the request by itself."""
    STALE = "stale"
    """Tokens drawn with older weights than the server had acknowledged."""


class WorkerError(Exception):
    """A call to a server that failed."""

    def __init__(self, url: str, kind: FailureKind, message: str) -> None:
        super().__init__(f"{url}: {message}")
        self.url = url
        self.kind = kind


@dataclass(frozen=True)
class Keys:
    """The servers' two secrets. Never printed, never written: they come and go by the environment."""

    api: str | None = field(default=None, repr=False)
    """For generation."""
    admin: str | None = field(default=None, repr=False)
    """For everything that changes a server: weights, pauses, aborts."""

    def headers(self, *, admin: bool) -> dict[str, str]:
        key = self.admin or self.api if admin else self.api
        return {} if key is None else {"Authorization": f"Bearer {key}"}


class Http:
    """A pool of connections, for all servers of a run. To be used and closed inside one event loop."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Http:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def call(
        self,
        url: str,
        path: str,
        body: Any = None,
        *,
        timeout_sec: float | None,
        admin: bool = False,
        method: Literal["GET", "POST"] | None = None,
    ) -> Any:
        """The JSON of the answer; None where it was empty.

        Args:
            url: of the server, e.g. http://10.0.0.7:30000
            body: JSON to send; None sends nothing.
            timeout_sec: for all of the call. None only where the caller bounds it by other means.
            method: default POST with a body, GET without.

        Raises:
            WorkerError: always with one of `FailureKind`.
        """
        if self._session is None:
            self._session = _session()
        verb = method or ("GET" if body is None else "POST")
        try:
            async with self._session.request(
                verb,
                url + path,
                json=body,
                headers=self._keys.headers(admin=admin),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_sec, sock_connect=_CONNECT_SEC),
            ) as answer:
                status = answer.status
                raw = await _read(answer, url, path)
        except aiohttp.ServerTimeoutError as error:  # of connecting; a TimeoutError too
            raise WorkerError(url, FailureKind.UNREACHABLE, f"{path}: {error}") from error
        except TimeoutError as error:
            raise WorkerError(url, FailureKind.TIMED_OUT, f"{path} gave no answer in {timeout_sec:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise WorkerError(url, FailureKind.UNREACHABLE, f"{path}: {error}") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise WorkerError(url, FailureKind.BROKEN_OFF, f"{path}: {error or type(error).__name__}") from error
        if status >= 300:
            told = " ".join(raw.decode(errors="replace").split())[:300]
            raise WorkerError(url, _kind_of(status), f"{path} answered {status}: {told}")
        if not raw.strip():
            return None
        try:
            return json.loads(raw)
        except ValueError as error:
            raise WorkerError(url, FailureKind.MALFORMED, f"{path} answered no JSON: {raw[:100]!r}") from error


def _session() -> aiohttp.ClientSession:
    """Belongs to the event loop that runs now."""
    # Each request in flight has a connection of its own; 1,024 files are all that many systems allow at first.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return aiohttp.ClientSession(
        # Servers drop idle connections after 5 s; a request on one that is just being dropped would fail.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SEC),
        trust_env=False,  # a proxy between trainer and servers would only be a mistake
    )


async def _read(answer: aiohttp.ClientResponse, url: str, path: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in answer.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > _LARGEST_ANSWER:
            raise WorkerError(url, FailureKind.MALFORMED, f"{path} answered more than {_LARGEST_ANSWER} bytes")
    return b"".join(parts)


def _kind_of(status: int) -> FailureKind:
    if status in (429, 503):
        return FailureKind.OVERLOADED
    return FailureKind.SERVER_ERROR if status >= 500 else FailureKind.REFUSED
