"""What a server is and which weights it has."""

from __future__ import annotations

from dataclasses import dataclass

from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError


@dataclass(frozen=True)
class Dialect:
    version: str


async def probe_dialect(http: Http, url: str) -> Dialect:
    answer = await http.call(url, "/server_info", timeout_sec=10.0)
    version = answer.get("version") if isinstance(answer, dict) else None
    if not isinstance(version, str):
        raise WorkerError(url, FailureKind.MALFORMED, "/server_info names no version")
    return Dialect(version)


async def weight_version(http: Http, url: str) -> str:
    answer = await http.call(url, "/model_info", timeout_sec=10.0)
    version = answer.get("weight_version") if isinstance(answer, dict) else None
    if not isinstance(version, str):
        raise WorkerError(url, FailureKind.MALFORMED, "/model_info names no weight_version")
    return version
