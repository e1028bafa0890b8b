"""Every setting of a run: one field, one flag, one docstring line.

Flags are flat, in Megatron's spelling where Megatron has the idea and in slime's where slime has it. The
hyper-parameters of the losses are not written here: they are read from the signatures in `losses/`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gft_megatron.advantages import AdvantageNormalization
from gft_megatron.losses import LOSSES, is_token_local


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model."""

    hf_checkpoint: str
    """Hugging Face folder of the model: config.json, tokenizer, safetensors."""
    hf_export: str | None = None
    """Write the trained model as a Hugging Face folder here."""
    random_init: bool = False
    """Take only config and tokenizer from --hf-checkpoint and start from random weights."""
    bf16: bool = False
    """Train in bfloat16 with fp32 main weights; default fp32."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this times the tensor-parallel size."""
    megatron: tuple[str, ...] = ()
    """Fields of Megatron's own configs, SECTION.FIELD=VALUE with sections transformer, optimizer, ddp."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are split into."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks on each pipeline stage (interleaved schedule)."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    sequence_parallel: bool = False
    """Split activations outside the attention and MLP over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the forward pass runs (distributed optimizer)."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data."""

    prompt_data: tuple[str, ...]
    """JSONL or Parquet files of training rows: prompt, label, responses?, metadata?."""
    eval_prompt_data: tuple[str, ...] = ()
    """The same for held-out prompts."""
    seq_length: int = 4096
    """Longest prompt + response, in tokens."""
    max_prompt_length: int | None = None
    """Longest prompt, in tokens; default --seq-length minus --rollout-max-response-len."""
    max_bad_row_frac: float = 0.01
    """Stop before training when a larger share of the rows is bad."""
    eta: float = 0.5
    """Share of a response's tokens that count as important (SFT-GO)."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Groups."""

    rollout_batch_size: int = 128
    """Prompts, hence groups, of one rollout."""
    n_expert: int = 1
    """Expert responses in a group."""
    n_teacher: int = 3
    """Teacher responses in a group."""
    n_self: Annotated[int, tyro.conf.arg(aliases=("--n-samples-per-prompt",))] = 4
    """Own samples in a group; missing recorded responses are replaced by more of them."""
    rollout_max_response_len: int = 1024
    """Longest response, in tokens."""
    rollout_temperature: float = 1.0
    """Sampling temperature; log-probs are taken at the same temperature."""
    rollout_top_p: float = 1.0
    """Nucleus sampling."""
    max_concurrent_samples: int = 256
    """Samples that one engine draws at a time."""
    rm_type: str = "math"
    """Reward: exact, math, or module:function."""
    advantage_normalization: AdvantageNormalization = "std"
    """Divide advantages by the group's standard deviation, or not; or compare a reward with those of the others."""
    skip_zero_variance: bool = True
    """Leave out groups whose rewards are all equal: they carry no gradient."""
    refill_groups: bool = False
    """Draw more prompts until --rollout-batch-size groups with unequal rewards are there."""


