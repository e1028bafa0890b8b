"""Losses by name. A new one is one file here, one line in `LOSSES` and one oracle test.

A loss maps `LossInputs` to (per-token loss [n], metrics): unreduced, 0 on masked positions; metrics are means over the
unmasked tokens of these inputs.
"""

import inspect

from gft_megatron.losses.chord import chord_phi
from gft_megatron.losses.cispo import cispo
from gft_megatron.losses.dft import dft
from gft_megatron.losses.eaft import eaft
from gft_megatron.losses.gft import gft
from gft_megatron.losses.grpo import grpo
from gft_megatron.losses.gspo import gspo
from gft_megatron.losses.inputs import (
    LossFn,
    LossInputs,
    batch_sums,
    default_schedules,
    is_token_local,
    natural_responses,
    required_inputs,
)
from gft_megatron.losses.luffy import luffy
from gft_megatron.losses.ppo import ppo
from gft_megatron.losses.probability import probability
from gft_megatron.losses.psft import psft
from gft_megatron.losses.reinforce import reinforce
from gft_megatron.losses.sft import sft

LOSSES: dict[str, LossFn] = {
    "gft": gft,
    "dft": dft,
    "sft": sft,
    "probability": probability,
    "psft": psft,
    "eaft": eaft,
    "chord_phi": chord_phi,
    "luffy": luffy,
    "grpo": grpo,
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "reinforce": reinforce,
}


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


__all__ = [
    "LOSSES",
    "LossFn",
    "LossInputs",
    "batch_sums",
    "default_schedules",
    "is_token_local",
    "loss_hyper_parameters",
    "natural_responses",
    "required_inputs",
]
