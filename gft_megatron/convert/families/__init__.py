"""Every model family that we convert; one file each. A new one is its file and a line in FAMILIES."""

from __future__ import annotations

from gft_megatron.convert.families.llama import LLAMA
from gft_megatron.convert.families.mistral import MISTRAL
from gft_megatron.convert.families.mixtral import MIXTRAL
from gft_megatron.convert.families.qwen2 import QWEN2
from gft_megatron.convert.families.qwen3 import QWEN3
from gft_megatron.convert.families.qwen3_moe import QWEN3_MOE
from gft_megatron.convert.families.tables import EMBEDDING, OUTPUT_LAYER, Entry, Family, Layers, Layout, MoeShape, Part

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "OUTPUT_LAYER",
    "Entry",
    "Family",
    "Layers",
    "Layout",
    "MoeShape",
    "Part",
    "family_of",
]

FAMILIES = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE)


def family_of(model_type: str | None, architectures: list[str] | None) -> Family:
    """The family of a config.json with these two fields; `architectures` may be missing.

    Raises:
        ValueError: a model that no table describes; the message lists those that have one.
    """
    for family in FAMILIES:
        if family.model_type == model_type and (architectures or [family.architecture]) == [family.architecture]:
            return family
    known = ", ".join(f"{family.architecture} (model_type {family.model_type!r})" for family in FAMILIES)
    raise ValueError(f"cannot convert architectures {architectures}, model_type {model_type!r}; known: {known}")
