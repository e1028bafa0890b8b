"""What a ledger is made of: records that can be told from damage, and samples as bytes and back, bit for bit.

    frame   28 bytes: magic, format, kind, sizes of head and data, CRC-32 of both, CRC-32 of the frame before it
    head    JSON
    data    raw little-endian arrays and UTF-8 text, one after the other as the head lists them

Every record stands for itself: whatever happens to its neighbours, it can be found and read.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gft_megatron.groups import GroupKey, Sample, Source, WeightSpan

FORMAT = 1
# 0xff is in no UTF-8 text, and the four bytes are no token of any vocabulary: what a model writes cannot look like it.
MAGIC = b"\xffGFT"
_FRAME = struct.Struct("<4sBB2xIQI")
_CRC = struct.Struct("<I")
FRAME_SIZE = _FRAME.size + _CRC.size
_DTYPES = frozenset({"<i4", "<i8", "<f4", "<f8"})


class Kind(IntEnum):
    GROUP = 1
    """A finished group."""
    DROPPED = 2
    """A group that came to nothing, and why."""
    CONSUMED = 3
    """These groups were trained on in that optimizer step of that session."""
    UNDONE = 4
    """A run went on from a checkpoint: what these sessions trained on after it is untrained again."""


class Record(NamedTuple):
    kind: Kind
    head: dict[str, Any]
    data: bytes
    size: int
    """In the file, frame included."""


def read_record(file: BinaryIO, offset: int) -> Record | None:
    """The record at this place of a file; None where there is no whole one.

    Raises:
        ValueError: a whole record, of a format that this version does not know.
    """
    frame = os.pread(file.fileno(), FRAME_SIZE, offset)
    if len(frame) < FRAME_SIZE or _CRC.unpack_from(frame, _FRAME.size)[0] != zlib.crc32(frame[: _FRAME.size]):
        return None
    magic, version, kind, head_size, data_size, crc = _FRAME.unpack_from(frame)
    if magic != MAGIC:
        return None
    if version != FORMAT:
        raise ValueError(
            f"{file.name} holds records of format {version}, expected {FORMAT}: it was written by another version of "
            f"gft_megatron; use that one, or move the file away to do without its groups"
        )
    body = _pread(file, head_size + data_size, offset + FRAME_SIZE)
    if len(body) < head_size + data_size or zlib.crc32(body) != crc:
        return None
    return Record(Kind(kind), json.loads(body[:head_size]), body[head_size:], FRAME_SIZE + len(body))


def group_record(key: GroupKey, fingerprint: str, row: int, samples: Sequence[Sample]) -> bytes:
    """A finished group; `samples_of` reads it back."""
    parts: list[bytes] = []
    head = {
        "key": [key.rollout_id, key.group_id],
        "fingerprint": fingerprint,
        "written": time.time_ns(),
        "row": row,
        "samples": [_sample_head(sample, parts) for sample in samples],
    }
    return _record(Kind.GROUP, head, b"".join(parts))


def dropped_record(key: GroupKey, fingerprint: str, reason: str) -> bytes:
    head = {
        "key": [key.rollout_id, key.group_id],
        "fingerprint": fingerprint,
        "written": time.time_ns(),
        "reason": reason,
    }
    return _record(Kind.DROPPED, head)


def consumed_record(session: str, iteration: int, keys: Iterable[GroupKey]) -> bytes:
    pairs = [[key.rollout_id, key.group_id] for key in keys]
    return _record(Kind.CONSUMED, {"session": session, "iteration": iteration, "keys": pairs})


def undone_record(after: Mapping[str, int]) -> bytes:
    """
    Args:
        after: session -> the last step of it that still counts.
    """
    return _record(Kind.UNDONE, {"after": dict(after)})


def samples_of(record: Record) -> tuple[Sample, ...]:
    """The samples of a GROUP record, every field as it was."""
    offset = 0

    def take(size: int) -> bytes:
        nonlocal offset
        offset += size
        return record.data[offset - size : offset]

    def array(told: list[Any] | None) -> np.ndarray | None:
        if told is None:
            return None
        dtype, length = told
        if dtype not in _DTYPES:
            raise ValueError(f"arrays of dtype {dtype!r} are not of this ledger format")
        return np.frombuffer(take(np.dtype(dtype).itemsize * length), dtype).copy()  # writable, as those it was made of

    samples = []
    for head in record.head["samples"]:
        # In the order in which _sample_head laid them down.
        (reward,) = struct.unpack("<d", take(8))
        text = take(head["text"]).decode("utf-8", "surrogatepass")
        token_ids = array(head["token_ids"])
        assert token_ids is not None
        samples.append(
            Sample(
                source=Source(head["source"]),
                token_ids=token_ids,
                text=text,
                reward=reward,
                truncated=head["truncated"],
                rollout_log_probs=array(head["rollout_log_probs"]),
                weight_spans=tuple(WeightSpan(*span) for span in head["weight_spans"]),
                response=head["response"],
                token_groups=array(head["token_groups"]),
            )
        )
    return tuple(samples)


def _sample_head(sample: Sample, parts: list[bytes]) -> dict[str, Any]:
    """What JSON holds of a sample; the rest goes to `parts`: its reward may be NaN, and its text any string."""

    def lay_down(array: np.ndarray | None) -> list[Any] | None:
        if array is None:
            return None
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        assert little.dtype.str in _DTYPES, little.dtype
        parts.append(little.tobytes())
        return [little.dtype.str, len(little)]

    text = sample.text.encode("utf-8", "surrogatepass")
    parts += [struct.pack("<d", sample.reward), text]
    return {
        "source": int(sample.source),
        "text": len(text),
        "token_ids": lay_down(sample.token_ids),
        "truncated": bool(sample.truncated),
        "rollout_log_probs": lay_down(sample.rollout_log_probs),
        "weight_spans": [[span.version, span.start, span.end] for span in sample.weight_spans],
        "response": int(sample.response),
        "token_groups": lay_down(sample.token_groups),
    }


def _record(kind: Kind, head: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode()
    frame = _FRAME.pack(MAGIC, FORMAT, kind, len(text), len(data), zlib.crc32(data, zlib.crc32(text)))
    return b"".join([frame, _CRC.pack(zlib.crc32(frame)), text, data])


def _pread(file: BinaryIO, size: int, offset: int) -> bytes:
    """Fewer bytes than asked for only at the end of the file."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(file.fileno(), size, offset)):
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
