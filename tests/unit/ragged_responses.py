"""Responses of different lengths as the inputs of a loss, and the same as float64 tokens for oracles."""

import dataclasses
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gft_megatron.losses import LossInputs
from gft_megatron.losses.inputs import LossFn, batch_sums

EXPERT, TEACHER, SELF = 0, 1, 2
# Source, advantage, mean of log p, mean of log p / p_ref, tokens. The fourth has none, as a placeholder has none.
RESPONSES = [
    (EXPERT, 0.9, -0.4, 0.3, 5),
    (SELF, 1.3, -0.9, -0.8, 7),
    (TEACHER, -0.5, -2.5, 2.9, 4),
    (EXPERT, 0.4, 0.0, 0.0, 0),
    (SELF, -1.1, -1.4, 0.2, 6),
    (EXPERT, 0.7, -1.8, -0.6, 9),
    (SELF, 0.0, -0.2, 0.1, 3),
    (TEACHER, 0.2, -0.7, 0.0, 1),
]
NUM_PADDING = 2  # masked positions with junk after each response; like the packing's, they say they are of response 0
DIFFERENTIABLE = ("log_probs", "entropy", "ref_kl")
PER_TOKEN = (*DIFFERENTIABLE, "mask", "sequence_ids", "old_log_probs", "ref_log_probs", "rollout_log_probs")
PER_TOKEN = (*PER_TOKEN, "token_groups", "top_entropy")


def make_inputs(**changes) -> LossInputs:
    generator = torch.Generator().manual_seed(13)
    columns = {name: [] for name in PER_TOKEN}
    for i, (source, _, mean, lead, length) in enumerate(RESPONSES):
        uniform, normal = torch.rand(4, length, generator=generator), torch.randn(3, length, generator=generator)
        log_probs = mean * (0.1 + 1.8 * uniform[0])
        rollout = log_probs + 0.3 * normal[0]
        rollout[: 2 if source == SELF else length] = math.nan
        columns["mask"].append(torch.arange(length + NUM_PADDING) < length)
        columns["sequence_ids"].append(torch.tensor([i] * length + [0] * NUM_PADDING))
        for name, values, junk in (
            ("log_probs", log_probs, 1e30),
            ("entropy", 4.0 * uniform[1], -1e30),
            ("ref_kl", uniform[2], 1e30),
            ("top_entropy", 3.0 * uniform[2], -1e30),
            ("old_log_probs", log_probs - 0.6 * normal[1], -1e30),
            ("ref_log_probs", log_probs - lead - 0.9 * normal[2], -1e30),
            ("rollout_log_probs", rollout, 1e30),
            ("token_groups", (uniform[3] < 0.4).long() + 2 * (uniform[3] > 0.9).long(), -1),
        ):
            columns[name].append(torch.cat([values, values.new_full((NUM_PADDING,), junk)]))
    fields = {name: torch.cat(parts) for name, parts in columns.items()}
    for name in DIFFERENTIABLE:
        fields[name].requires_grad_()
    fields["sources"] = torch.tensor([response[0] for response in RESPONSES])
    fields["advantages"] = torch.tensor([response[1] for response in RESPONSES])
    fields["group_ids"] = (torch.arange(len(RESPONSES)) % 2).where(torch.tensor([r[4] > 0 for r in RESPONSES]), -1)
    return LossInputs(**fields | changes)


@dataclass
class Token:
    """One unmasked token; the first three fields are float64 leaves."""

    log_prob: Tensor
    entropy: Tensor
    ref_kl: Tensor
    old: float
    ref: float
    rollout: float
    group: int
    response: int
    source: int
    advantage: float

    @property
    def p(self) -> float:
        return math.exp(self.log_prob.item())

    @property
    def own(self) -> bool:
        return self.source == SELF

    @property
    def ratio(self) -> Tensor:
        return (self.log_prob - self.old).exp()


