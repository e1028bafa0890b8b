"""Every model family that we convert; one file each. A new one is its file and a line in FAMILIES."""

from __future__ import annotations

from gft_megatron.convert.families.deepseek_v3 import DEEPSEEK_V3
from gft_megatron.convert.families.llama import LLAMA
from gft_megatron.convert.families.mistral import MISTRAL
from gft_megatron.convert.families.mixtral import MIXTRAL
from gft_megatron.convert.families.qwen2 import QWEN2
from gft_megatron.convert.families.qwen3 import QWEN3
from gft_megatron.convert.families.qwen3_moe import QWEN3_MOE
from gft_megatron.convert.families.tables import (
    EMBEDDING,
    OUTPUT_LAYER,
    Entry,
    Family,
    Layers,
    Layout,
    MlaShape,
    MoeShape,
    Part,
)

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "OUTPUT_LAYER",
    "Entry",
    "Family",
    "Layers",
    "Layout",
    "MlaShape",
    "MoeShape",
    "Part",
    "family_of",
]

FAMILIES = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, DEEPSEEK_V3)

# What megatron-core 0.16.1 to 0.19.2 has no option for.
_NOT_COMPUTED = {
    "gemma": "embeddings times the root of the width",
    "gemma2": "embeddings times the root of the width, norms after attention and MLP, softcapping",
    "gemma3_text": "embeddings times the root of the width, norms after attention and MLP, two rope bases",
    "gemma3": "embeddings times the root of the width, norms after attention and MLP, two rope bases",
}


def family_of(model_type: str | None, architectures: list[str] | None) -> Family:
    """The family of a config.json with these two fields; `architectures` may be missing.

    Raises:
        ValueError: a model that no table describes; the message lists those that have one.
    """
    for family in FAMILIES:
        if family.model_type == model_type and (architectures or [family.architecture]) == [family.architecture]:
            return family
    if model_type in _NOT_COMPUTED:
        raise ValueError(f"cannot convert model_type {model_type!r}: Megatron-Core lacks {_NOT_COMPUTED[model_type]}")
    known = ", ".join(f"{family.architecture} (model_type {family.model_type!r})" for family in FAMILIES)
    raise ValueError(f"cannot convert architectures {architectures}, model_type {model_type!r}; known: {known}")
