"""Broken and hostile checkpoints, both ways: one line that names the file and the tensor, and nothing left behind.

No code of theirs runs (each hostile pickle would make the file EXECUTED), and no length of theirs is believed: memory
stays within 200 MB of what the process had.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from hf_models import CONFIGS, save_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from gft_megatron.convert.hf_to_megatron import plan_hf_to_megatron

INDEX = "model.safetensors.index.json"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
MEMORY = 200 * 2**20
EXECUTED = "executed"


class Bomb:
    """Makes a file when it is unpickled by Python."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple:
        return open, (self._marker, "w")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/: a folder of several files; megatron/: the same model converted for two tensor-parallel ranks."""
    root = tmp_path_factory.mktemp("whole")
    save_model(root / "hf", CONFIGS["qwen3"](), shard="150KB")
    conversion = plan_hf_to_megatron(
        root / "hf", root / "megatron", tp_size=2, make_vocab_size_divisible_by=64, dtype=None, workers=2
    )
    conversion.run(lambda count: None)
    return root


def refusal(
    command: str, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str
) -> str:
    """What the command says, after it has left nothing and stayed small."""
    out = source.parent / "out"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", command, str(source), str(out), *flags])
    with pytest.raises(SystemExit) as raised:
        convert_checkpoint.main()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
    assert {path.name for path in source.parent.iterdir()} <= {source.name, "elsewhere"}
    assert capsys.readouterr().out == ""  # not even a plan
    message = raised.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def change_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor | None], name: str | None = None) -> str:
    """Of the second file, the first or the named one; None removes it. The index is put right."""
    file = shard(folder)
    tensors = load_file(file)
    name = name or min(tensors)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed.contiguous()}, file, metadata={"format": "pt"})
    if changed is None:
        change_index(folder, lambda weight_map: weight_map.pop(name))
    return name


def change_header(folder: Path, change: Callable[[dict], object]) -> None:
    file = shard(folder)
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def set_header_length(folder: Path, length: int) -> None:
    file = shard(folder)
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])


def truncate(path: Path, seed: int) -> None:
    os.truncate(path, random.Random(seed).randrange(path.stat().st_size))


def one_entry(header: dict) -> dict:
    return header[min(header.keys() - {"__metadata__"})]


def move_out(path: Path) -> None:
    """Leave a symbolic link to it behind."""
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def only_pickles(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder.parent / EXECUTED)))


def extra_tensor(folder: Path) -> None:
    file = shard(folder)
    save_file({**load_file(file), "model.extra.weight": torch.ones(2)}, file)
    change_index(folder, lambda weight_map: weight_map.update({"model.extra.weight": file.name}))


def config(**values: object) -> Callable[[Path], object]:
    return lambda folder: change_json(folder / "config.json", **values)


HF = {
    **{
        f"truncated at random, {seed}": (lambda d, seed=seed: truncate(shard(d), seed), "model-00002")
        for seed in range(8)
    },
    "header length 2^63": (lambda d: set_header_length(d, 2**63), "model-00002"),
    "header length 2^64 - 1": (lambda d: set_header_length(d, 2**64 - 1), "model-00002"),
    "header length 2^40": (lambda d: set_header_length(d, 2**40), "model-00002"),
    "header length 0": (lambda d: set_header_length(d, 0), "model-00002"),
    "header length of the file": (lambda d: set_header_length(d, shard(d).stat().st_size - 8), "model-00002"),
    "bytes after the end": (lambda d: shard(d).write_bytes(shard(d).read_bytes() + b"\0"), "model-00002"),
    "a file of nothing": (lambda d: shard(d).write_bytes(b""), "model-00002"),
    "shape of 2^62": (lambda d: change_header(d, lambda h: one_entry(h).update(shape=[2**62])), "model-00002"),
    "overlapping tensors": (
        lambda d: change_header(d, lambda h: one_entry(h).update(data_offsets=[8, 8])), "model-00002",
    ),
    "index: wrong file": (
        lambda d: change_index(d, lambda m: m.update({"lm_head.weight": shard(d, 0).name, min(m): shard(d, 2).name})),
        "lists in it",
    ),
    "index: a tensor less": (lambda d: change_index(d, lambda m: m.pop("lm_head.weight")), "'lm_head.weight'"),
    "index: a tensor more": (
        lambda d: change_index(d, lambda m: m.update({"model.more": shard(d).name})), "'model.more'",
    ),
    "index: no JSON": (lambda d: (d / INDEX).write_text("{"), INDEX),
    "index: no map": (lambda d: (d / INDEX).write_text('{"weight_map": []}'), INDEX),
    "index: nested without end": (lambda d: (d / INDEX).write_text("[" * 100_000), INDEX),
    "index: path out of the folder": (
        lambda d: change_index(d, lambda m: m.update({"lm_head.weight": "../elsewhere/x.safetensors"})),
        "tensor 'lm_head.weight' is in '../elsewhere",
    ),
    "index: absolute path": (
        lambda d: change_index(d, lambda m: m.update({"lm_head.weight": "/etc/passwd"})), "'/etc/passwd'",
    ),
    "missing file": (lambda d: shard(d).unlink(), "model-00002"),
    "link out of the folder": (lambda d: move_out(shard(d)), "symbolic link"),
    "tokenizer is a link to a secret": (lambda d: (d / "tokenizer.json").symlink_to("/etc/passwd"), "tokenizer.json"),
    "a pipe for a file": (lambda d: replace_by(shard(d), os.mkfifo), "model-00002"),
    "a folder for a file": (lambda d: replace_by(shard(d), os.mkdir), "model-00002"),
    "pickles only": (only_pickles, "pytorch_model.bin"),
    "two sets of weights": (lambda d: shutil.copy(shard(d), d / "model.safetensors"), "holds both"),
    "missing tensor": (lambda d: change_tensor(d, lambda t: None), "no file holds tensor"),
    "extra tensor": (extra_tensor, "'model.extra.weight'"),
    "a row less": (lambda d: change_tensor(d, lambda t: t[1:]), "has shape"),
    "another rank": (lambda d: change_tensor(d, lambda t: t[None]), "has shape"),
    "int8": (lambda d: change_tensor(d, lambda t: t.to(torch.int8)), "dtype I8"),
    "float64": (lambda d: change_tensor(d, lambda t: t.double()), "dtype F64"),
    "float8": (lambda d: change_tensor(d, lambda t: t.to(torch.float8_e4m3fn)), "dtype F8_E4M3"),
    "dtypes mixed in one parameter": (
        lambda d: change_tensor(d, lambda t: t.half(), next(n for n in load_file(shard(d)) if "k_proj" in n)),
        "make one parameter but have several dtypes",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config: no JSON": (lambda d: (d / "config.json").write_text("config"), "config.json"),
    "config: code": (config(auto_map={"AutoConfig": "modeling.Config"}), "auto_map"),
    "config: unknown model": (config(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "config: quantized": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "config: another width": (config(hidden_size=72), "config.json makes it"),
    "config: another MLP": (config(intermediate_size=84), "config.json makes it"),
    "config: a larger vocabulary": (config(vocab_size=132), "config.json makes it"),
    "config: a layer more": (config(num_hidden_layers=4, layer_types=None), "model.layers.3."),
    "config: a layer less": (config(num_hidden_layers=2, layer_types=None), "model.layers.2."),
    "config: 10^9 layers": (config(num_hidden_layers=10**9, layer_types=None), "num_hidden_layers 1000000000"),
    "config: 9,999 layers": (config(num_hidden_layers=9_999, layer_types=None), "num_hidden_layers 9999"),
    "config: 10^9 labels": (config(num_labels=10**9), "num_labels 1000000000"),
    "config: a division by zero": (
        config(
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 0,
            }
        ),
        "division by zero",
    ),
    "config: in another file": (config(configuration_files=["config.4.0.0.json"]), "configuration_files"),
    "config: weights in another file": (config(transformers_weights="x.safetensors"), "transformers_weights"),
    "config: tied, but they differ": (config(tie_word_embeddings=True), "'lm_head.weight' differs"),
    "an adapter beside the weights": (
        lambda d: (d / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}'), "adapter_config.json",
    ),
    "no folder": (shutil.rmtree, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("injury", HF)
def test_hugging_face_folder(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], injury: str
) -> None:
    injure, expected = HF[injury]
    shutil.copytree(whole / "hf", tmp_path / "in")
    injure(tmp_path / "in")
    message = refusal("hf-to-megatron", tmp_path / "in", monkeypatch, capsys)
    assert expected in message and str(tmp_path / "in") in message


def release(folder: Path) -> Path:
    return folder / "release"


def change_list(folder: Path, change: Callable[[Metadata], object]) -> None:
    metadata = FileSystemReader(release(folder)).read_metadata()
    change(metadata)
    (release(folder) / ".metadata").write_bytes(pickle.dumps(metadata))


def change_places(folder: Path, **values: object) -> None:
    """Of the first part of QKV."""

    def change(metadata: Metadata) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == QKV)
        metadata.storage_data[index] = replace(metadata.storage_data[index], **values)

    change_list(folder, change)


def place_of(folder: Path) -> tuple[Path, int, int]:
    metadata = FileSystemReader(release(folder)).read_metadata()
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == QKV)
    return release(folder) / place.relative_path, place.offset, place.length


def overwrite_part(folder: Path, archive: bytes) -> None:
    """Put another archive in the place of a part."""
    (release(folder) / "__9_9.distcp").write_bytes(archive)
    change_places(folder, relative_path="__9_9.distcp", offset=0, length=len(archive))


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def archive_of(folder: Path, data_pkl: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive of the first part of QKV, with another data.pkl or compressed."""
    path, offset, length = place_of(folder)
    content = path.read_bytes()[offset : offset + length]
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for info in old.infolist():
            is_form = info.filename.endswith("data.pkl")
            new.writestr(info.filename, data_pkl if is_form and data_pkl is not None else old.read(info.filename))
    return buffer.getvalue()


