"""`--backend bridge`: NVIDIA's Megatron-Bridge, where it is installed, for families that have no table here.

It builds the model, and needs Transformer Engine and a GPU for that. Neither is on the machines that this project is
tested on: only the refusal without Megatron-Bridge is. Signatures are those of 0.6.2, auto_bridge.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gft_megatron.convert.complete_folder import CompleteFolder


def import_checkpoint(source: Path, out: Path) -> None:
    """Hugging Face to Megatron.

    Raises:
        ValueError: Megatron-Bridge is not installed; `out` holds something else.
    """
    bridge = _auto_bridge()
    with CompleteFolder(out, flag="OUT") as folder:
        bridge.import_ckpt(str(source), str(folder.partial))
        folder.publish({"backend": "megatron-bridge"})


def export_checkpoint(source: Path, out: Path, hf_checkpoint: Path | None) -> None:
    """Megatron to Hugging Face.

    Raises:
        ValueError: as `import_checkpoint`; there is no configuration to go by.
    """
    if hf_checkpoint is None:
        raise ValueError("--backend bridge: --hf-checkpoint is missing, the folder to take the configuration from")
    bridge = _auto_bridge()
    with CompleteFolder(out, flag="OUT") as folder:
        bridge.from_hf_pretrained(str(hf_checkpoint)).export_ckpt(str(source), str(folder.partial), strict=True)
        folder.publish({"backend": "megatron-bridge"})


def _auto_bridge() -> Any:
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        raise ValueError(
            "--backend bridge needs Megatron-Bridge (pip install megatron-bridge), Transformer Engine and a GPU: "
            f"{error}"
        ) from error
    return AutoBridge
