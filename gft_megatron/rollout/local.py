"""The embedded engine: transformers' generation in the training process, no server.

Every training rank holds one whole copy of the model and draws the samples of its own share of the prompts, so all
cores or GPUs of a replica work while it samples. Meant for small models, first runs and tests: a model that does not
fit twice beside its own training state belongs on servers.

Requests that wait together are drawn together, padded on the left to the longest prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, StoppingCriteria

from gft_megatron.groups import WeightSpan
from gft_megatron.rollout.engine import (
    Completion,
    EngineFailed,
    FinishReason,
    GenerateRequest,
    RequestAborted,
    RequestRefused,
    RolloutEngine,
    SamplingParams,
)
from gft_megatron.rollout.file_names import parameters_by_file_name


@dataclass
class _Pending:
    request: GenerateRequest
    result: asyncio.Future[Completion]
    aborted: bool = field(default=False)


class LocalEngine(RolloutEngine):
    """Samples with a transformers model in this process."""

    scope: ClassVar[Literal["rank", "replica"]] = "rank"
    is_reproducible: ClassVar[bool] = True

    def __init__(
        self,
        hf_checkpoint: str | Path,
        *,
        eos_token_ids: Iterable[int],
        pad_token_id: int,
        max_batch_size: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        """Build the model of this Hugging Face folder with no weights in it; `update_weights` has to come first.

        Args:
            max_batch_size: samples drawn at a time.
            seed: a batch's random numbers depend on this, on the weight version and on its requests, on nothing else.
        """
        config = AutoConfig.from_pretrained(hf_checkpoint)
        with torch.random.fork_rng(devices=[]):  # initial weights are overwritten; they must not move the global state
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
        self._model.generation_config.update(
            eos_token_id=sorted(eos_token_ids), pad_token_id=pad_token_id, bos_token_id=None, use_cache=True
        )
        self._eos_token_ids = frozenset(eos_token_ids)
        self._pad_token_id = pad_token_id
        self._max_batch_size = max_batch_size
        self._device = torch.device(device)
        self._seed = seed
        self._waiting: list[_Pending] = []
        self._running: list[_Pending] = []
        self._worker: asyncio.Task[None] | None = None
        self.weight_version = -1

    async def generate(self, request: GenerateRequest) -> Completion:
        self._check(request)
        pending = _Pending(request, asyncio.get_running_loop().create_future())
        self._waiting.append(pending)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._serve())
        return await pending.result

    async def abort(self, request_ids: Iterable[str] | None = None) -> None:
        ids = None if request_ids is None else frozenset(request_ids)
        for pending in [*self._waiting, *self._running]:
            if ids is None or pending.request.request_id in ids:
                pending.aborted = True
                if not pending.result.done():
                    pending.result.set_exception(RequestAborted(pending.request.request_id, "aborted"))

    async def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert not self._waiting and not self._running, "update_weights while requests are in flight"
        unknown = []
        with torch.no_grad():
            missing = set(parameters_by_file_name(self._model))
            parameters = parameters_by_file_name(self._model, remove_duplicate=False)
            for name, tensor in named_tensors:
                if name in parameters:
                    parameters[name].copy_(tensor)
                    missing.discard(name)
                else:
                    unknown.append(name)
        if missing or unknown:
            raise EngineFailed("-", f"weight update lacks {sorted(missing)[:3]} and has unknown {unknown[:3]}")
        self.weight_version = version

    async def close(self) -> None:
        await self.abort()
        if self._worker is not None:
            await self._worker

    def _check(self, request: GenerateRequest) -> None:
        if self.weight_version < 0:
            raise EngineFailed(request.request_id, "the engine has no weights yet: call update_weights first")
        vocab_size = self._model.config.vocab_size
        if not request.prompt_ids or not all(0 <= token < vocab_size for token in request.prompt_ids):
            raise RequestRefused(
                request.request_id, f"the prompt is empty or has a token outside the vocabulary of {vocab_size}"
            )
        longest = self._model.config.max_position_embeddings
        if len(request.prompt_ids) + request.sampling.max_new_tokens > longest:
            raise RequestRefused(
                request.request_id,
                f"{len(request.prompt_ids)} prompt tokens + {request.sampling.max_new_tokens} new ones exceed the "
                f"model's {longest} positions",
            )

    async def _serve(self) -> None:
        await asyncio.sleep(0)  # let every request that is being made join the first batch
        while self._waiting:
            # Equal distributions share a batch, however long each may get (hints leave less of a response to draw);
            # neighbours in prompt length waste the least padding.
            wanted = _distribution(self._waiting[0].request.sampling)
            alike = sorted(
                (pending for pending in self._waiting if _distribution(pending.request.sampling) == wanted),
                key=lambda pending: len(pending.request.prompt_ids),
            )
            self._running = alike[: self._max_batch_size]
            taken = {id(pending) for pending in self._running}
            self._waiting = [pending for pending in self._waiting if id(pending) not in taken]
            batch = [pending for pending in self._running if not pending.aborted]
            if batch:
                try:
                    completions = await asyncio.to_thread(self._draw, batch)
                except Exception as error:  # every request of the batch has to hear of it
                    for pending in batch:
                        if not pending.result.done():
                            pending.result.set_exception(EngineFailed(pending.request.request_id, repr(error)))
                else:
                    for pending, completion in zip(batch, completions, strict=True):
                        if not pending.result.done():
                            pending.result.set_result(completion)
            self._running = []

    @torch.no_grad()
    def _draw(self, batch: list[_Pending]) -> list[Completion]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # this thread's; a new one starts on device 0
        temperature, top_p = _distribution(batch[0].request.sampling)
        longest = max(len(pending.request.prompt_ids) for pending in batch)
        prompts = torch.full((len(batch), longest), self._pad_token_id)
        attention = torch.zeros_like(prompts)
        for row, pending in enumerate(batch):
            ids = torch.tensor(pending.request.prompt_ids)
            prompts[row, longest - len(ids) :] = ids
            attention[row, longest - len(ids) :] = 1
        recorder = _LogProbRecorder(longest, temperature)
        drawing: dict[str, object] = {"do_sample": False}
        if temperature > 0:
            drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self._batch_seed(batch))
            output = self._model.generate(
                input_ids=prompts.to(self._device),
                attention_mask=attention.to(self._device),
                max_new_tokens=max(pending.request.sampling.max_new_tokens for pending in batch),
                logits_processor=LogitsProcessorList([recorder]),
                stopping_criteria=[_Done(batch, longest)],
                **drawing,
            )
        log_probs = recorder.finish(output).cpu().numpy()  # [batch, new tokens]
        new_tokens = output[:, longest:].cpu().numpy()
        return [self._completion(p.request, new_tokens[i], log_probs[i]) for i, p in enumerate(batch)]

    def _completion(self, request: GenerateRequest, tokens: np.ndarray, log_probs: np.ndarray) -> Completion:
        tokens = tokens[: request.sampling.max_new_tokens]  # the batch went on for others
        ends = np.flatnonzero(np.isin(tokens, list(self._eos_token_ids)))
        stopped = len(ends) > 0
        length = int(ends[0]) + 1 if stopped else len(tokens)
        return Completion(
            request_id=request.request_id,
            token_ids=tokens[:length].astype(np.int64),
            log_probs=log_probs[:length].astype(np.float32),
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
            weight_spans=(WeightSpan(self.weight_version, 0, length),),
        )

    def _batch_seed(self, batch: list[_Pending]) -> int:
        names = " ".join(pending.request.request_id for pending in batch)
        digest = hashlib.sha256(f"{self._seed} {self.weight_version} {names}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


class _LogProbRecorder(LogitsProcessor):
    """Keeps the log-prob of each drawn token, holding one step's [batch, vocabulary] at a time.

    transformers can return the scores of all steps, but that is [batch, vocabulary] for every token.
    """

    def __init__(self, prompt_length: int, temperature: float) -> None:
        self._prompt_length = prompt_length
        self._temperature = temperature if temperature > 0 else 1.0
        self._distribution: Tensor | None = None  # [batch, vocabulary] of the step before
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids)
        self._distribution = (scores.float() / self._temperature).log_softmax(-1)
        return scores

    def _record(self, input_ids: Tensor) -> None:
        if self._distribution is not None and input_ids.shape[1] > self._prompt_length + len(self._log_probs):
            self._log_probs.append(self._distribution.gather(-1, input_ids[:, -1:]))

    def finish(self, output_ids: Tensor) -> Tensor:  # [batch, prompt + new] -> [batch, new]
        self._record(output_ids)
        return torch.cat(self._log_probs, dim=-1)


def _distribution(sampling: SamplingParams) -> tuple[float, float]:
    return sampling.temperature, sampling.top_p


class _Done(StoppingCriteria):
    """Ends the rows whose requests were aborted or have all the tokens that they asked for."""

    def __init__(self, batch: list[_Pending], prompt_length: int) -> None:
        self._batch = batch
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        drawn = input_ids.shape[1] - self._prompt_length
        return torch.tensor(
            [pending.aborted or drawn >= pending.request.sampling.max_new_tokens for pending in self._batch],
            device=input_ids.device,
        )