def remove_key(metadata: Metadata) -> None:
    metadata.state_dict_metadata.pop(QKV)


def add_key(metadata: Metadata) -> None:
    metadata.state_dict_metadata["decoder.adapter.weight"] = metadata.state_dict_metadata[
        "decoder.final_layernorm.weight"
    ]
    for index in [index for index in metadata.storage_data if index.fqn == "decoder.final_layernorm.weight"]:
        metadata.storage_data[type(index)("decoder.adapter.weight", index.offset)] = metadata.storage_data[index]


def set_size(*size: int) -> Callable[[Path], None]:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[QKV].size = torch.Size(size)

    return lambda folder: change_list(folder, change)


def lose_a_rank(metadata: Metadata) -> None:
    """As if one tensor-parallel rank's file had never been listed."""
    chunks = metadata.state_dict_metadata[QKV].chunks
    chunks[:] = [chunk for chunk in chunks if chunk.offsets[1] == 0]


def overlap(metadata: Metadata) -> None:
    chunks = metadata.state_dict_metadata[QKV].chunks
    chunks.append(chunks[0])


def legacy(folder: Path) -> None:
    shutil.rmtree(release(folder))
    (release(folder) / "mp_rank_00").mkdir(parents=True)
    bomb = pickle.dumps(Bomb(folder.parent / EXECUTED))
    (release(folder) / "mp_rank_00" / "model_optim_rng.pt").write_bytes(bomb)


