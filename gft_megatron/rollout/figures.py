"""What the samples of an evaluation say about a model: how often it is right, and how differently it answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from gft_megatron.groups import Sample

_SUMS = (
    "prompts",
    "answered",
    "solved",
    "samples",
    "rewards",
    "tokens",
    "truncated",
    "distinct_correct",
    "zero_std",
    "surprise",
    "drawn_tokens",
)


def evaluation_sums(samples_of_prompts: Iterable[Sequence[Sample]]) -> list[float]:
    """Additive over prompts, so that ranks can sum what each of them saw."""
    return np.sum([_of_prompt(samples) for samples in samples_of_prompts] or [[0.0] * len(_SUMS)], axis=0).tolist()


def evaluation_figures(sums: Sequence[float], num_samples: int) -> dict[str, float]:
    """The figures of `evaluation_sums`, k = num_samples of each prompt. Samples that failed are left out and counted.

    eval/accuracy_avg@k: mean reward; eval/accuracy_pass@k: share of the prompts with any reward above 0;
    eval/distinct_correct: different texts with a reward above 0, mean over prompts; eval/zero_std_frac: share of the
    prompts whose samples all have one reward, so that a group of them would have no advantage; eval/entropy_mean: mean
    of -log p over the drawn tokens, which estimates the policy's entropy per token (where --rollout-top-p is 1).
    """
    total = dict(zip(_SUMS, sums, strict=True))
    figures = {
        "eval/num_prompts": total["prompts"],
        "eval/failed_samples": total["prompts"] * num_samples - total["samples"],
    }
    if not total["samples"]:  # an accuracy of 0 would be a claim about the model
        return figures
    if total["drawn_tokens"]:
        figures["eval/entropy_mean"] = total["surprise"] / total["drawn_tokens"]
    return {
        f"eval/accuracy_avg@{num_samples}": total["rewards"] / total["samples"],
        f"eval/accuracy_pass@{num_samples}": total["solved"] / total["answered"],
        "eval/distinct_correct": total["distinct_correct"] / total["answered"],
        "eval/zero_std_frac": total["zero_std"] / total["answered"],
        "eval/response_length_mean": total["tokens"] / total["samples"],
        "eval/truncated_frac": total["truncated"] / total["samples"],
        **figures,
    }


def _of_prompt(samples: Sequence[Sample]) -> list[float]:
    rewards = [sample.reward for sample in samples]
    drawn = [sample.rollout_log_probs for sample in samples if sample.rollout_log_probs is not None]
    return [
        1,
        bool(samples),
        any(reward > 0 for reward in rewards),
        len(samples),
        sum(rewards),
        sum(len(sample.token_ids) for sample in samples),
        sum(sample.truncated for sample in samples),
        len({sample.text for sample in samples if sample.reward > 0}),
        len(set(rewards)) == 1,
        -float(sum(log_probs.sum(dtype=np.float64) for log_probs in drawn)),
        sum(map(len, drawn)),
    ]
