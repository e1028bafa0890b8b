"""Prepare the prompts of a run: read data files, set bad rows aside, write the good ones to a store.

One rank does this once; then every rank opens the store. Rows stream through in chunks, so memory does not grow with
the data.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gft_megatron.data.encode import EncodedRow, Limits, encode_rows
from gft_megatron.data.quarantine import Quarantine
from gft_megatron.data.rows import BadRow, Row, read_rows
from gft_megatron.data.store import PromptStore, PromptStoreWriter
from gft_megatron.groups import Source

__all__ = ["PromptStore", "PromptStoreInfo", "prepare_prompts"]

_CHUNK_ROWS = 512
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PromptStoreInfo:
    """What went into a store and what did not."""

    path: Path
    fingerprint: str
    """SHA-256 over the accepted rows, tokens included: equal for equal data and tokenizer."""
    num_rows: int
    num_expert: int
    num_teacher: int
    num_scored: int
    """Recorded responses, of experts and teachers, whose tokens have groups."""
    num_bad_rows: int
    quarantine_path: Path
    """JSON Lines {file, line, reason}, one for each bad row."""


def prepare_prompts(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    store_path: str | Path,
    quarantine_path: str | Path,
    max_prompt_length: int,
    max_response_length: int,
    vocab_size: int,
    max_bad_row_frac: float = 0.01,
    eta: float = 0.5,
    progress: Callable[[int], None] | None = None,
) -> PromptStoreInfo:
    """Write the good rows of `files` to `store_path`, whole or not at all, and name the bad ones in `quarantine_path`.

    Args:
        max_prompt_length: tokens, after the chat template.
        max_response_length: tokens of a recorded response, end-of-sequence token included.
        vocab_size: rows of the model's embedding.
        eta: share of a response's tokens that are its important group, where it has token scores.
        progress: called with the number of rows read so far, now and then.

    Raises:
        ValueError: a file cannot be read or has no row, no row is good, or too many are bad.
    """
    limits = Limits(max_prompt_length=max_prompt_length, max_response_length=max_response_length, vocab_size=vocab_size)
    num_rows = num_scored = 0
    recorded: Counter[Source] = Counter()
    with Quarantine(Path(quarantine_path)) as quarantine, PromptStoreWriter(Path(store_path)) as writer:
        for chunk in _chunks(_read_files(files, tokenizer)):
            rows = encode_rows([row for _, _, row in chunk], tokenizer, limits, eta)
            for (file, line, _), row in zip(chunk, rows, strict=True):
                if isinstance(row, BadRow):
                    quarantine.add(file, line, row)
            good = [row for row in rows if isinstance(row, EncodedRow)]
            writer.write(good)
            num_rows += len(good)
            recorded.update(response.source for row in good for response in row.responses)
            num_scored += sum(response.token_groups is not None for row in good for response in row.responses)
            if progress is not None:
                progress(num_rows + quarantine.num_rows)
        quarantine.require_few(num_rows, max_bad_row_frac)
    return PromptStoreInfo(
        path=Path(store_path),
        fingerprint=writer.fingerprint,
        num_rows=num_rows,
        num_expert=recorded[Source.EXPERT],
        num_teacher=recorded[Source.TEACHER],
        num_scored=num_scored,
        num_bad_rows=quarantine.num_rows,
        quarantine_path=quarantine.path,
    )


_Located = tuple[Path, int, Row | BadRow]


def _read_files(files: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Located]:
    if not files:
        raise ValueError("no data file is given")
    for file in map(Path, files):
        rows = _warn_of_control_tokens(file, read_rows(file), tokenizer)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"data file {file} has no rows")
        yield first
        yield from rows


def _warn_of_control_tokens(
    file: Path, rows: Iterator[tuple[int, Row | BadRow]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[_Located]:
    """Pass rows on; say once a file that plain prompts spell control tokens, as one that a chat template rendered does.

    They are read as plain text (see encode.py), which is not what the author of such a prompt expects.
    """
    spelled = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or "(?!)")
    first, count = 0, 0
    for line, row in rows:
        if isinstance(row, Row) and isinstance(row.prompt, str) and spelled.search(row.prompt):
            first, count = first or line, count + 1
        yield file, line, row
    if count:
        _logger.warning(
            "%s: %d plain prompts, the first in line %d, contain the text of a control token; it is read as plain "
            "text. Give prompts as message lists to have the chat template write control tokens.",
            file,
            count,
            first,
        )


def _chunks(rows: Iterator[_Located]) -> Iterator[list[_Located]]:
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        yield chunk
