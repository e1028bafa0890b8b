"""Hugging Face -> Megatron checkpoint -> Hugging Face: every tensor comes back bit for bit, and what goes with them."""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from convert_checkpoint import Inspect, ToHf, ToMegatron, convert
from hf_models import CONFIGS, CONFIGS_WITH_EXPERTS, save_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from gft_megatron.convert.inert_pickle import Made, Name, read_inert
from gft_megatron.convert.stored_tensor import StoredTensor
from gft_megatron.convert.torch_dist_reader import TorchDistFolder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


def children(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of several files with what else a model comes with, and with what stays behind."""
    folder = save_model(tmp_path / "source", CONFIGS["qwen2"](), torch.bfloat16, shard="60KB")
    (folder / "tokenizer.json").write_text('{"a": 0}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_code.py").write_text("raise SystemExit")
    return folder


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("model", [*CONFIGS, *CONFIGS_WITH_EXPERTS])
def test_every_tensor_comes_back(tmp_path: Path, model: str, tp_size: int) -> None:
    save_model(tmp_path / "hf", {**CONFIGS, **CONFIGS_WITH_EXPERTS}[model]())
    convert(ToMegatron(tmp_path / "hf", tmp_path / "out", tensor_model_parallel_size=tp_size, workers=3))
    padded = -(-131 // (128 * tp_size)) * 128 * tp_size
    listed = TorchDistFolder(tmp_path / "out" / "release").tensors
    assert listed["embedding.word_embeddings.weight"].shape == (padded, 64)
    assert ("output_layer.weight" in listed) == (not model.endswith("tied"))
    facts = json.loads((tmp_path / "out" / "gft_megatron_export.json").read_text())
    assert (facts["vocab_size"], facts["padded_vocab_size"]) == (131, padded)
    convert(ToHf(tmp_path / "out", tmp_path / "back"))
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))


def test_torch_itself_reads_the_same(source: Path, tmp_path: Path) -> None:
    """torch.distributed.checkpoint loads the padded embedding and a fused parameter from it, cut up for two ranks."""
    convert(ToMegatron(source, tmp_path / "out", tensor_model_parallel_size=2))
    original = tensors_of(source)
    state = {
        "embedding.word_embeddings.weight": torch.empty(256, 64, dtype=torch.bfloat16),
        "decoder.layers.mlp.linear_fc1.weight": torch.empty(3, 160, 64, dtype=torch.bfloat16),
    }
    torch.distributed.checkpoint.load(
        state, storage_reader=FileSystemReader(tmp_path / "out" / "release"), no_dist=True
    )
    embedding, fc1 = state.values()
    assert torch.equal(embedding[:131], original["model.embed_tokens.weight"]) and not embedding[131:].any()
    for layer in range(3):
        gate, up = (original[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        assert torch.equal(fc1[layer], torch.cat([gate, up]))


def test_the_rest_of_the_folder_comes_along(source: Path, tmp_path: Path) -> None:
    convert(ToMegatron(source, tmp_path / "out"))
    convert(ToHf(tmp_path / "out" / "release", tmp_path / "back", max_shard_bytes=60_000))
    carried = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert children(tmp_path / "out" / "hf") == carried
    for name in carried - {"config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert children(tmp_path) == {"source", "out", "back"}


def test_another_dtype_is_said_everywhere(source: Path, tmp_path: Path) -> None:
    convert(ToMegatron(source, tmp_path / "out", dtype="float32"))
    convert(ToHf(tmp_path / "out", tmp_path / "back", dtype="float16"))
    assert {t.dtype for t in TorchDistFolder(tmp_path / "out" / "release").tensors.values()} == {torch.float32}
    expected = {name: tensor.float().half() for name, tensor in tensors_of(source).items()}
    assert_equal(tensors_of(tmp_path / "back"), expected)
    for folder, dtype in ((tmp_path / "out" / "hf", "float32"), (tmp_path / "back", "float16")):
        assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_a_routers_bias_stays_float32(tmp_path: Path) -> None:
    """As in transformers and in Megatron, whatever the weights are written in."""
    source = save_model(tmp_path / "source", CONFIGS_WITH_EXPERTS["deepseek-v3"]())
    convert(ToMegatron(source, tmp_path / "out", dtype="bfloat16"))
    convert(ToHf(tmp_path / "out", tmp_path / "back", hf_checkpoint=source))
    listed = TorchDistFolder(tmp_path / "out" / "release").tensors
    assert listed["decoder.layers.2.mlp.router.expert_bias"].dtype is torch.float32
    assert listed["decoder.layers.2.mlp.router.weight"].dtype is torch.bfloat16
    expected = {
        name: tensor if name.endswith("correction_bias") else tensor.bfloat16()
        for name, tensor in tensors_of(source).items()
    }
    assert_equal(tensors_of(tmp_path / "back"), expected)
    dtypes = [json.loads((folder / "config.json").read_text())["dtype"] for folder in (source, tmp_path / "back")]
    assert dtypes == ["float32", "bfloat16"]


def test_more_experts_than_tensors(tmp_path: Path) -> None:
    """Refused before a name is made for each."""
    source = save_model(tmp_path / "source", CONFIGS_WITH_EXPERTS["mixtral"]())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_local_experts": 10**9}))
    with pytest.raises(ValueError, match="experts in all layers 3000000000, but the files hold"):
        convert(ToMegatron(source, tmp_path / "out"))


def test_dtypes_of_their_own_are_kept(source: Path, tmp_path: Path) -> None:
    """Norms in float32 beside weights in bfloat16."""
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors_of(source).items()}
    for file in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors, source / "model.safetensors")
    convert(ToMegatron(source, tmp_path / "out"))
    convert(ToHf(tmp_path / "out", tmp_path / "back", max_shard_bytes=70_000))
    assert_equal(tensors_of(tmp_path / "back"), tensors)


def test_an_earlier_conversion_is_replaced_and_nothing_else(source: Path, tmp_path: Path) -> None:
    for tp_size in (4, 1):
        convert(ToMegatron(source, tmp_path / "out", tensor_model_parallel_size=tp_size))
    (tmp_path / "out" / "release" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"OUT .*'release/notes\.txt'"):
        convert(ToMegatron(source, tmp_path / "out"))
    with pytest.raises(ValueError, match="OUT .*source holds"):
        convert(ToMegatron(source, source))
    assert (tmp_path / "out" / "release" / "notes.txt").read_text() == "mine"


def test_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(ToMegatron(source, tmp_path / "out", dry_run=True))
    said = capsys.readouterr().out
    assert "24 Megatron parameters, 39 Hugging Face tensors" in said and "131 rows, 256 on" in said
    assert "needed" in said and "free" in said and "nothing is written" in said
    assert children(tmp_path) == {"source"}


def test_inspect(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    convert(ToMegatron(source, tmp_path / "out"))
    capsys.readouterr()
    for path, expected in ((source, "39 tensors (39 in bfloat16)"), (tmp_path / "out", "10 tensors (10 in bfloat16)")):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "inspect", str(path), "--tensors"])
        convert_checkpoint.main()
        said = capsys.readouterr().out
        assert expected in said and "[131, 64]" in said or "[256, 64]" in said
    assert not Inspect(source).tensors


@pytest.mark.parametrize("direction", [ToMegatron, ToHf])
def test_what_fails_on_the_way_leaves_nothing(source: Path, tmp_path: Path, direction: type) -> None:
    """A file that shrinks after it was checked, then a disk that is full (a limit on the size of a file)."""
    convert(ToMegatron(source, tmp_path / "megatron"))
    before = children(tmp_path)
    conversion = direction(source if direction is ToMegatron else tmp_path / "megatron", tmp_path / "out").plan()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .* bytes are free there"):
            conversion.run(lambda count: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert children(tmp_path) == before
    shrunk = max(conversion_files(source if direction is ToMegatron else tmp_path / "megatron"), key=os.path.getsize)
    os.truncate(shrunk, 1000)
    with pytest.raises(ValueError, match=f"{shrunk} has no byte"):
        conversion.run(lambda count: None)
    assert children(tmp_path) == before


def conversion_files(folder: Path) -> list[Path]:
    return [*folder.rglob("*.safetensors"), *folder.rglob("*.distcp")]


def test_progress_adds_up(source: Path, tmp_path: Path) -> None:
    for settings in (ToMegatron(source, tmp_path / "out"), ToHf(tmp_path / "out", tmp_path / "back")):
        conversion = settings.plan()
        steps: list[int] = []
        conversion.run(steps.append)
        assert sum(steps) == conversion.plan.num_bytes and len(steps) > 20


def test_stored_tensor_slices_like_a_tensor(tmp_path: Path) -> None:
    whole = torch.arange(6 * 5 * 4, dtype=torch.float32).view(6, 5, 4)
    (tmp_path / "file").write_bytes(b"head" + whole.numpy().tobytes())
    stored = StoredTensor(tmp_path / "file", 4, torch.float32, (6, 5, 4))
    for index in (slice(None), slice(2, 4), slice(5, 5), (slice(1, 6), slice(2, 3)), (slice(None), slice(0, 5))):
        assert torch.equal(stored[index], whole[index]), index
    assert torch.equal(stored.without_first_axis(3)[1:], whole[3, 1:])
    target = torch.zeros(6, 4, 5, dtype=torch.bfloat16).mT
    stored.read_into(target)
    assert torch.equal(target, whole.bfloat16())


def test_pickles_are_read_as_data() -> None:
    value = {"a": [1, 2**70, None, True, 2.5, "\u00e9"], "b": (b"x", (), {}), 3: [[]]}
    for protocol in (4, 5):
        assert read_inert(pickle.dumps(value, protocol)) == value
        made = read_inert(pickle.dumps(Path("/x"), protocol))
        assert isinstance(made, Made) and isinstance(made.maker, Name)
    for hostile in (b"cos\nsystem\n(S'touch x'\ntR.", b"\x80\x04]\x94h\x00a", b"h\x05.", b"", b"\x80\x02}(]Nu."):
        with pytest.raises(ValueError, match="not a pickle of a checkpoint"):
            read_inert(hostile)