def first_file(folder: Path) -> Path:
    return place_of(folder)[0]


def pickled(make: Callable[[Path], bytes]) -> Callable[[Path], object]:
    return lambda folder: (release(folder) / ".metadata").write_bytes(make(folder))


def nested(depth: int = 60) -> bytes:
    """A pickle's instructions for a tuple of twice a tuple of twice ..., 2^depth in all: to print or hash it would take
    forever."""
    return b")q\x00" + b"h\x00\x86q\x00" * depth


def text(content: str) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content.encode()


def form(storage: bytes = b"ctorch\nFloatStorage\n", shape: bytes = b"(K\x01t") -> bytes:
    """data.pkl of a tensor."""
    storage = b"(" + text("storage") + storage + text("0") + text("cpu") + b"K\x01tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + b"(K\x01ttR."


MEGATRON = {
    "no metadata.json": (lambda d: (release(d) / "metadata.json").unlink(), "metadata.json"),
    "no .metadata": (lambda d: (release(d) / ".metadata").unlink(), "/.metadata"),
    "no tracker": (lambda d: (d / "latest_checkpointed_iteration.txt").unlink(), "metadata.json"),
    "tracker: another iteration": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_text("7"), "iter_0000007",
    ),
    "tracker: a path": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_text("../../etc"), "says '../../etc'",
    ),
    "zarr": (lambda d: change_json(release(d) / "metadata.json", sharded_backend="zarr"), "'zarr'"),
    "a newer version": (lambda d: change_json(release(d) / "metadata.json", sharded_backend_version=2), "version 2"),
    "the old format": (legacy, "mp_rank_00"),
    **{
        f"list cut at random, {seed}": (lambda d, seed=seed: truncate(release(d) / ".metadata", seed), ".metadata")
        for seed in range(4)
    },
    "list: a program": (pickled(lambda d: pickle.dumps(Bomb(d.parent / EXECUTED))), ".metadata"),
    "list: something else": (pickled(lambda d: pickle.dumps({"a": 1})), ".metadata"),
    "list: memo of 2^31": (pickled(lambda d: b"\x80\x02Nr\xff\xff\xff\x7f."), ".metadata"),
    "list: bytes of 2^62": (pickled(lambda d: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"."), ".metadata"),
    "list: nothing but marks": (pickled(lambda d: b"(" * 1000), ".metadata"),
    "list: named by what cannot be printed": (
        pickled(lambda d: b"\x80\x04" + text("os") + nested() + b"\x93."), "no text",
    ),
    "list: made by what cannot be printed": (pickled(lambda d: b"\x80\x02" + nested() + b")R."), "found tuple"),
    "missing file": (lambda d: first_file(d).unlink(), ".distcp is missing"),
    **{
        f"file truncated at random, {seed}": (lambda d, seed=seed: truncate(first_file(d), seed), ".distcp")
        for seed in range(8)
    },
    "a tensor less": (lambda d: change_list(d, remove_key), f"no tensor '{QKV}'"),
    "a tensor more": (lambda d: change_list(d, add_key), "'decoder.adapter.weight'"),
    "foreign layout: a rank is lost": (lambda d: change_list(d, lose_a_rank), QKV),
    "foreign layout: parts overlap": (lambda d: change_list(d, overlap), "overlap"),
    "another shape": (set_size(3, 384, 64), "has shape [3, 384, 64]"),
    "shape of 2^62": (set_size(2**62, 2**62, 64), QKV),
    "path out of the folder": (lambda d: change_places(d, relative_path="../__0_0.distcp"), "'../__0_0.distcp'"),
    "absolute path": (lambda d: change_places(d, relative_path="/etc/passwd"), "'/etc/passwd'"),
    "link out of the folder": (lambda d: move_out(first_file(d)), "symbolic link"),
    "place after the end": (lambda d: change_places(d, offset=2**40), QKV),
    "place of 2^62 bytes": (lambda d: change_places(d, length=2**62), QKV),
    "place of another tensor": (lambda d: change_places(d, offset=0, length=place_of(d)[2]), QKV),
    "transformed": (lambda d: change_places(d, transform_descriptors=["zstd"]), "zstd"),
    "part: a program": (
        lambda d: overwrite_part(d, archive_of(d, pickle.dumps(Bomb(d.parent / EXECUTED), 2))), QKV,
    ),
    "part: a storage that cannot be hashed": (
        lambda d: overwrite_part(d, archive_of(d, form(storage=nested()))), "a storage of tuple",
    ),
    "part: a shape of a list and 2^40": (
        lambda d: overwrite_part(d, archive_of(d, form(shape=b"(]K\x00a\x8a\x06" + b"\0" * 5 + b"\1t"))), "no numbers",
    ),
    "part: made of a number": (
        lambda d: overwrite_part(
            d, archive_of(d, b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01R.")
        ), QKV,
    ),
    "part: compressed": (lambda d: overwrite_part(d, archive_of(d, compression=zipfile.ZIP_DEFLATED)), "compressed"),
    "part: int8": (lambda d: overwrite_part(d, saved(torch.ones(1, 128, 64, dtype=torch.int8))), "CharStorage"),
    "part: another dtype": (lambda d: overwrite_part(d, saved(torch.ones(1, 128, 64).half())), "float16"),
    "part: a view": (lambda d: overwrite_part(d, saved(torch.ones(1, 64, 128).mT)), "strides"),
    "part: no tensor": (lambda d: overwrite_part(d, saved({"a": 1})), QKV),
    "no hf/config.json": (lambda d: (d / "hf" / "config.json").unlink(), "--hf-checkpoint"),
    "config: another width": (lambda d: change_json(d / "hf" / "config.json", hidden_size=72), "config.json makes it"),
    "config: a layer more": (
        lambda d: change_json(d / "hf" / "config.json", num_hidden_layers=4, layer_types=None), "[3, 64]",
    ),
    "config: more words than rows": (
        lambda d: change_json(d / "hf" / "config.json", vocab_size=300), "embedding.word_embeddings.weight",
    ),
    "tokenizer is a link to a secret": (
        lambda d: (d / "hf" / "tokenizer.json").symlink_to("/etc/passwd"), "tokenizer.json",
    ),
    "no folder": (shutil.rmtree, "is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("injury", MEGATRON)
def test_megatron_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], injury: str
) -> None:
    injure, expected = MEGATRON[injury]
    shutil.copytree(whole / "megatron", tmp_path / "in")
    injure(tmp_path / "in")
    message = refusal("megatron-to-hf", tmp_path / "in", monkeypatch, capsys)
    assert expected in message and str(tmp_path / "in") in message


def test_objects_of_a_checkpoint_are_never_looked_at(whole: Path, tmp_path: Path) -> None:
    """Megatron's own loader unpickles common.pt and the objects; for the weights nobody has to."""
    shutil.copytree(whole / "megatron", tmp_path / "in")
    bomb = pickle.dumps(Bomb(tmp_path / EXECUTED))
    (release(tmp_path / "in") / "common.pt").write_bytes(bomb)

    def add_object(metadata: Metadata) -> None:
        metadata.state_dict_metadata["rng_state/shard_0_1"] = BytesStorageMetadata()
        metadata.planner_data = {"bomb": Bomb(tmp_path / EXECUTED)}

    change_list(tmp_path / "in", add_object)
    (tmp_path / EXECUTED).unlink(missing_ok=True)
    convert_checkpoint.convert(convert_checkpoint.ToHf(tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / EXECUTED).exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"
