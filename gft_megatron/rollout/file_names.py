"""A transformers model's parameters under the names that its file has, which are those that weights arrive with.

transformers 5 keeps the experts of a layer in two tensors, and has converters for whole models only
(transformers/conversion_mapping.py). Here each expert's matrix is a view into them, so one can be written at a time.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

# model type -> (what a layer calls its mixture, its gate, up and down projections) in the file
_EXPERTS = {
    "deepseek_v3": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def parameters_by_file_name(model: PreTrainedModel, *, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """Every parameter and stored buffer, or the part of one that a file has under a name of its own.

    Args:
        remove_duplicate: one name only of what is tied.
    """
    mixture, gate, up, down = _EXPERTS.get(model.config.model_type, ("mlp", "", "", ""))
    named: dict[str, Tensor] = {}
    stored = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
    for name, parameter in (*model.named_parameters(remove_duplicate=remove_duplicate), *buffers):
        layer, is_expert, kind = name.partition(".mlp.experts.")
        if not is_expert:
            named[name.replace(".mlp.gate.", f".{mixture}.gate.")] = parameter
            continue
        for expert, matrix in enumerate(parameter):
            prefix = f"{layer}.{mixture}.experts.{expert}"
            if kind == "down_proj":
                named[f"{prefix}.{down}.weight"] = matrix
            else:
                assert kind == "gate_up_proj", name
                named[f"{prefix}.{gate}.weight"], named[f"{prefix}.{up}.weight"] = matrix.chunk(2)
    return named
