"""One request to one SGLang server, and everything that its answer has to be before it counts as a response.

Not streamed: SGLang's stream repeats all tokens so far in each event, which costs a client more than ten times as much.
Whether a generation gets anywhere is seen by one question a second for all of a server's requests (`loads.py`).
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from gft_megatron.groups import WeightSpan
from gft_megatron.rollout.engine import (
    Completion,
    FinishReason,
    GenerateRequest,
    Partial,
    RequestAborted,
    RequestRefused,
)
from gft_megatron.rollout.sglang.http import FailureKind, Http, WorkerError

_UNUSED_POSITIONS = 2  # of a model's context: SGLang cuts max_new_tokens by so much, without a word
_PROMPT_MARGIN = 7  # positions that it keeps free behind a prompt
_ABOVE_ZERO = 1e-5  # the log of a probability that was rounded up
_LEAST_FLOAT = -1e30  # SGLang's log of 0


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a request and its answer are held against."""

    vocab_size: int
    """Rows of the output layer (config.json), not of the tokenizer."""
    max_positions: int
    eos_token_ids: Set[int]

    def check(self, request: GenerateRequest) -> None:
        """A token id that a server does not have would kill it, with everybody's requests; it has to end here.

        Raises:
            RequestRefused
        """
        rid, prompt, new = request.request_id, request.prompt_ids, request.sampling.max_new_tokens
        if not re.fullmatch(r"[0-9a-f]{32}", rid):
            raise RequestRefused(rid, "a request id has 32 hex digits: SGLang aborts whatever begins with one")
        if not prompt or min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise RequestRefused(rid, f"the prompt is empty or has a token outside the vocabulary of {self.vocab_size}")
        if new < 1 or len(prompt) + new > self.max_positions or len(prompt) > self.max_positions - _PROMPT_MARGIN:
            raise RequestRefused(
                rid,
                f"{len(prompt)} prompt tokens + {new} new ones do not fit the model's {self.max_positions} positions "
                f"(SGLang keeps {_PROMPT_MARGIN} of them behind a prompt)",
            )

    def max_new_tokens(self, request: GenerateRequest) -> int:
        """What SGLang would make of it by itself."""
        return min(request.sampling.max_new_tokens, self.max_positions - _UNUSED_POSITIONS - len(request.prompt_ids))


def request_body(request: GenerateRequest, model: ModelFacts, rid: str) -> dict[str, Any]:
    """What /generate is sent. Whatever a server may have a default for (--preferred-sampling-params) is given."""
    return {
        "input_ids": request.prompt_ids,
        "rid": rid,
        "return_logprob": True,
        "sampling_params": {
            "max_new_tokens": model.max_new_tokens(request),
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "stop_token_ids": sorted(model.eos_token_ids),
            "skip_special_tokens": False,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "ignore_eos": False,
        },
    }


async def generate(
    http: Http,
    url: str,
    request: GenerateRequest,
    model: ModelFacts,
    *,
    rid: str,
    oldest_version: int,
    timeout_sec: float,
) -> Completion:
    """Draw one response.

    Args:
        url: of a server, or of a router before servers.
        request: one that `ModelFacts.check` let pass.
        rid: of this try; 32 hex digits.
        oldest_version: of the weights that tokens may come from.
        timeout_sec: for all of it. That it gets anywhere is for the caller to watch, who cancels this if not.

    Raises:
        RequestAborted: with what had been drawn, every token checked.
        WorkerError: there is no answer, or it is not a whole and plausible response.
        ValueError: the server ends responses at tokens that do not end them in this run.
    """
    answer = await http.call(url, "/generate", request_body(request, model, rid), timeout_sec=timeout_sec)
    try:
        drawn, finish = _read_answer(answer, rid, model.vocab_size)
        _check_versions(drawn, oldest_version, url, rid)
        if finish.get("type") == "abort":
            reason = _reason_of_late_abort(drawn, model.max_new_tokens(request), model.eos_token_ids)
            if reason is None:
                raise RequestAborted(rid, f"aborted after {len(drawn.token_ids)} tokens", drawn)
        else:
            reason = _finish_reason(drawn, finish, model.max_new_tokens(request), model.eos_token_ids, url)
    except _Malformed as error:
        raise WorkerError(url, FailureKind.MALFORMED, f"request {rid}: {error}") from None
    return Completion(
        request_id=rid,
        token_ids=drawn.token_ids,
        log_probs=drawn.log_probs,
        finish_reason=reason,
        weight_spans=drawn.weight_spans,
    )


async def abort(http: Http, url: str, rid: str, *, timeout_sec: float) -> None:
    """Have a server give up a request; one that it does not know is none of its business.

    Raises:
        WorkerError
    """
    await http.call(url, "/abort_request", {"rid": rid}, timeout_sec=timeout_sec, admin=True)


