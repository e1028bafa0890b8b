"""Megatron's optimizer and learning-rate schedule, and the mend for its distributed optimizer on torch's AdamW."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from gft_megatron.config import OptimizerSettings, ParallelConfig


def build_optimizer(
    chunks: list[DistributedDataParallel],
    settings: OptimizerSettings,
    parallel: ParallelConfig,
    *,
    bf16: bool,
    overrides: dict[str, Any],
) -> MegatronOptimizer:
    """AdamW with gradient clipping; sharded over the data-parallel ranks on request."""
    _mend_distributed_optimizer_on_torch_adamw()
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": settings.lr,
        "min_lr": settings.min_lr,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "clip_grad": settings.clip_grad,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "use_distributed_optimizer": parallel.use_distributed_optimizer,
        "overlap_param_gather": parallel.overlap_param_gather,
    }
    return get_megatron_optimizer(OptimizerConfig(**{**fields, **overrides}), chunks)


def build_scheduler(optimizer: MegatronOptimizer, settings: OptimizerSettings) -> OptimizerParamScheduler:
    """Warm-up and decay, counted in the optimizer steps of a phase."""
    assert settings.train_iters is not None
    decay_steps = settings.lr_decay_iters or settings.train_iters
    for group in optimizer.param_groups:  # a group's own bounds come before the scheduler's
        group["max_lr"], group["min_lr"] = settings.lr, settings.min_lr
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=min(settings.lr_warmup_iters, max(decay_steps - 1, 0)),
        lr_decay_steps=max(decay_steps, 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=max(decay_steps // 10, 1),
        lr_wsd_decay_style="linear",
    )


def reset_optimizer(optimizer: MegatronOptimizer) -> None:
    """Forget the moments of the gradients; weights stay."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            for name, value in state.items():
                if name != "master_param":  # Transformer Engine may keep the main weights here
                    value.zero_()  # the moments and torch's step
        for group in part.optimizer.param_groups:
            if "step" in group:  # Transformer Engine's
                group["step"] = 0


def _mend_distributed_optimizer_on_torch_adamw() -> None:
    """Make optimizer/distrib_optimizer.py save and load right where neither Transformer Engine nor Apex is installed.

    megatron-core 0.16.1 to 0.19.2 (lines of 0.16.1): state_dict asserts that the inner state exists (:641), which a
    fresh optimizer that is about to load has not; load_state_dict gives ALL parameters one shared `step` tensor (:825),
    which each of them then advances; _set_main_param_and_optimizer_states copies `step` too (:940), which is not in the
    checkpoint, and writes into a view of a leaf. Two of the three are silent: training goes on, with a wrong step.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(distrib_optimizer.DistributedOptimizer, "_gft_mended"):
        return
    cls = distrib_optimizer.DistributedOptimizer
    upstream_state_dict, upstream_load_state_dict = cls.state_dict, cls.load_state_dict

    def parameters(self: Any) -> Any:
        return (param for group in self.optimizer.param_groups for param in group["params"])

    def state_dict(self: Any) -> Any:
        for param in parameters(self):
            if not self.optimizer.state[param]:
                self.optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        return upstream_state_dict(self)

    def load_state_dict(self: Any, state: Any) -> None:
        upstream_load_state_dict(self, state)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                self.optimizer.state[param]["step"] = torch.tensor(float(group.get("step") or 0))

    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][index]
        with torch.no_grad():
            main_param.copy_(tensors["param"])
            for key in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[main_param][key].copy_(tensors[key])

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict
    cls._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    cls._gft_mended = True
