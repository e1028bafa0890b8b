"""From a rollout to the inputs of its optimizer steps: packed micro-batches, and what forward-only passes say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from gft_megatron.config import RunConfig
from gft_megatron.groups import Batch, Source
from gft_megatron.losses import required_inputs
from gft_megatron.losses.reduce import response_weights
from gft_megatron.losses.terms import KlEstimator, kl_penalty
from gft_megatron.observe.metrics import Timings
from gft_megatron.rollout.recipe import GroupRecipe, recipe_advantages
from gft_megatron.training.excess import with_excess_groups
from gft_megatron.training.micro_batches import pack_for_this_replica, split_over_steps
from gft_megatron.training.passes import Chunks, Report, sum_over_replicas
from gft_megatron.training.reference import Reference
from gft_megatron.training.step import (
    Objective,
    StepInput,
    forward_log_probs,
    forward_only,
    known_inputs,
    sample_sums,
)


@dataclass(frozen=True)
class PreparedStep:
    """One optimizer step's samples, and this replica's part of them."""

    mini_batch: Batch
    inputs: list[StepInput]


def prepare_steps(
    batch: Batch, config: RunConfig, chunks: Chunks, objective: Objective, reference: Reference | None, timings: Timings
) -> list[PreparedStep]:
    """Divide the samples of a rollout over optimizer steps, pack them, and take old and reference log-probs."""
    reads = required_inputs(objective.loss)
    steps = [PreparedStep(part, pack(part, config)) for part in split_over_steps(batch, config.optimizer)]
    # With one step a rollout, the policy that is updated is the one that drew the samples: their ratio is 1.
    if len(steps) > 1 and "old_log_probs" in reads:
        with timings.measure("old_log_probs"):
            steps = [_with_old_log_probs(step, chunks, objective) for step in steps]
    if reads & {"ref_log_probs", "ref_kl"} or config.groups_by_excess:
        assert reference is not None
        with timings.measure("ref_log_probs"):
            steps = [
                dataclasses.replace(
                    step, inputs=reference.forward(chunks, step.inputs, objective, with_logits="ref_kl" in reads)
                )
                for step in steps
            ]
    if config.groups_by_excess:
        with timings.measure("token_groups"):
            steps = [
                dataclasses.replace(
                    step, inputs=with_excess_groups(step.mini_batch, step.inputs, chunks, objective, config.data.eta)
                )
                for step in steps
            ]
    return steps


def pack(batch: Batch, config: RunConfig) -> list[StepInput]:
    """This replica's micro-batches of the samples of one step."""
    lengths = batch.lengths - batch.prompt_lengths
    packed = pack_for_this_replica(
        batch,
        config.parallel,
        max_tokens=config.max_tokens_per_micro_batch,
        max_sequences=config.optimizer.micro_batch_size,
        weights=response_weights(lengths, config.loss.loss_reduction, config.rollout.rollout_max_response_len),
    )
    return list(map(StepInput, packed))


def _with_old_log_probs(step: PreparedStep, chunks: Chunks, objective: Objective) -> PreparedStep:
    old = forward_log_probs(chunks, step.inputs, objective)
    if old is None:
        return step
    inputs = [dataclasses.replace(item, old_log_probs=values) for item, values in zip(step.inputs, old, strict=True)]
    return dataclasses.replace(step, inputs=inputs)


def with_kl_in_rewards(
    batch: Batch,
    config: RunConfig,
    recipe: GroupRecipe,
    chunks: Chunks,
    objective: Objective,
    reference: Reference,
    *,
    coefficient: float,
) -> Batch:
    """Advantages of rewards from which each own sample's divergence from the reference was taken, summed over tokens.

    As PPO does with language models (arXiv:2203.02155 Eq. 2), but for a response as a whole: group advantages know no
    rewards of tokens.
    """
    inputs = reference.forward(chunks, pack(batch, config), objective, with_logits=False)
    divergence = _sample_divergence(chunks, inputs, objective, config.loss.kl_estimator).to(batch.rewards.dtype)
    own = batch.sources == int(Source.SELF)
    rewards = recipe.shaped_rewards(batch) - coefficient * divergence.where(own, 0.0)
    return dataclasses.replace(batch, advantages=recipe_advantages(rewards, batch.group_ids, batch.sources, recipe))


def _sample_divergence(
    chunks: Chunks, inputs: list[StepInput], objective: Objective, estimator: KlEstimator
) -> Tensor:  # [samples of the batch]
    def tell(output: Tensor, item: StepInput, log_probs: Tensor, entropy: Tensor) -> Report:
        known = known_inputs(item, output.device, None).with_policy(log_probs, entropy)
        return {"kl": sample_sums(kl_penalty(known, estimator=estimator), item.micro_batch)}

    return sum_over_replicas(forward_only(chunks, inputs, objective, tell))["kl"].cpu()
