"""How a loss's coefficients are spread: additive shares, as a maximum or a quantile over micro-batches would not be."""

from __future__ import annotations

from torch import Tensor

from gft_megatron.losses.reduce import masked_mean

_ROUNDING = 1e-6  # a probability that rounding put above 1 is 1


def coefficient_shares(
    coefficient: Tensor,  # [n], at least 0
    mask: Tensor,  # [n]
    name: str = "coefficient",
    chosen: Tensor | None = None,  # [n] bool
) -> dict[str, Tensor]:
    """Shares of the unmasked tokens whose coefficient lies in [0, .1), [.1, .5), [.5, 1), is 1, is above 1.

    With `chosen`, only these tokens are in any of the five.
    """
    chosen = mask.bool() if chosen is None else chosen
    bounds = {
        "below_0.1": (-1.0, 0.1),
        "0.1_to_0.5": (0.1, 0.5),
        "0.5_to_1": (0.5, 1.0 - _ROUNDING),
        "one": (1.0 - _ROUNDING, 1.0 + _ROUNDING),
        "above_1": (1.0 + _ROUNDING, float("inf")),
    }
    return {
        f"{name}_{label}_frac": masked_mean(((coefficient >= low) & (coefficient < high) & chosen).float(), mask)
        for label, (low, high) in bounds.items()
    }
