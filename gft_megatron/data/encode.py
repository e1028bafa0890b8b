"""Tokenise checked rows and apply the length limits.

Text from the data never becomes a control token. Plain prompts and recorded responses are encoded with
`split_special_tokens=True`, and chat prompts with `sanitize_control_tokens=True`: "<|im_end|>" in a user's message is
nine characters, while the ones that the chat template writes stay control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from gft_megatron.data.rows import BadRow, Row
from gft_megatron.data.token_groups import response_groups
from gft_megatron.groups import RecordedResponse


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a tokenised row has to keep to."""

    max_prompt_length: int
    max_response_length: int
    """Tokens of a recorded response, the end-of-sequence token included."""
    vocab_size: int
    """Rows of the model's embedding: a token id at or above it would read outside."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as it is stored."""

    prompt_ids: np.ndarray  # [prompt length] int64
    label: str
    responses: tuple[RecordedResponse, ...]
    metadata: str  # a JSON object


def encode_rows(
    rows: Sequence[Row | BadRow], tokenizer: PreTrainedTokenizerBase, limits: Limits, eta: float
) -> list[EncodedRow | BadRow]:
    """Tokenise many rows; one call for all plain text is several times faster than one a row. Bad rows pass through.

    A response gets the end-of-sequence token appended, because GFT trains on it; one that is written out at the end of
    the text is not doubled.

    Args:
        eta: share of a response's tokens that are its important group, where it has token scores.

    Raises:
        ValueError: a prompt is a message list and the tokenizer has no chat template.
    """
    eos_token, eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id  # slow to look up: done once
    texts: list[str] = []
    for row in rows:
        if isinstance(row, Row):
            texts += [row.prompt] if isinstance(row.prompt, str) else []
            texts += [response.text.removesuffix(eos_token) for response in row.responses]
    plain_ids = iter(_encode_plain(texts, tokenizer))
    encoded: list[EncodedRow | BadRow] = []
    for row in rows:
        if isinstance(row, BadRow):
            encoded.append(row)
            continue
        prompt = next(plain_ids) if isinstance(row.prompt, str) else _encode_chat(row.prompt, tokenizer)
        response_ids = [np.array([*next(plain_ids), eos_token_id], np.int64) for _ in row.responses]
        try:
            prompt_ids = _checked_prompt(prompt, limits)
            _check_responses(response_ids, limits)
            responses = tuple(
                RecordedResponse(response.text.removesuffix(eos_token), ids, response.source, groups)
                for response, ids, groups in zip(
                    row.responses, response_ids, _token_groups(row, response_ids, eta), strict=True
                )
            )
        except BadRow as bad:
            encoded.append(bad)
        else:
            encoded.append(EncodedRow(prompt_ids, row.label, responses, row.metadata))
    return encoded


def _encode_plain(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    encoding = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return encoding["input_ids"]


def _encode_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int] | BadRow:
    if tokenizer.chat_template is None:
        raise ValueError(
            "a prompt is a list of messages, but the tokenizer has no chat template: give prompts as strings"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, sanitize_control_tokens=True
        )
    except jinja2.TemplateError as error:  # for example: roles that do not alternate
        return BadRow(f"the chat template refuses the prompt: {error}")


def _checked_prompt(prompt: list[int] | BadRow, limits: Limits) -> np.ndarray:  # [prompt length]
    if isinstance(prompt, BadRow):
        raise prompt
    if not prompt:
        raise BadRow("prompt has no tokens")
    if len(prompt) > limits.max_prompt_length:
        raise BadRow(f"prompt has {len(prompt)} tokens, more than --max-prompt-length {limits.max_prompt_length}")
    ids = np.array(prompt, np.int64)
    _check_ids(ids, "prompt", limits)
    return ids


def _check_responses(response_ids: list[np.ndarray], limits: Limits) -> None:
    for i, ids in enumerate(response_ids):
        if len(ids) > limits.max_response_length:
            raise BadRow(
                f"responses[{i}] has {len(ids)} tokens, more than --rollout-max-response-len "
                f"{limits.max_response_length}"
            )
        _check_ids(ids, f"responses[{i}]", limits)


def _token_groups(row: Row, response_ids: list[np.ndarray], eta: float) -> list[np.ndarray | None]:
    groups = []
    for i, (response, ids) in enumerate(zip(row.responses, response_ids, strict=True)):
        try:
            groups.append(response_groups(response, len(ids), eta))
        except BadRow as bad:
            raise BadRow(f"responses[{i}].{bad}") from None
    return groups


def _check_ids(ids: np.ndarray, name: str, limits: Limits) -> None:
    if ids.max() >= limits.vocab_size:
        raise BadRow(f"{name} has token {ids.max()}, outside the model's vocabulary of {limits.vocab_size}")