_ScheduleStyle = Literal["constant", "cosine", "linear", "inverse-square-root", "WSD"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer."""

    train_iters: int
    """Optimizer steps."""
    lr: float = 1e-6
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: _ScheduleStyle = "constant"
    """Shape of the decay."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_decay_iters: int | None = None
    """Steps until --min-lr is reached; default --train-iters."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    clip_grad: float = 1.0
    """Gradient norm is clipped to this; 0 turns it off."""
    adam_beta1: float = 0.9
    """AdamW's first moment."""
    adam_beta2: float = 0.999
    """AdamW's second moment."""
    num_steps_per_rollout: int = 1
    """Optimizer steps that the groups of one rollout are divided over. Groups left when --train-iters is reached go
    untrained."""
    num_epochs_per_rollout: int = 1
    """Times that the groups of one rollout are trained on."""
    max_tokens_per_gpu: int | None = None
    """Tokens of a packed micro-batch, over all context-parallel ranks; default --seq-length."""
    micro_batch_size: int | None = None
    """Most sequences in a packed micro-batch; default no limit but the tokens."""
    fused_linear_loss: bool = False
    """Never hold the logits of a micro-batch. Saves memory where more than about 2000 response tokens are in one, and
    time where most tokens are prompt or padding."""
    seed: int = 1234
    """Seed of initialisation, data order and sampling."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Output."""

    run_dir: str = "runs/gft"
    """Folder of this run: configuration, metrics, curves, checkpoints."""
    save: str | None = None
    """Checkpoint folder; default RUN_DIR/checkpoints. A run restarted with the same command resumes from it."""
    load: str | None = None
    """Start from the newest checkpoint here when --save has none yet."""
    save_interval: int = 50
    """Steps between checkpoints; 0 saves none."""
    keep_last: int = 2
    """Checkpoints kept."""
    eval_interval: int = 50
    """Steps between evaluations; the first comes before step 1, one more after the last; 0: none."""
    n_samples_per_eval_prompt: int = 8
    """Samples of each held-out prompt (avg@k, pass@k)."""
    log_interval: int = 1
    """Steps between lines in a log."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""


def loss_hyper_parameters() -> dict[str, dict[str, inspect.Parameter]]:
    """Hyper-parameters of each loss: the keyword-only parameters of its function."""
    return {
        name: {
            key: parameter
            for key, parameter in inspect.signature(loss, eval_str=True).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for name, loss in LOSSES.items()
    }


def _loss_fields() -> list[tuple[str, Any, Any]]:
    """One optional field for every hyper-parameter of any loss; None means the loss's own default."""
    users: dict[str, list[str]] = {}
    types: dict[str, Any] = {}
    for name, parameters in loss_hyper_parameters().items():
        for key, parameter in parameters.items():
            default = "" if parameter.default is None else f" (default {parameter.default})"
            users.setdefault(key, []).append(f"{name}{default}")
            types[key] = types.get(key, parameter.annotation) | parameter.annotation
    return [
        (key, Annotated[types[key] | None, tyro.conf.arg(help=f"Hyper-parameter of {', '.join(users[key])}.")], None)
        for key in users
    ]


LossConfig = dataclasses.make_dataclass(
    "LossConfig",
    [
        (
            "loss",
            Annotated[str, tyro.conf.arg(help=f"One of {', '.join(LOSSES)}.", metavar="NAME")],
            "gft",
        ),
        *_loss_fields(),
    ],
    frozen=True,
    kw_only=True,
    namespace={"__doc__": "Loss."},
)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Group Fine-Tuning on Megatron-Core."""

    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    rollout: RolloutConfig
    loss: LossConfig  # type: ignore[valid-type]
    optimizer: OptimizerSettings
    output: OutputConfig

    def __post_init__(self) -> None:
        _require_known_loss(self.loss)
        _require_whole_sequences(self)
        _require_sizes(self)
        _require_consistent_rollout(self)

    @property
    def loss_hyper(self) -> dict[str, Any]:
        """The chosen loss's hyper-parameters that were set."""
        return {
            key: value
            for key in loss_hyper_parameters()[self.loss.loss]
            if (value := getattr(self.loss, key)) is not None
        }

    @property
    def max_prompt_length(self) -> int:
        if self.data.max_prompt_length is not None:
            return self.data.max_prompt_length
        return self.data.seq_length - self.rollout.rollout_max_response_len

    @property
    def max_tokens_per_micro_batch(self) -> int:
        return self.optimizer.max_tokens_per_gpu or self.data.seq_length

    @property
    def checkpoint_dir(self) -> Path:
        return Path(self.output.save or Path(self.output.run_dir) / "checkpoints")


def _require_known_loss(loss: Any) -> None:
    hyper = loss_hyper_parameters()
    if loss.loss not in hyper:
        raise ValueError(f"--loss {loss.loss}: unknown; the losses are {', '.join(hyper)}")
    for field in dataclasses.fields(loss):
        if field.name not in ("loss", *hyper[loss.loss]) and getattr(loss, field.name) is not None:
            raise ValueError(f"{flag_of(field.name)} has no meaning for --loss {loss.loss}")


def _require_whole_sequences(config: RunConfig) -> None:
    """A context-parallel rank holds some chunks of each sequence (data/packing.py)."""
    size = config.parallel.context_parallel_size
    if size > 1 and not is_token_local(LOSSES[config.loss.loss]):
        raise ValueError(
            f"--loss {config.loss.loss} needs whole sequences on each rank; --context-parallel-size is {size}, "
            f"it has to be 1"
        )


def _require_sizes(config: RunConfig) -> None:
    at_least_one = {
        config.parallel: ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        config.data: ("seq_length",),
        config.rollout: ("rollout_batch_size", "rollout_max_response_len", "max_concurrent_samples"),
        config.optimizer: ("num_steps_per_rollout", "num_epochs_per_rollout"),
        config.output: ("keep_last", "n_samples_per_eval_prompt", "log_interval"),
    }
    for section, names in at_least_one.items():
        for name in names:
            if getattr(section, name) < 1:
                raise ValueError(f"{flag_of(name)} is {getattr(section, name)}; it has to be at least 1")
    for name in ("n_expert", "n_teacher", "n_self"):
        if getattr(config.rollout, name) < 0:
            raise ValueError(f"{flag_of(name)} is {getattr(config.rollout, name)}; it cannot be negative")
    for section, name in (
        (config.model, "make_vocab_size_divisible_by"),
        (config.optimizer, "max_tokens_per_gpu"),
        (config.optimizer, "micro_batch_size"),
    ):
        value = getattr(section, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag_of(name)} is {value}; it has to be at least 1")
    if not 0 < config.rollout.rollout_temperature < math.inf:
        raise ValueError(f"--rollout-temperature is {config.rollout.rollout_temperature}; it has to be positive")
    if not 0 < config.rollout.rollout_top_p <= 1:
        raise ValueError(f"--rollout-top-p is {config.rollout.rollout_top_p}; it has to be above 0 and at most 1")
    if not 0 < config.data.eta < 1:
        raise ValueError(f"--eta is {config.data.eta}; it has to be above 0 and below 1")
    if not 0 < config.optimizer.lr < math.inf:
        raise ValueError(f"--lr is {config.optimizer.lr}; it has to be positive")
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    if virtual is not None and (virtual < 2 or config.parallel.pipeline_model_parallel_size < 2):
        raise ValueError(
            f"--virtual-pipeline-model-parallel-size {virtual} needs at least 2 chunks and "
            f"--pipeline-model-parallel-size of at least 2"
        )
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        raise ValueError("--sequence-parallel needs --tensor-model-parallel-size of at least 2")
    if config.parallel.overlap_param_gather and not config.parallel.use_distributed_optimizer:
        raise ValueError("--overlap-param-gather needs --use-distributed-optimizer")


def _require_consistent_rollout(config: RunConfig) -> None:
    rollout = config.rollout
    if rollout.n_expert + rollout.n_teacher + rollout.n_self == 0:
        raise ValueError("--n-expert, --n-teacher and --n-self are all 0: a group needs at least one response")
    if config.max_prompt_length < 1:
        raise ValueError(
            f"--seq-length {config.data.seq_length} leaves no room for a prompt beside "
            f"--rollout-max-response-len {rollout.rollout_max_response_len}"
        )
    if config.max_prompt_length + rollout.rollout_max_response_len > config.data.seq_length:
        raise ValueError(
            f"--max-prompt-length {config.max_prompt_length} + --rollout-max-response-len "
            f"{rollout.rollout_max_response_len} exceed --seq-length {config.data.seq_length}"
        )
    if config.max_tokens_per_micro_batch < config.data.seq_length:
        raise ValueError(
            f"--max-tokens-per-gpu {config.optimizer.max_tokens_per_gpu} is less than --seq-length "
            f"{config.data.seq_length}: the longest sequence would not fit into a micro-batch"
        )
    if rollout.rollout_batch_size < config.optimizer.num_steps_per_rollout:
        raise ValueError(
            f"--rollout-batch-size {rollout.rollout_batch_size} groups cannot be divided over "
            f"--num-steps-per-rollout {config.optimizer.num_steps_per_rollout} steps"
        )


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")