class _Malformed(Exception):
    pass


def _read_answer(answer: Any, rid: str, vocab_size: int) -> tuple[Partial, dict[str, Any]]:
    """Tokens, log-probs and spans, each checked; the finish reason as it came."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        raise _Malformed(f"the answer has no meta_info: {str(answer)[:100]}")
    if meta.get("id") != rid:
        raise _Malformed(f"the answer is to request {str(meta.get('id'))[:40]!r}")
    finish = meta.get("finish_reason")
    if not isinstance(finish, dict):
        raise _Malformed(f"finish_reason is {str(finish)[:40]!r}")
    ids = answer.get("output_ids")
    pairs = meta.get("output_token_logprobs")
    if not isinstance(ids, list) or not isinstance(pairs, list):
        raise _Malformed("output_ids or output_token_logprobs is missing")
    if not len(ids) == len(pairs) == meta.get("completion_tokens"):
        raise _Malformed(f"{len(ids)} tokens, {len(pairs)} log-probs, told were {meta.get('completion_tokens')}")
    if set(map(type, ids)) - {int} or min(ids, default=0) < 0 or max(ids, default=0) >= vocab_size:
        raise _Malformed(f"a token is outside the vocabulary of {vocab_size}")
    try:
        values = [pair[0] for pair in pairs]
        if [pair[1] for pair in pairs] != ids:
            raise _Malformed("the log-probs are of other tokens")
    except (TypeError, IndexError, KeyError):
        raise _Malformed("output_token_logprobs are no pairs") from None
    if set(map(type, values)) - {float}:  # SGLang sends 0.0 and never 0
        raise _Malformed("a log-prob is missing or no number")
    log_probs = np.array(values, np.float64)
    if not ((log_probs > _LEAST_FLOAT) & (log_probs <= _ABOVE_ZERO)).all():  # NaN neither
        raise _Malformed("a log-prob is not finite or positive")
    return (
        Partial(
            token_ids=np.array(ids, np.int64),
            log_probs=np.minimum(log_probs, 0.0).astype(np.float32),
            weight_spans=_spans(meta.get("weight_versions"), len(ids)),
        ),
        finish,
    )


def _spans(told: Any, length: int) -> tuple[WeightSpan, ...]:
    if not length:
        return ()
    spans = []
    try:
        for span in told:
            # "default" is what a server calls the weights it started with.
            version = int(span["version"]) if span["version"] != "default" else -1
            spans.append(WeightSpan(version, span["start"], span["end"]))
    except (TypeError, KeyError, ValueError):
        raise _Malformed(f"weight_versions is {str(told)[:100]}") from None
    edges = [0, *(span.end for span in spans)]
    if [*(span.start for span in spans), length] != edges or any(span.start >= span.end for span in spans):
        raise _Malformed(f"weight_versions {str(told)[:100]} do not cover {length} tokens")
    return tuple(spans)


def _check_versions(drawn: Partial, oldest: int, url: str, rid: str) -> None:
    found = min((span.version for span in drawn.weight_spans), default=oldest)
    if found < oldest:
        raise WorkerError(
            url, FailureKind.STALE, f"request {rid}: drawn with weights {found}, {oldest} or newer were expected"
        )


def _reason_of_late_abort(drawn: Partial, max_new_tokens: int, ends: Set[int]) -> FinishReason | None:
    """Of a response that had ended when its abort came; None of one that had not."""
    ids = drawn.token_ids
    if len(ids) and int(ids[-1]) in ends:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(ids) == max_new_tokens else None


def _finish_reason(
    drawn: Partial, finish: dict[str, Any], max_new_tokens: int, ends: Set[int], url: str
) -> FinishReason:
    """Of a response that ended by itself, and in one of the ways in which one can."""
    kind, matched = finish.get("type"), finish.get("matched")
    ids = drawn.token_ids
    if not len(ids):
        raise _Malformed("there is not one token")
    *before, last = ids.tolist()
    if not ends.isdisjoint(before):
        raise _Malformed("it goes on after an end token")
    ended = last in ends
    if kind == "stop" and type(matched) is int and matched == last:
        if not ended:
            raise ValueError(
                f"{url} ends responses at token {matched}, and the end tokens of this run are {sorted(ends)}: "
                f"the servers' model folder and --hf-checkpoint have to name the same ones (generation_config.json)"
            )
    elif kind != "length":  # "NaN happened" is a stop to SGLang, with an end token put in the place of the broken one
        raise _Malformed(f"it ended by {str(finish)[:100]}")
    if not ended and len(ids) != max_new_tokens:
        raise _Malformed(
            f"it was cut off after {len(ids)} of {max_new_tokens} tokens: the server's --context-length or its KV "
            f"cache (--max-total-tokens) is too small"
        )
    return FinishReason.STOP if ended else FinishReason.LENGTH
