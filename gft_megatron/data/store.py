"""The accepted rows as one Arrow IPC file: written once by one rank, memory-mapped by all.

The pages are shared by the ranks of a machine and read on demand, so neither ranks nor rows multiply the memory.
The file's last record batch is empty and carries the fingerprint, which is known only after the rows: a file without
it was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gft_megatron.data.encode import EncodedRow
from gft_megatron.groups import Prompt, RecordedResponse, Source

_RESPONSE = pa.struct(
    [
        ("text", pa.large_string()),
        ("token_ids", pa.large_list(pa.int32())),
        ("source", pa.int8()),
        ("token_groups", pa.large_list(pa.int16())),  # null where the data say nothing
    ]
)
_SCHEMA = pa.schema(
    [
        ("prompt", pa.large_list(pa.int32())),
        ("label", pa.large_string()),
        ("responses", pa.large_list(_RESPONSE)),
        ("metadata", pa.large_string()),
    ]
)
_FINGERPRINT = b"gft_megatron.fingerprint"


class PromptStoreWriter:
    """A context that writes a store beside its place and moves it there when the block ends without an exception."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._digest = hashlib.sha256()

    def __enter__(self) -> PromptStoreWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = pa.OSFile(str(self._partial), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        return self

    def write(self, rows: Sequence[EncodedRow]) -> None:
        """Append rows; each call makes one record batch."""
        for row in rows:
            _hash_row(self._digest, row)
        columns = {
            "prompt": [row.prompt_ids for row in rows],
            "label": [row.label for row in rows],
            "responses": [
                [
                    {"text": r.text, "token_ids": r.token_ids, "source": int(r.source), "token_groups": r.token_groups}
                    for r in row.responses
                ]
                for row in rows
            ],
            "metadata": [row.metadata for row in rows],
        }
        self._writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=_SCHEMA))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of all rows written so far, in order."""
        return self._digest.hexdigest()

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        if exception_type is None:
            end = pa.RecordBatch.from_pydict({name: [] for name in _SCHEMA.names}, schema=_SCHEMA)
            self._writer.write_batch(end, custom_metadata={_FINGERPRINT: self.fingerprint})
        self._writer.close()
        self._file.close()
        if exception_type is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink()


class PromptStore:
    """The prompts of a run, read where they lie in the file: `len(store)`, `store[i]`.

    Raises:
        ValueError: the file is missing, or no finished store.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
            self.fingerprint = metadata[_FINGERPRINT].decode()
            self._table = reader.read_all()
        except (OSError, pa.ArrowException, KeyError, TypeError) as error:
            raise ValueError(f"prompt store {path} cannot be read: {' '.join(str(error).split())}") from None

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> Prompt:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a prompt store of {len(self)} rows")
        columns = self._table.columns
        return Prompt(
            row=row,
            token_ids=_ids(columns[0][row]),
            label=columns[1][row].as_py(),
            responses=tuple(
                RecordedResponse(
                    r["text"].as_py(), _ids(r["token_ids"]), Source(r["source"].as_py()), _known_ids(r["token_groups"])
                )
                for r in columns[2][row]
            ),
            metadata=json.loads(columns[3][row].as_py()),
        )


def _ids(scalar: pa.LargeListScalar) -> np.ndarray:  # [length] int64
    return scalar.values.to_numpy().astype(np.int64)


def _known_ids(scalar: pa.LargeListScalar) -> np.ndarray | None:  # [length] int64
    return _ids(scalar) if scalar.is_valid else None


def _hash_row(digest: hashlib._Hash, row: EncodedRow) -> None:
    parts = [row.prompt_ids.tobytes(), row.label.encode(), row.metadata.encode()]
    for response in row.responses:
        parts += [bytes([response.source]), response.text.encode(), response.token_ids.tobytes()]
        if response.token_groups is not None:
            parts.append(response.token_groups.tobytes())
    # Lengths keep "ab" + "c" apart from "a" + "bc".
    digest.update(np.array([len(parts), *map(len, parts)], np.int64).tobytes())
    digest.update(b"".join(parts))
