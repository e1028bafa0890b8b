"""Without Megatron-Bridge its backend is refused in one line; with it, a machine with a GPU would have to run it."""

import importlib.util
from pathlib import Path

import pytest
from programs import load_program


@pytest.mark.skipif(importlib.util.find_spec("megatron.bridge") is not None, reason="Megatron-Bridge is installed")
@pytest.mark.parametrize("command", ["ToMegatron", "ToHf"])
def test_refused_where_it_is_missing(tmp_path: Path, command: str) -> None:
    tool = load_program("tools/convert_checkpoint.py")
    more = {"hf_checkpoint": tmp_path} if command == "ToHf" else {}
    settings = getattr(tool, command)(source=tmp_path, out=tmp_path / "out", backend="bridge", **more)
    with pytest.raises(ValueError, match="--backend bridge needs Megatron-Bridge"):
        tool.convert(settings)
    assert list(tmp_path.iterdir()) == []
