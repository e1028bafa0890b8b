"""Stand-ins for the parts of torch.cuda that Megatron-Core takes for granted, on a machine that has no CUDA.

`install()` returns at once where CUDA is available, so a GPU run never meets this file. Nothing of the installed
megatron-core is edited: torch's own functions answer for the CPU, one TorchFunctionMode redirects device arguments,
and three functions of megatron.core.tensor_parallel.random are replaced. Each stand-in names the upstream file that
needs it (paths in megatron/core, read at 0.16.1 and 0.19.2).

Not covered: CUDA graphs, FSDP, Transformer Engine, NCCL user buffers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


def install() -> None:
    """Make Megatron-Core run on the CPU. Idempotent; main thread only (the function mode is thread-local)."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _answer_for_the_compiler()
    _answer_for_the_device()
    _answer_for_streams()
    _answer_for_random_state()
    _CudaMeansCpu().__enter__()


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _answer_for_the_compiler() -> None:
    # jit.py: torch.compile imports all of Inductor, a second of every start, where TORCH_COMPILE_DISABLE then leaves
    # the functions as they are.
    if os.environ.get("TORCH_COMPILE_DISABLE") != "1":
        return
    upstream, torch.compile = torch.compile, _uncompiled
    try:
        import megatron.core.jit  # noqa: F401
    finally:
        torch.compile = upstream


def _uncompiled(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """torch.compile as a decorator, with options or without."""
    return _uncompiled if function is None else function


def _answer_for_the_device() -> None:
    # distributed/param_and_grad_buffer.py, tensor_parallel/{layers,mappings}.py,
    # pipeline_parallel/p2p_communication.py, models/common/embeddings/rotary_pos_embedding.py
    torch.cuda.current_device = _returning(_CPU)
    # pipeline_parallel/p2p_communication.py, dist_checkpointing/strategies/{filesystem_async,fully_parallel}.py
    torch.cuda.synchronize = _returning(None)
    # timers.py, rerun_state_machine.py
    torch.cuda.empty_cache = torch.cuda.set_device = _returning(None)


class _Immediate:
    """A stream or event on a device where everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Immediate:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def wait_stream(self, *args: Any) -> None:
        pass

    wait_event = record = wait = synchronize = wait_stream

    def record_event(self, event: _Immediate | None = None) -> _Immediate:
        return event or _Immediate()


def _answer_for_streams() -> None:
    # distributed/param_and_grad_buffer.py (0.19: current_stream, Stream, Event for overlapped reduction),
    # transformer/moe/token_dispatcher.py
    torch.cuda.Stream = torch.cuda.Event = _Immediate  # type: ignore[misc, assignment]
    torch.cuda.stream = torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: _Immediate()
    torch.Tensor.record_stream = _returning(None)  # type: ignore[method-assign]


def _answer_for_random_state() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    # tensor_parallel/random.py: model_parallel_cuda_manual_seed. torch.manual_seed would call back into torch.cuda.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # The upstream versions queue the call until CUDA is initialised, which never happens here.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_random.CudaRNGStatesTracker = _cpu_tracker(megatron_random.CudaRNGStatesTracker)


def _cpu_tracker(upstream: type) -> type:
    class CpuRNGStatesTracker(upstream):
        """tensor_parallel/random.py CudaRNGStatesTracker, keeping states of CPU generators."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_:
                raise RuntimeError(f"the random seed {seed} is taken")
            if name in self.states_:
                raise RuntimeError(f"the random state {name!r} is taken")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            if name not in self.states_:
                raise RuntimeError(f"there is no random state {name!r}")
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    return CpuRNGStatesTracker


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Send device="cuda" to the CPU, as torch.set_default_device does for its device.

    pipeline_parallel/schedules.py (num_tokens), optimizer/{clip_grads,optimizer,grad_scaler}.py,
    tensor_parallel/data.py, transformer/utils.py and dist_checkpointing/exchange_utils.py write the word "cuda".
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:  # models/common/embeddings/rope_utils.py, models/common/language_module
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # optimizer/{optimizer,distrib_optimizer,clip_grads}.py dispatch on the string 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):  # rope_utils.py; pinning needs a CUDA driver
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **(kwargs or {}))