def tokens_of(inputs: LossInputs) -> dict[int, Token]:
    def leaf(values: Tensor, t: int) -> Tensor:
        return values.detach()[t].double().requires_grad_()

    return {
        t: Token(
            log_prob=leaf(inputs.log_probs, t),
            entropy=leaf(inputs.entropy, t),
            ref_kl=leaf(inputs.ref_kl, t),
            old=inputs.old_log_probs[t].item(),
            ref=inputs.ref_log_probs[t].item(),
            rollout=inputs.rollout_log_probs[t].item(),
            group=inputs.token_groups[t].item(),
            response=int(inputs.sequence_ids[t]),
            source=int(inputs.sources[inputs.sequence_ids[t]]),
            advantage=inputs.advantages[inputs.sequence_ids[t]].item(),
        )
        for t in inputs.mask.nonzero()[:, 0].tolist()
    }


def mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


def by_response(tokens: dict[int, Token]) -> dict[int, list[Token]]:
    found: dict[int, list[Token]] = {}
    for token in tokens.values():
        found.setdefault(token.response, []).append(token)
    return found


def assert_equals_oracle(
    loss: LossFn, inputs: LossInputs, hyper: dict, formula: Callable[[dict[int, Token]], dict[int, Tensor]]
) -> None:
    """Loss and its gradients in log_probs, entropy and ref_kl; `formula` gives each token's loss, in float64."""
    per_token, metrics = loss(inputs, **hyper)
    per_token.sum().backward()
    tokens = tokens_of(inputs)
    values = formula(tokens)
    sum(values.values()).backward()

    expected = {name: torch.zeros(len(inputs.mask), dtype=torch.float64) for name in ("loss", *DIFFERENTIABLE)}
    for t, token in tokens.items():
        expected["loss"][t] = values[t].detach()
        for name, leaf in zip(DIFFERENTIABLE, (token.log_prob, token.entropy, token.ref_kl), strict=True):
            expected[name][t] = 0.0 if leaf.grad is None else leaf.grad
    actual = {"loss": per_token.detach()}
    for name in DIFFERENTIABLE:
        gradient = getattr(inputs, name).grad
        actual[name] = torch.zeros_like(inputs.log_probs) if gradient is None else gradient
    for name, values in actual.items():
        # Ratios have the rounding of the difference of fp32 log-probs.
        torch.testing.assert_close(values.double(), expected[name], rtol=3e-6, atol=1e-7, msg=lambda m, n=name: n + m)
        assert (values[~inputs.mask] == 0).all(), name
    assert all(value.dim() == 0 and math.isfinite(value) and not value.requires_grad for value in metrics.values())


def gradients(loss: LossFn, inputs: LossInputs, **hyper) -> Tensor:
    """d sum of the loss / d log_probs."""
    inputs.log_probs.grad = None
    loss(inputs, **hyper)[0].sum().backward()
    return inputs.log_probs.grad.clone()


def of_responses(inputs: LossInputs, first: int, last: int) -> LossInputs:
    """A micro-batch of the responses [first, last) and the padding behind them, and of nothing else."""
    ends = [sum(response[4] + NUM_PADDING for response in RESPONSES[:i]) for i in (first, last)]
    part = inputs.at(torch.arange(*ends))
    fields = ("sources", "advantages", "group_ids")
    return dataclasses.replace(
        part,
        sequence_ids=(part.sequence_ids - first).clamp(min=0),
        **{name: getattr(inputs, name)[first:last] for name in fields},
    )


def add(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def on_context_ranks(loss: LossFn, inputs: LossInputs, positions: list[Tensor], **hyper) -> Tensor:
    """The loss [n] where each rank has the tokens at its positions only, one thread a rank."""
    meeting = threading.Barrier(len(positions))
    slots: list[Tensor | None] = [None] * len(positions)
    result = torch.full((len(inputs.mask),), math.nan)

    def run(rank: int) -> None:
        def context_sum(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            meeting.wait(10)
            total = sum(slots)
            meeting.wait(10)
            return total

        mine = dataclasses.replace(inputs.at(positions[rank]), context_sum=context_sum)
        sums = batch_sums(loss)
        if sums is not None:
            mine = dataclasses.replace(mine, batch=sums(mine))
        result[positions[rank]] = loss(mine, **hyper)[0].detach()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(positions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result
