"""Every setting of a run: one field, one flag, one docstring line.

Flags are flat, in Megatron's spelling where Megatron has the idea and in slime's where slime has it. The
hyper-parameters of the losses are not written here: they are read from the signatures in `losses/`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from gft_megatron.advantages import AdvantageNormalization
from gft_megatron.config_checks import check_config
from gft_megatron.losses import (
    LOSSES,
    LossFn,
    batch_sums_of_policy,
    default_schedules,
    loss_hyper_parameters,
    natural_comparison,
    natural_responses,
    required_inputs,
)
from gft_megatron.losses.reduce import Reduction
from gft_megatron.losses.terms import KlEstimator, with_terms
from gft_megatron.rollout.engine import SamplingParams
from gft_megatron.rollout.recipe import RolloutRules
from gft_megatron.schedules import Schedule, parse_schedules


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model."""

    hf_checkpoint: str
    """Hugging Face folder of the model: config.json, tokenizer, safetensors."""
    hf_export: str | None = None
    """Write the trained model as a Hugging Face folder here."""
    ref_hf_checkpoint: str | None = None
    """Hugging Face folder of the frozen reference model, of the same shape; default the weights that training starts
    from."""
    pretrained_checkpoint: str | None = None
    """Start from the weights of this Megatron checkpoint (torch_dist: converted, or saved by a training run under any
    layout); --hf-checkpoint then gives only config and tokenizer."""
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
    expert_model_parallel_size: int = 1
    """Ranks that the experts of a layer are divided over; data-parallel ranks otherwise."""
    expert_tensor_parallel_size: int = 1
    """Ranks that share each expert."""
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
    token_scores: Literal["data", "excess"] = "data"
    """Where SFT-GO's token groups come from: scores in the rows (tools/score_tokens.py), or the loss of each token in
    excess of the reference model's."""
    eta: float = 0.5
    """Share of a response's tokens that count as important (SFT-GO)."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Groups."""

    rollout_batch_size: int = 128
    """Prompts, hence groups, of one rollout."""
    n_expert: int | None = None
    """Expert responses in a group; default 1, for losses of group RL 0."""
    n_teacher: int | None = None
    """Teacher responses in a group; default 3 for losses of mixed groups, else 0."""
    n_self: Annotated[int | None, tyro.conf.arg(aliases=("--n-samples-per-prompt",))] = None
    """Own samples in a group, and in place of missing recorded responses; default 4 for losses of mixed groups, 8 for
    group RL, 0 for the SFT family."""
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
    advantage_ddof: Literal[0, 1] = 1
    """1 divides a group's variance by n - 1, 0 by n."""
    advantage_scope: Literal["group", "source"] | None = None
    """Compare a response with all of its group, or with those of its own source only; default as the loss declares:
    source for group RL and CHORD, else group."""
    overlong_buffer_len: int = 0
    """Last tokens of --rollout-max-response-len in which an own sample's reward falls by up to 1 (DAPO); 0: none."""
    mask_truncated: bool = False
    """Leave out own samples that did not end (DAPO's overlong filtering)."""
    skip_zero_variance: bool = True
    """Leave out groups whose rewards are all equal: they carry no gradient. With hints they do, and are kept."""
    refill_groups: bool = False
    """Draw more prompts until --rollout-batch-size groups with unequal rewards are there."""
    refill_budget: int = 10
    """Most prompts drawn for a rollout, in --rollout-batch-sizes; with what there is then, the run goes on."""
    over_sampling_batch_size: int | None = None
    """Prompts begun for a rollout; drawing stops when --rollout-batch-size groups are done, and the rest comes first
    in the next rollout. Default --rollout-batch-size. Needs servers."""
    partial_rollout: bool = False
    """Go on with samples that over-sampling stopped half-way, instead of drawing them anew; one of --max-staleness is
    theirs."""
    max_staleness: int = 0
    """Most rollouts that are trained on between the drawing of a sample's first token and its own training. 0:
    generation and training take turns; else the servers draw so many rollouts ahead. --tis-clip corrects for it."""
    hint_segments: int = 0
    """Pieces that an expert's response is cut into, the first of which own samples may begin with (UFT); the paper's
    number is 5. 0: no hints."""
    hint_share: float = 0.0
    """Chance of each piece to be given; the paper's is --schedule hint_share=0.95:0.05:cosine:300."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Rollout engine."""

    rollout_engine: Literal["local", "sglang"] = "local"
    """Who draws own samples: a transformers model in each training process, or SGLang servers."""
    sglang_urls: tuple[str, ...] = ()
    """Servers that are running already, as http://HOST:PORT; their keys are in the environment."""
    sglang_discovery_file: str | None = None
    """File with such addresses, one a line; read again when it changes."""
    sglang_router_url: str | None = None
    """An sglang-router in front of them that requests go through; everything else goes straight to the servers."""
    sglang_lost_timeout_sec: float = 90.0
    """The run ends when no server could draw samples for so long; started again, it goes on."""
    sglang_workers_per_node: int = 0
    """Servers that this run starts, on each of its nodes, and stops."""
    sglang_python: str | None = None
    """Python interpreter of SGLang's environment, for servers started here; default $GFT_SGLANG_PYTHON."""
    sglang_tensor_parallel_size: int = 1
    """GPUs of each server started here."""
    sglang_gpus: tuple[int, ...] = ()
    """GPUs of each node for the servers started there, divided among them in order; default 0, 1, ..."""
    sglang_port: int = 30000
    """Port of the first server started on a node; the others take those that follow."""
    sglang_args: tuple[str, ...] = ()
    """More flags of sglang.launch_server, for servers started here."""
    colocate: bool = False
    """Servers are on the trainer's own GPUs: they free their memory while it trains. For servers not started here:
    start them with --enable-memory-saver."""
    weight_sync: Literal["disk", "distributed", "tensor"] = "disk"
    """How new weights get to the servers: as files, by broadcast (NCCL, gloo), or in memory on the same host."""
    weight_sync_dir: str | None = None
    """Folder that trainer and servers see, for --weight-sync disk; default RUN_DIR/weights."""
    weight_sync_bucket_mib: int = 512
    """Weights are handed over in pieces of at most this size, or of one tensor."""


