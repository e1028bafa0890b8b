"""What differs between SGLang releases, asked of a server once."""

from __future__ import annotations

from dataclasses import dataclass

from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError


@dataclass(frozen=True)
class Dialect:
    version: str
    needs_begin_end: bool
    """Weights given as tensors or broadcast come between /begin_weight_update and /end_weight_update."""

    async def weight_version(self, http: Http, url: str) -> str:
        """Raises: WorkerError."""
        answer = await http.call(url, "/model_info", timeout_sec=10.0)
        try:
            return str(answer["weight_version"])
        except (TypeError, KeyError) as error:
            raise WorkerError(url, FailureKind.MALFORMED, f"/model_info has no weight_version: {answer}") from error


async def probe_dialect(http: Http, url: str) -> Dialect:
    """Raises: WorkerError."""
    info = await http.call(url, "/server_info", timeout_sec=10.0)
    version = str(info["version"])
    return Dialect(version, needs_begin_end=tuple(map(int, version.split(".")[:3])) >= (0, 5, 20))
