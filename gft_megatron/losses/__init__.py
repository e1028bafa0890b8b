"""Losses by name. A new one is one file here, one line in `LOSSES` and one oracle test.

A loss maps `LossInputs` to (per-token loss [n], metrics): unreduced, 0 on masked positions; metrics are means over the
unmasked tokens of these inputs.
"""

import inspect

from gft_megatron.losses.asft import asft
from gft_megatron.losses.cadft import cadft
from gft_megatron.losses.chord import chord_mu, chord_phi
from gft_megatron.losses.cispo import cispo
from gft_megatron.losses.dft import dft
from gft_megatron.losses.discriminative import discriminative, discriminative_mean
from gft_megatron.losses.eaft import eaft, eaft_top20
from gft_megatron.losses.f_divergence import f_divergence
from gft_megatron.losses.gft import gft
from gft_megatron.losses.grpo import grpo
from gft_megatron.losses.gspo import gspo
from gft_megatron.losses.inputs import (
    LossFn,
    LossInputs,
    batch_sums,
    batch_sums_of_policy,
    batch_sums_of_this_batch,
    default_schedules,
    is_of_token_mean,
    is_token_local,
    natural_comparison,
    natural_responses,
    required_inputs,
    response_figures,
)
from gft_megatron.losses.iw_sft import iw_sft
from gft_megatron.losses.luffy import luffy
from gft_megatron.losses.poft import poft
from gft_megatron.losses.ppo import ppo
from gft_megatron.losses.probability import probability
from gft_megatron.losses.psft import psft
from gft_megatron.losses.reinforce import reinforce
from gft_megatron.losses.sft import sft
from gft_megatron.losses.sft_go import sft_go
from gft_megatron.losses.srft import srft
from gft_megatron.losses.uft import uft

LOSSES: dict[str, LossFn] = {
    "gft": gft,
    "dft": dft,
    "sft": sft,
    "cadft": cadft,
    "sft_go": sft_go,
    "probability": probability,
    "psft": psft,
    "eaft": eaft,
    "eaft_top20": eaft_top20,
    "asft": asft,
    "iw_sft": iw_sft,
    "poft": poft,
    "f_divergence": f_divergence,
    "discriminative": discriminative,
    "discriminative_mean": discriminative_mean,
    "chord_mu": chord_mu,
    "chord_phi": chord_phi,
    "srft": srft,
    "luffy": luffy,
    "grpo": grpo,
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "reinforce": reinforce,
    "uft": uft,
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
    "batch_sums_of_policy",
    "batch_sums_of_this_batch",
    "default_schedules",
    "is_of_token_mean",
    "is_token_local",
    "loss_hyper_parameters",
    "natural_comparison",
    "natural_responses",
    "required_inputs",
    "response_figures",
]
