"""What differs between the releases of SGLang that we speak to: asked once of a server, then known."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError

_OLDEST = (0, 5, 19)  # the first that says which of a response's tokens came from which weights
_CALL_SEC = 10.0


@dataclass(frozen=True)
class Dialect:
    """How one release answers. The releases were read from their packages, 0.5.23 was run."""

    version: str
    needs_begin_end: bool
    """/begin_weight_update and /end_weight_update have to stand around tensors sent to it: since 0.5.21."""
    has_ready: bool
    """/ready, which tells without generating anything: since 0.5.20."""

    @classmethod
    def of_version(cls, version: str) -> Dialect:
        """
        Args:
            version: as a server names it, e.g. 0.5.23, 0.5.19.post1, 0.5.21rc0+cu130.

        Raises:
            ValueError: older than what we speak to, or no version.
        """
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
        if numbers is None:
            raise ValueError(f"SGLang version {version!r} is none that we know: 0.5.19 or newer is needed")
        release = tuple(int(number) for number in numbers.groups())
        if release < _OLDEST:
            raise ValueError(
                f"SGLang {version} does not tell which weights its tokens come from: 0.5.19 or newer is needed"
            )
        return cls(version=version, needs_begin_end=release >= (0, 5, 21), has_ready=release >= (0, 5, 20))

    async def is_ready(self, http: Http, url: str) -> bool:
        """Whether it takes requests. It says nothing of its weights, nor of whether they get anywhere.

        Raises:
            WorkerError: no answer at all.
        """
        # Without /ready: /health generates a token, takes a second at least, and fails while generation is paused.
        path, limit = ("/ready", _CALL_SEC) if self.has_ready else ("/health", 25.0)
        try:
            await http.call(url, path, timeout_sec=limit)
        except WorkerError as error:
            if error.kind is FailureKind.OVERLOADED:  # 503
                return False
            raise
        return True


async def probe_dialect(http: Http, url: str) -> Dialect:
    """Ask a server for its release.

    Raises:
        WorkerError: no answer, or none that names a version.
        ValueError: a release that we do not speak to.
    """
    try:
        answer = await http.call(url, "/server_info", timeout_sec=_CALL_SEC)
    except WorkerError as error:
        if error.kind is not FailureKind.REFUSED:
            raise
        # The name it had in releases that are too old: to be able to say so.
        answer = await http.call(url, "/get_server_info", timeout_sec=_CALL_SEC)
    # Nothing of the rest may be shown: servers list their own keys there.
    version = answer.get("version") if isinstance(answer, dict) else None
    if not isinstance(version, str):
        raise WorkerError(url, FailureKind.MALFORMED, "/server_info names no version")
    try:
        return Dialect.of_version(version)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from None


async def weight_version(http: Http, url: str) -> str:
    """The version of the weights that a server has, as whoever sent them named it; "default" for those it started with.

    Raises:
        WorkerError
    """
    answer = await http.call(url, "/model_info", timeout_sec=_CALL_SEC)
    version = answer.get("weight_version") if isinstance(answer, dict) else None
    if not isinstance(version, str):
        raise WorkerError(url, FailureKind.MALFORMED, "/model_info names no weight_version")
    return version
