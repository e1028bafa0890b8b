"""The SGLang servers of a run, as all ranks see them: started here or found, with the keys to them, and their engines.

One rank of each node starts that node's servers. Every replica's first rank is a client of all servers; rank 0 alone
changes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from gft_megatron.config import EngineConfig, RunConfig
from gft_megatron.convert.model_shape import ModelShape
from gft_megatron.observe.console import Console
from gft_megatron.rollout.sglang.addresses import Discovery, own_address, parse_url, parse_urls
from gft_megatron.rollout.sglang.client import ModelFacts
from gft_megatron.rollout.sglang.engine import EngineLimits, SGLangEngine
from gft_megatron.rollout.sglang.http import Keys
from gft_megatron.rollout.sglang.keys import is_loopback, keys_for_launch, read_keys
from gft_megatron.rollout.sglang.launcher import Launcher, LaunchOptions
from gft_megatron.rollout.sglang.weight_sync import build_weight_sync
from gft_megatron.training.exchange import all_or_none, on_rank_zero
from gft_megatron.training.parallel import is_replica_leader


@dataclass(frozen=True)
class Servers:
    """How this rank gets to the servers."""

    addresses: Callable[[], Sequence[str]]
    """As of now: servers come and go."""
    keys: Keys
    router_url: str | None
    launcher: Launcher | None = None
    """On the one rank of a node that has started some."""

    def close(self) -> None:
        if self.launcher is not None:
            self.launcher.close()


def find_servers(config: RunConfig, console: Console) -> Servers:
    """Start the servers of this node, or read where they are; collective over the world.

    Raises:
        ValueError, OSError: what is wrong with the flags, or why a server did not start.
        FailedElsewhere: a server of another node did not start.
    """
    engine = config.engine
    router_url = None if engine.sglang_router_url is None else parse_url(engine.sglang_router_url)
    if engine.sglang_workers_per_node:
        return _launch(config, router_url, console)
    keys = read_keys()
    if engine.sglang_discovery_file is not None:
        return Servers(Discovery(Path(engine.sglang_discovery_file)).urls, keys, router_url)
    urls = parse_urls(engine.sglang_urls)
    return Servers(lambda: urls, keys, router_url)


def build_engine(config: RunConfig, servers: Servers, shape: ModelShape, eos_token_id: int) -> SGLangEngine | None:
    """This rank's client of the servers; None where it has none."""
    if not is_replica_leader():
        return None
    engine = config.engine
    weight_sync = None
    if dist.get_rank() == 0:
        weight_sync = partial(
            build_weight_sync,
            engine.weight_sync,
            folder=Path(engine.weight_sync_dir or Path(config.output.run_dir) / "weights").resolve(),
            source_folder=Path(config.model.hf_checkpoint),
            dtype=torch.bfloat16 if config.model.bf16 else torch.float32,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            bucket_bytes=engine.weight_sync_bucket_mib << 20,
        )
    return SGLangEngine(
        servers.addresses,
        keys=servers.keys,
        model=ModelFacts(
            vocab_size=shape.vocab_size, max_positions=shape.max_position_embeddings, eos_token_ids={eos_token_id}
        ),
        weight_sync=weight_sync,
        # An evaluation hands over weights while the next rollout is being drawn; --max-staleness may be a phase's own.
        asynchronous=True,
        limits=EngineLimits(lost_sec=engine.sglang_lost_timeout_sec),
        router_url=servers.router_url,
    )


def _launch(config: RunConfig, router_url: str | None, console: Console) -> Servers:
    engine = config.engine
    keys = on_rank_zero(keys_for_launch)
    launcher: Launcher | None = None

    def start() -> tuple[str, ...]:
        nonlocal launcher
        if int(os.environ.get("LOCAL_RANK", "0")):
            return ()
        launcher = Launcher(_options(config, engine), keys, Path(config.output.run_dir) / "sglang")
        return launcher.start()

    found: list[tuple[str, ...]] = [()] * dist.get_world_size()
    try:
        with console.stage(f"starting {engine.sglang_workers_per_node} SGLang servers on each node"):
            dist.all_gather_object(found, all_or_none(start))
    except BaseException:
        if launcher is not None:
            launcher.close()
        raise
    urls = tuple(url for of_rank in found for url in of_rank)
    return Servers(lambda: urls, keys, router_url, launcher)


def _options(config: RunConfig, engine: EngineConfig) -> LaunchOptions:
    python = engine.sglang_python or os.environ.get("GFT_SGLANG_PYTHON")
    if not python:
        raise ValueError(
            "--sglang-workers-per-node: --sglang-python is missing, the interpreter of an environment with SGLang "
            "(tools/sglang_cpu.sh makes one for CPUs)"
        )
    arguments = ["--dtype", "bfloat16" if config.model.bf16 else "float32"]
    arguments += ["--random-seed", str(config.optimizer.seed)]
    # A folder without weights, or whose weights are others; a server has the trainer's before it serves.
    if config.model.random_init or config.model.pretrained_checkpoint is not None:
        arguments += ["--load-format", "dummy"]
    if engine.colocate and torch.cuda.is_available():
        arguments.append("--enable-memory-saver")
    return LaunchOptions(
        python=Path(python),
        model=Path(config.model.hf_checkpoint),
        num_workers=engine.sglang_workers_per_node,
        tensor_parallel_size=engine.sglang_tensor_parallel_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        gpus=engine.sglang_gpus,
        host=_host(),
        port=engine.sglang_port,
        extra_arguments=(*arguments, *engine.sglang_args),
    )


def _host() -> str:
    """Where every node of the run reaches the servers of this one."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == dist.get_world_size():
        return "127.0.0.1"
    master = os.environ["MASTER_ADDR"]
    host = own_address(master, int(os.environ["MASTER_PORT"]))
    if is_loopback(host):  # so many systems name themselves in /etc/hosts
        raise ValueError(
            f"MASTER_ADDR={master} is {host} on its own node, where other nodes cannot reach servers: give torchrun an "
            f"address of the network (--master-addr), or correct /etc/hosts"
        )
    return host
