"""One token of a server, straight from it: it shows that tokens come, and what its log-probs are of."""

from __future__ import annotations

import math
import uuid

import numpy as np

from gft_megatron.rollout.engine import GenerateRequest, SamplingParams
from gft_megatron.rollout.sglang.calls import Calls
from gft_megatron.rollout.sglang.client import ModelFacts

_FLAT = 1e6  # a temperature at which every token is as likely as any other


async def try_out(calls: Calls, url: str, model: ModelFacts, *, oldest_version: int) -> None:
    """
    Raises:
        RequestAborted, WorkerError: no token came.
        ValueError: its log-prob is not of softmax(logits / temperature).
    """
    request = GenerateRequest(uuid.uuid4().hex, (min(model.eos_token_ids),), SamplingParams(1, temperature=_FLAT))
    call = calls.start(url, request.request_id, request, oldest_version=oldest_version)
    completion = await calls.answer(call)
    if not _is_uniform(completion.log_probs, model.vocab_size):
        raise ValueError(
            f"{url}: at a temperature at which all of {model.vocab_size} tokens are alike, the log-prob of "
            f"one is {completion.log_probs[0]:.3f}. Log-probs have to be of softmax(logits / temperature): start "
            f"the server without SGLANG_RETURN_ORIGINAL_LOGPROB, and with the model of --hf-checkpoint"
        )


def _is_uniform(log_probs: np.ndarray, vocab_size: int) -> bool:  # [n]
    return bool(np.all(np.abs(log_probs + math.log(vocab_size)) < 0.01))
