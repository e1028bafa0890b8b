"""From files to stored prompts: tokens, limits, quarantine, and a store that is whole or absent."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gsm8k_files import TRAIN, needs_gsm8k
from programs import load_program
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gft_megatron.data.prompts import PromptStore, PromptStoreInfo, prepare_prompts
from gft_megatron.groups import Source

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|start|>{{ m['role'] }}:{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Bytes as tokens, with a chat template that writes control tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny = load_program("tools/make_tiny_model.py")
    (folder / "corpus").write_text("a")
    tiny.write_tiny_model(
        tiny.TinyModel(output=folder, tokenizer="byte-bpe", corpus=(folder / "corpus",), vocab_size=259)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def row(prompt: Any = "1+1=", **other: Any) -> dict[str, Any]:
    return {"prompt": prompt, "label": "2"} | other


def recorded(text: str, source: str = "expert") -> dict[str, str]:
    return {"text": text, "source": source}


def prepare(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], **options: Any) -> PromptStoreInfo:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = dict(max_prompt_length=64, max_response_length=32, vocab_size=len(tokenizer), max_bad_row_frac=0.5)
    return prepare_prompts(
        [file],
        tokenizer,
        store_path=folder / "store.arrow",
        quarantine_path=folder / "quarantine.jsonl",
        **settings | options,
    )


def quarantined(info: PromptStoreInfo) -> list[tuple[int, str]]:
    return [(bad["line"], bad["reason"]) for bad in map(json.loads, info.quarantine_path.open())]


def test_store_gives_back_what_the_rows_say(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    responses = [recorded("tw\u00f6"), recorded("ii<eos>", "teacher"), recorded("x", "teacher")]
    rows = [row(responses=responses, metadata={"digits": [1, 1], "name": "\u00e9"}), row("2+2=", label="4")]
    info = prepare(tmp_path, tokenizer, rows)
    assert (info.num_rows, info.num_expert, info.num_teacher, info.num_bad_rows) == (2, 1, 2, 0)
    store = PromptStore(info.path)
    assert len(store) == 2 and store.fingerprint == info.fingerprint
    first, second = store[0], store[1]
    assert (first.row, first.label, first.metadata) == (0, "2", {"digits": [1, 1], "name": "\u00e9"})
    assert (second.row, second.label, second.responses, second.metadata) == (1, "4", (), {})
    assert tokenizer.decode(first.token_ids) == "1+1=" and first.token_ids.dtype == np.int64
    # One end-of-sequence token each, also where the text spells one.
    eos = tokenizer.eos_token_id
    for response, text in zip(first.responses, ["tw\u00f6", "ii", "x"], strict=True):
        ids = response.token_ids.tolist()
        assert response.text == text and ids.index(eos) == len(ids) - 1 and tokenizer.decode(ids[:-1]) == text
    assert [r.source for r in first.responses] == [Source.EXPERT, Source.TEACHER, Source.TEACHER]
    with pytest.raises(IndexError):
        store[2]


def test_text_never_becomes_a_control_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    evil = "a<eos>b<|start|>c"
    chat = [{"role": "user", "content": evil}]
    with caplog.at_level(logging.WARNING):
        info = prepare(tmp_path, tokenizer, [row(evil, responses=[recorded(evil)]), row(chat)])
    plain, chatted = PromptStore(info.path)[0], PromptStore(info.path)[1]
    eos, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|start|>")
    assert not {eos, start} & set(plain.token_ids.tolist()) and tokenizer.decode(plain.token_ids) == evil
    assert not {eos, start} & set(plain.responses[0].token_ids[:-1].tolist())
    # The template's own control tokens stay.
    ids = chatted.token_ids.tolist()
    assert ids.count(eos) == 1 and ids.count(start) == 2
    assert tokenizer.decode(ids) == f"<|start|>user:{evil}<eos><|start|>assistant:"
    assert "1 plain prompts, the first in line 1, contain the text of a control token" in caplog.text


def test_rows_beyond_the_limits_are_quarantined(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        row("p" * 64, responses=[recorded("r" * 31)]),  # both exactly at the limit, one token being <eos>
        row("p" * 65),
        row(responses=[recorded("r"), recorded("r" * 32)]),
        row([{"role": "tool", "content": "x"}]),
        None,
        row("\u00ff"),
    ]
    highest = max(tokenizer("\u00ff1+1=r")["input_ids"])
    info = prepare(tmp_path, tokenizer, rows, vocab_size=highest, max_bad_row_frac=0.9)
    assert info.num_rows == 1 and PromptStore(info.path)[0].token_ids.size == 64
    assert [(line, reason[:60]) for line, reason in quarantined(info)] == [
        (2, "prompt has 65 tokens, more than --max-prompt-length 64"),
        (3, "responses[1] has 33 tokens, more than --rollout-max-response"[:60]),
        (4, "the chat template refuses the prompt: no tools"),
        (5, "the row is null, not an object"),
        (6, f"prompt has token {highest}, outside the model's vocabulary of {highest}"[:60]),
    ]


def test_too_many_bad_rows_stop_the_run_in_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*[row()] * 97, None, *[row()] * 2]
    assert prepare(tmp_path, tokenizer, rows, max_bad_row_frac=0.01).num_bad_rows == 1
    (tmp_path / "store.arrow").unlink()
    with pytest.raises(ValueError) as error:
        prepare(tmp_path, tokenizer, [*rows, {}], max_bad_row_frac=0.01)
    message = str(error.value)
    assert message.startswith(
        f"2 of 101 data rows are bad (1.98%); the first is {tmp_path / 'rows.jsonl'} line 98: the "
    )
    assert str(tmp_path / "quarantine.jsonl") in message and "--max-bad-row-frac 0.01" in message
    assert "\n" not in message
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2
    # No store, and nothing half-written beside it.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quarantine.jsonl", "rows.jsonl"]


def test_nothing_to_train_on_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="no good row is left"):
        prepare(tmp_path, tokenizer, [{}], max_bad_row_frac=1.0)
    with pytest.raises(ValueError, match=r"rows.jsonl has no rows"):
        prepare(tmp_path, tokenizer, [])
    with pytest.raises(ValueError, match=r"gone.jsonl cannot be read: No such file"):
        prepare_prompts(
            [tmp_path / "gone.jsonl"],
            tokenizer,
            store_path=tmp_path / "s",
            quarantine_path=tmp_path / "q",
            max_prompt_length=1,
            max_response_length=1,
            vocab_size=1,
        )
    tokenizer.chat_template = None
    try:
        with pytest.raises(ValueError, match="the tokenizer has no chat template"):
            prepare(tmp_path, tokenizer, [row([{"role": "user", "content": "x"}])])
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE


def test_many_rows_keep_their_order_over_chunks_and_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    num_rows, seen = 1300, []
    rows = [row(f"{i}=", label=str(i)) if i % 100 else None for i in range(num_rows)]
    info = prepare(tmp_path, tokenizer, rows, progress=seen.append)
    store = PromptStore(info.path)
    assert [store[i].label for i in range(len(store))] == [str(i) for i in range(num_rows) if i % 100]
    assert [tokenizer.decode(store[i].token_ids) for i in (0, 511, 512, 1286)] == ["1=", "517=", "518=", "1299="]
    assert [line for line, _ in quarantined(info)] == list(range(1, num_rows + 1, 100))
    assert seen[-1] == num_rows and len(seen) > 2


def test_fingerprint_follows_the_content(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def fingerprint(*rows: Any) -> str:
        return prepare(tmp_path, tokenizer, list(rows)).fingerprint

    base = row("ab", responses=[recorded("c")])
    same = fingerprint(base, row())
    assert same == fingerprint(base, row(), None)  # a bad row is no content
    changes = [
        [row(), base],
        [base],
        [base | {"label": "3"}, row()],
        [base | {"metadata": {"x": 1}}, row()],
        [row("a", responses=[recorded("bc")]), row()],
        [row("ab", responses=[recorded("c", "teacher")]), row()],
    ]
    fingerprints = [fingerprint(*rows) for rows in changes]
    assert len({same, *fingerprints}) == len(changes) + 1


def test_unfinished_store_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = prepare(tmp_path, tokenizer, [row()] * 20).path
    whole = path.read_bytes()
    for size in [0, 7, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"prompt store .*store.arrow cannot be read"):
            PromptStore(path)
    with pytest.raises(ValueError, match="cannot be read"):
        PromptStore(tmp_path / "gone.arrow")


@needs_gsm8k
def test_all_of_gsm8k(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = tmp_path / "gsm8k.jsonl"
    load_program("tools/prepare_data.py").gsm8k(output=data, input=(TRAIN,))
    info = prepare_prompts(
        [data],
        tokenizer,
        store_path=tmp_path / "store.arrow",
        quarantine_path=tmp_path / "quarantine.jsonl",
        max_prompt_length=2048,
        max_response_length=2048,
        vocab_size=len(tokenizer),
    )
    assert (info.num_rows, info.num_expert, info.num_bad_rows) == (7473, 7473, 0)
    store = PromptStore(info.path)
    for i, line in enumerate(data.open()):
        if i % 97 == 0:
            source = json.loads(line)
            assert tokenizer.decode(store[i].token_ids) == source["prompt"]
            assert store[i].responses[0].text == source["responses"][0]["text"]