_ScheduleStyle = Literal["constant", "cosine", "linear", "inverse-square-root", "WSD"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer."""

    train_iters: int | None = None
    """Optimizer steps; with --phases it is their sum."""
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


@dataclass(frozen=True, kw_only=True)
class _LossSettings:
    loss: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(LOSSES)}.", metavar="NAME")] = "gft"
    loss_reduction: Reduction = "token-mean"
    """One number from the losses of all tokens: their mean, the mean over responses of their means, or the sum over
    tokens divided by responses times --rollout-max-response-len (Dr. GRPO)."""
    batch_statistics: Literal["exact", "previous-step"] = "exact"
    """Where losses that compare a response with the global batch (CADFT, SFT-GO) know it from: a forward-only pass
    before each step, or the step before, which costs nothing and is an approximation."""
    schedule: tuple[str, ...] = ()
    """Numbers that change: NAME=START:END:SHAPE[:STEPS[:WARMUP]] with shapes linear, cosine, step."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference model."""
    kl_estimator: KlEstimator = "k3"
    """How the divergence is estimated from the drawn tokens."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Add the divergence to the loss, or take it from the rewards of own samples."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    mix_loss: str | None = None
    """A loss of the SFT family that recorded responses get beside --loss."""
    mix_coef: float = 0.1
    """Its weight; --schedule mix_coef=1:0:linear goes from imitation to reinforcement."""


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
    _loss_fields(),
    bases=(_LossSettings,),
    frozen=True,
    kw_only=True,
    namespace={"__doc__": "Loss."},
)


@dataclass(frozen=True, kw_only=True)
class RewriteConfig:
    """Rewriting (CADFT)."""

    rewrite_interval: int = 0
    """Steps between rewritings of the recorded responses that fit the policy worst; the paper's is 1000. 0: none."""
    rewrite_warmup: float = 3000
    """Steps before the first rewriting; below 1, a share of the phase."""
    rewrite_share: float = 0.005
    """Share of the recorded responses seen so far that is considered."""
    rewrite_probability: float = 0.5
    """Chance that one of these is replaced."""
    rewrite_temperature: float = 0.7
    """Sampling temperature of rewrites."""
    rewrite_top_p: float = 0.9
    """Nucleus sampling of rewrites."""


@dataclass(frozen=True, kw_only=True)
class PhasesConfig:
    """Phases."""

    phases: tuple[str, ...] = ()
    """Losses one after the other in one run: LOSS:STEPS[:FLAG=VALUE...] with commas between them, as in
    sft:200,gft:400:lr=1e-6,grpo:200:optimizer=reset; (sft:10,grpo:10)*20 interleaves."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Group Fine-Tuning on Megatron-Core."""

    model: ModelConfig
    parallel: ParallelConfig
    data: DataConfig
    rollout: RolloutConfig
    engine: EngineConfig
    loss: LossConfig  # type: ignore[valid-type]
    rewrite: RewriteConfig
    phases: PhasesConfig
    optimizer: OptimizerSettings
    output: OutputConfig

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def group_sizes(self) -> GroupSizes:
        """Responses of each source in a group: as set, else what the loss is made for."""
        wanted = (self.rollout.n_expert, self.rollout.n_teacher, self.rollout.n_self)
        natural = _NATURAL_GROUPS[natural_responses(LOSSES[self.loss.loss])]
        if self.loss.mix_loss is not None:
            natural = (max(natural[0], 1), *natural[1:])
        return GroupSizes(*(size if given is None else given for given, size in zip(wanted, natural, strict=True)))

    @property
    def rollout_rules(self) -> RolloutRules:
        """How many groups a rollout has, and which."""
        rollout = self.rollout
        return RolloutRules(
            num_groups=rollout.rollout_batch_size,
            num_draws=rollout.over_sampling_batch_size or rollout.rollout_batch_size,
            # Weighed alike, or begun by a hint, a group teaches something whatever its rewards.
            skip_zero_variance=rollout.skip_zero_variance and self.needs_advantages and not rollout.hint_segments,
            mask_truncated=rollout.mask_truncated,
            refill=rollout.refill_groups,
            most_draws=rollout.refill_budget * rollout.rollout_batch_size,
            keep_partial=rollout.partial_rollout,
            max_staleness=rollout.max_staleness,
        )

    @property
    def rollouts_ahead(self) -> int:
        """Rollouts that are drawn while others are trained on."""
        return self.rollout.max_staleness - self.rollout.partial_rollout

    @property
    def needs_advantages(self) -> bool:
        return "advantages" in required_inputs(self.loss_function)

    @property
    def steps_per_rollout(self) -> int:
        return self.optimizer.num_steps_per_rollout * self.optimizer.num_epochs_per_rollout

    @property
    def hyper_names(self) -> list[str]:
        """Hyper-parameters of --loss, then those that only --mix-loss has."""
        hyper = loss_hyper_parameters()
        return list({**hyper[self.loss.loss], **(hyper[self.loss.mix_loss] if self.loss.mix_loss else {})})

    @property
    def compares_own_source(self) -> bool:
        """Whether advantages compare a response with those of its own source only."""
        return (self.rollout.advantage_scope or natural_comparison(LOSSES[self.loss.loss])) == "source"

    @property
    def loss_hyper(self) -> dict[str, Any]:
        """The hyper-parameters that were set."""
        return {key: value for key in self.hyper_names if (value := getattr(self.loss, key)) is not None}

    def hyper_at(self, step: int) -> dict[str, Any]:
        """What `loss_function` is called with in step `step`, counted from 0; what is absent has its default."""
        names = [*self.loss_hyper, *self.terms, *(name for name in self.schedules if name in self.hyper_names)]
        return {name: self.value_at(name, step) for name in dict.fromkeys(names)}

    def value_at(self, name: str, step: int) -> Any:
        """A hyper-parameter, a coefficient or hint_share in step `step`, counted from 0."""
        schedule = self.schedules.get(name)
        if schedule is not None:
            return schedule.at(step, self.train_iters)
        return self.rollout.hint_share if name == "hint_share" else getattr(self.loss, name)

    @property
    def terms(self) -> list[str]:
        """The coefficients of what is added to --loss."""
        there_is = {
            "kl_coef": self.loss.kl_in == "loss" and self.changes("kl_coef"),
            "entropy_coef": self.changes("entropy_coef"),
            "mix_coef": self.loss.mix_loss is not None,  # also at 0: its hyper-parameters may be set
        }
        return [name for name, is_there in there_is.items() if is_there]

    @functools.cached_property
    def loss_function(self) -> LossFn:
        """--loss, with what is added to it."""
        loss = LOSSES[self.loss.loss]
        if not self.terms:
            return loss
        mix = LOSSES[self.loss.mix_loss] if "mix_coef" in self.terms else None
        return with_terms(loss, terms=self.terms, kl_estimator=self.loss.kl_estimator, mix=mix)

    @functools.cached_property
    def schedules(self) -> dict[str, Schedule]:
        """--schedule, and the loss's own schedules of what was not set."""
        own = [f"{name}={text}" for name, text in default_schedules(LOSSES[self.loss.loss]).items()]
        unset = {name: schedule for name, schedule in parse_schedules(own).items() if name not in self.loss_hyper}
        return {**unset, **parse_schedules(self.loss.schedule)}

    @property
    def needs_reference(self) -> bool:
        """Whether something is compared with the frozen reference model."""
        return bool(required_inputs(self.loss_function) & {"ref_log_probs", "ref_kl"}) or (
            self.changes("kl_coef") or self.groups_by_excess
        )

    @property
    def groups_by_excess(self) -> bool:
        """Whether token groups are made in the run, not read from the data."""
        return self.data.token_scores == "excess" and "token_groups" in required_inputs(self.loss_function)

    @property
    def groups_from_data(self) -> bool:
        """Whether token groups are read from the data."""
        return self.data.token_scores == "data" and "token_groups" in required_inputs(self.loss_function)

    @property
    def reads_step_before(self) -> bool:
        """Whether the loss takes its sums over the batch from the step before. Mere counts are exact, and free, anyway:
        those of a batch without a hint or a recorded response would blow up the next one's."""
        return self.loss.batch_statistics == "previous-step" and batch_sums_of_policy(self.loss_function)

    def changes(self, name: str) -> bool:
        """Whether this coefficient is, or becomes, anything but 0."""
        return getattr(self.loss, name) != 0 or name in self.schedules

    @property
    def train_iters(self) -> int:
        assert self.optimizer.train_iters is not None  # with --phases: of a phase's own configuration
        return self.optimizer.train_iters

    @property
    def sampling(self) -> SamplingParams:
        """How own samples are drawn."""
        rollout = self.rollout
        return SamplingParams(rollout.rollout_max_response_len, rollout.rollout_temperature, rollout.rollout_top_p)

    def rewrites_between(self, before: int, now: int) -> bool:
        """Whether a rewriting was due in the steps (before, now] of the phase."""
        interval, warmup = self.rewrite.rewrite_interval, self.rewrite.rewrite_warmup
        first = math.ceil(warmup * self.train_iters if warmup < 1 else warmup)
        return interval > 0 and now > first and max(before - first, 0) // interval < (now - first) // interval

    @property
    def rewrite_sampling(self) -> SamplingParams:
        """How rewrites are drawn."""
        return SamplingParams(
            self.rollout.rollout_max_response_len, self.rewrite.rewrite_temperature, self.rewrite.rewrite_top_p
        )

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


_NATURAL_GROUPS = {"recorded": (1, 0, 0), "mixed": (1, 3, 4), "own": (0, 0, 8)}


class GroupSizes(NamedTuple):
    """Responses in a group."""

    n_expert: int
    n_teacher: int
    n_self: int
