"""What a configuration must not be, before anything is read or built: one line each, with the flags' names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gft_megatron.losses import (
    LOSSES,
    batch_sums_of_this_batch,
    is_of_token_mean,
    loss_hyper_parameters,
    natural_responses,
    required_inputs,
)
from gft_megatron.losses.terms import COEFFICIENTS
from gft_megatron.losses.trial import try_loss
from gft_megatron.schedules import parse_schedules

if TYPE_CHECKING:
    from gft_megatron.config import RunConfig


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_config(config: RunConfig) -> None:
    """
    Raises:
        ValueError: something is out of range or contradicts something else.
    """
    _require_sizes(config)
    _require_consistent_rollout(config)
    _require_servers(config)
    if config.phases.phases:  # each phase has a configuration of its own, which is checked as this one
        if config.optimizer.train_iters is not None:
            raise ValueError("--train-iters beside --phases: the phases say how long each of them is")
        return
    if config.optimizer.train_iters is None:
        raise ValueError("--train-iters is missing: the number of optimizer steps (or --phases)")
    _require_known_loss(config)
    _require_groups(config)
    _require_hints(config)
    _require_token_groups(config)
    _require_reference(config)
    _try_hyper_parameters(config)


def _require_known_loss(config: RunConfig) -> None:
    loss = config.loss
    for flag, name in (("--loss", loss.loss), ("--mix-loss", loss.mix_loss)):
        if name is not None and name not in LOSSES:
            raise ValueError(f"{flag} {name}: unknown; the losses are {', '.join(LOSSES)}")
    if loss.mix_loss is not None and natural_responses(LOSSES[loss.mix_loss]) != "recorded":
        fit = ", ".join(name for name, function in LOSSES.items() if natural_responses(function) == "recorded")
        raise ValueError(f"--mix-loss {loss.mix_loss}: not a loss of recorded responses; these are {fit}")
    known = config.hyper_names
    for name in dict.fromkeys(key for hyper in loss_hyper_parameters().values() for key in hyper):
        if name not in known and getattr(loss, name) is not None:
            raise ValueError(f"{flag_of(name)} has no meaning for --loss {loss.loss}")
    parameters = [item for hyper in loss_hyper_parameters().values() for item in hyper.items()]
    switches = {name for name, parameter in parameters if parameter.annotation is bool}
    for name in parse_schedules(loss.schedule):
        if name not in (*known, *COEFFICIENTS, "hint_share"):
            raise ValueError(
                f"--schedule {name}: --loss {loss.loss} has no such number; it has "
                f"{', '.join((*known, *COEFFICIENTS, 'hint_share'))}"
            )
        if name in switches:
            raise ValueError(f"--schedule {name}: it is True or False, and a schedule is of a number")
    if loss.batch_statistics == "previous-step" and batch_sums_of_this_batch(config.loss_function):
        raise ValueError(f"--loss {loss.loss} compares the responses of this batch: --batch-statistics has to be exact")
    divides_itself = is_of_token_mean(config.loss_function) or config.loss_hyper.get("separate_means", False)
    if loss.loss_reduction != "token-mean" and divides_itself:
        raise ValueError(
            f"--loss {loss.loss} has a mean of its own, which holds under --loss-reduction token-mean only"
        )
    for name in COEFFICIENTS:
        if not math.isfinite(getattr(loss, name)):
            raise ValueError(f"{flag_of(name)} is {getattr(loss, name)}; it has to be finite")


def _require_groups(config: RunConfig) -> None:
    sizes = config.group_sizes
    given = f"--n-expert {sizes.n_expert} --n-teacher {sizes.n_teacher} --n-self {sizes.n_self}"
    if sum(sizes) == 0:
        raise ValueError("--n-expert, --n-teacher and --n-self are all 0: a group needs at least one response")
    compares = "advantages" in required_inputs(LOSSES[config.loss.loss])
    is_alone = sum(sizes) == 1 or (sizes.n_self == 1 and config.compares_own_source)
    if compares and is_alone and config.rollout.advantage_normalization != "none":
        among_own = sizes.n_self and config.compares_own_source
        whom = "own samples with one another" if among_own else "the responses of a group"
        raise ValueError(
            f"--loss {config.loss.loss} compares {whom}, and {given} leave one in each: "
            f"add --n-self 4, or --advantage-normalization none for the bare reward"
        )
    # The only losses of which the step before says nothing: those that compare inside a group without rewards.
    contrasts = batch_sums_of_this_batch(LOSSES[config.loss.loss])
    if contrasts and (sizes.n_expert == 0 or sizes.n_teacher + sizes.n_self == 0):
        raise ValueError(
            f"--loss {config.loss.loss} holds an expert's response against the others of its group, and {given} leave "
            f"nothing to compare: add --n-expert 1 --n-self 4"
        )
    if natural_responses(LOSSES[config.loss.loss]) == "own" and sizes.n_self == 0:
        raise ValueError(f"--loss {config.loss.loss} learns from own samples, and {given} draw none: add --n-self 8")
    if config.loss.mix_loss is not None and sizes.n_expert + sizes.n_teacher == 0:
        raise ValueError(f"--mix-loss {config.loss.mix_loss} learns from recorded responses: add --n-expert 1")
    if config.changes("kl_coef") and config.loss.kl_in == "reward" and not (compares and sizes.n_self):
        raise ValueError(f"--kl-in reward: --loss {config.loss.loss} on {given} reads no rewards of own samples")


def _require_hints(config: RunConfig) -> None:
    segments, schedule = config.rollout.hint_segments, config.schedules.get("hint_share")
    shares = [config.rollout.hint_share] if schedule is None else [schedule.start, schedule.end]
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"--hint-share is {share}; it has to be between 0 and 1")
    if (segments > 0) != (max(shares) > 0):
        raise ValueError(
            f"--hint-segments {segments} with a --hint-share of {max(shares)}: hints take both, as in "
            f"--hint-segments 5 --schedule hint_share=0.95:0.05:cosine:300"
        )
    if segments and config.loss.loss != "uft":
        raise ValueError(
            f"--hint-segments: --loss {config.loss.loss} would take hints for tokens that the model drew; only uft "
            f"tells them apart"
        )
    if segments and config.loss.kl_in == "reward" and config.changes("kl_coef"):
        raise ValueError("--kl-in reward would count hints as tokens that the model drew: add --kl-in loss")


def _require_token_groups(config: RunConfig) -> None:
    # A --mix-loss sees recorded responses only.
    from_data = "token_groups" in required_inputs(LOSSES[config.loss.loss]) and not config.groups_by_excess
    if from_data and config.group_sizes.n_self:
        raise ValueError(
            f"--loss {config.loss.loss} needs a score for each token, and own samples have none: add --n-self 0, or "
            f"--token-scores excess"
        )
    if config.rewrite.rewrite_interval and not config.group_sizes.n_expert + config.group_sizes.n_teacher:
        raise ValueError("--rewrite-interval replaces recorded responses, and there are none: add --n-expert 1")


def _require_reference(config: RunConfig) -> None:
    if config.model.random_init and config.model.pretrained_checkpoint is not None:
        raise ValueError("--random-init and --pretrained-checkpoint exclude each other")
    if config.needs_reference and config.model.random_init and config.model.ref_hf_checkpoint is None:
        raise ValueError(
            f"--loss {config.loss.loss} with these settings compares the model with a reference, and --random-init has "
            f"none: add --ref-hf-checkpoint DIR"
        )
    if config.optimizer.fused_linear_loss:
        for flag, name in (("--loss", config.loss.loss), ("--mix-loss", config.loss.mix_loss)):
            if name is not None and required_inputs(LOSSES[name]) & {"ref_kl", "top_entropy"}:
                raise ValueError(f"{flag} {name} reads logits, which --fused-linear-loss never holds")


def _try_hyper_parameters(config: RunConfig) -> None:
    """The range of a hyper-parameter is known to its loss only."""
    steps = config.train_iters
    tries: list[dict[str, Any]] = [config.hyper_at(0), config.hyper_at(steps // 2), config.hyper_at(steps - 1)]
    for hyper in tries:
        try:
            try_loss(config.loss_function, hyper)
        except ValueError as error:
            raise ValueError(f"--loss {config.loss.loss}: {error}") from None


def _require_sizes(config: RunConfig) -> None:
    at_least_one = {
        config.model: ("make_vocab_size_divisible_by",),
        config.parallel: (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
            "expert_model_parallel_size", "expert_tensor_parallel_size",
        ),
        config.data: ("seq_length",),
        config.rollout: (
            "rollout_batch_size", "rollout_max_response_len", "max_concurrent_samples", "refill_budget",
        ),
        config.engine: ("weight_sync_bucket_mib", "sglang_tensor_parallel_size"),
        config.optimizer: (
            "num_steps_per_rollout", "num_epochs_per_rollout", "max_tokens_per_gpu", "micro_batch_size", "train_iters",
        ),
        config.output: ("keep_last", "n_samples_per_eval_prompt", "log_interval"),
    }  # fmt: skip
    not_negative = {
        config.rollout: (
            "n_expert", "n_teacher", "n_self", "overlong_buffer_len", "hint_segments", "max_staleness",
        ),
        config.engine: ("sglang_workers_per_node",),
    }  # fmt: skip
    for least, bound, sections in ((1, "has to be at least 1", at_least_one), (0, "cannot be negative", not_negative)):
        for section, names in sections.items():
            for name in names:
                value = getattr(section, name)
                if value is not None and value < least:
                    raise ValueError(f"{flag_of(name)} is {value}; it {bound}")
    if not 0 < config.rollout.rollout_temperature < math.inf:
        raise ValueError(f"--rollout-temperature is {config.rollout.rollout_temperature}; it has to be positive")
    if not 0 < config.rollout.rollout_top_p <= 1:
        raise ValueError(f"--rollout-top-p is {config.rollout.rollout_top_p}; it has to be above 0 and at most 1")
    rewrite = config.rewrite
    for name, value, least, most in (
        ("rewrite_interval", rewrite.rewrite_interval, 0, math.inf),
        ("rewrite_warmup", rewrite.rewrite_warmup, 0, math.inf),
        ("rewrite_share", rewrite.rewrite_share, 0, 1),
        ("rewrite_probability", rewrite.rewrite_probability, 0, 1),
        ("rewrite_temperature", rewrite.rewrite_temperature, 0, math.inf),
        ("rewrite_top_p", rewrite.rewrite_top_p, 0, 1),
    ):
        if not least <= value <= most or math.isinf(value):
            bounds = f"at least {least}" if math.isinf(most) else f"between {least} and {most}"
            raise ValueError(f"{flag_of(name)} is {value}; it has to be finite and {bounds}")
    if not 0 < config.data.eta < 1:
        raise ValueError(f"--eta is {config.data.eta}; it has to be above 0 and below 1")
    if not 0 < config.optimizer.lr < math.inf:
        raise ValueError(f"--lr is {config.optimizer.lr}; it has to be positive")
    if not 0 <= config.optimizer.min_lr <= config.optimizer.lr:
        raise ValueError(
            f"--min-lr is {config.optimizer.min_lr}; it has to be between 0 and --lr, {config.optimizer.lr}"
        )
    if not 0 <= config.optimizer.weight_decay < math.inf:
        raise ValueError(f"--weight-decay is {config.optimizer.weight_decay}; it has to be finite and at least 0")
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


def _require_servers(config: RunConfig) -> None:
    rollout, engine = config.rollout, config.engine
    if not 0 < engine.sglang_lost_timeout_sec < math.inf:
        raise ValueError(f"--sglang-lost-timeout-sec is {engine.sglang_lost_timeout_sec}; it has to be positive")
    over_sampling = rollout.over_sampling_batch_size
    if over_sampling is not None and over_sampling < rollout.rollout_batch_size:
        raise ValueError(
            f"--over-sampling-batch-size {over_sampling} is less than --rollout-batch-size {rollout.rollout_batch_size}"
        )
    if rollout.partial_rollout and not (rollout.max_staleness and over_sampling is not None):
        raise ValueError(
            "--partial-rollout goes on with samples of older weights that over-sampling stopped: it needs "
            "--over-sampling-batch-size and --max-staleness of at least 1"
        )
    sources = {
        "--sglang-urls": bool(engine.sglang_urls),
        "--sglang-discovery-file": engine.sglang_discovery_file is not None,
        "--sglang-workers-per-node": engine.sglang_workers_per_node > 0,
    }
    if engine.colocate and rollout.max_staleness:
        raise ValueError(
            "--colocate has the GPUs generate and train in turns; --max-staleness has them do both at once"
        )
    given = [flag for flag, is_given in sources.items() if is_given]
    if engine.rollout_engine == "sglang":
        if len(given) != 1:
            raise ValueError(
                f"--rollout-engine sglang needs to know its servers from exactly one of {', '.join(sources)}; "
                f"{' and '.join(given) or 'none'} is given"
            )
        return
    needs_servers = {
        **sources,
        "--sglang-router-url": engine.sglang_router_url is not None,
        "--colocate": engine.colocate,
        "--over-sampling-batch-size": over_sampling is not None,
        "--max-staleness": rollout.max_staleness > 0,
    }
    for flag, is_given in needs_servers.items():
        if is_given:
            raise ValueError(f"{flag} needs --rollout-engine sglang: the embedded engine takes turns with training")
