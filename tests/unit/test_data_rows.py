"""Each kind of broken row is named with its line; everything that can be read is read."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from gft_megatron.data.rows import MAX_LINE_BYTES, BadRow, Row, RowResponse, read_rows
from gft_megatron.groups import Source

GOOD = {"prompt": "1+1=", "label": "2"}

BAD_LINES = [
    (b"{", "bad JSON"),
    (b'{"prompt": "a", "label": "b", "metadata": {"x": NaN}}', "NaN is not JSON"),
    (b"[" * 100_000, "bad JSON"),
    (b"1" * 5000, "bad JSON"),
    (b'{"prompt": "\xff", "label": "b"}', "not UTF-8"),
    (b"null", "the row is null, not an object"),
    (b'["a"]', "the row is a list, not an object"),
    (b'{"label": "2"}', "prompt is missing"),
    (b'{"prompt": "a"}', "label is missing"),
    (b'{"prompt": null, "label": "2"}', "prompt is null, not a string"),
    (b'{"prompt": "a", "label": 2}', "label is a number, not a string"),
    (b'{"prompt": "a", "label": true}', "label is a boolean, not a string"),
    (b'{"prompt": " \\n", "label": "2"}', "prompt is empty"),
    (b'{"prompt": "a", "label": ""}', "label is empty"),
    (b'{"prompt": "a\\u0000", "label": "2"}', "prompt has a NUL character"),
    (b'{"prompt": "a\\ud800", "label": "2"}', "prompt has a lone surrogate"),
    (b'{"prompt": [], "label": "2"}', "prompt is empty"),
    (b'{"prompt": ["hi"], "label": "2"}', "prompt[0] is a string"),
    (b'{"prompt": [{"role": "user"}], "label": "2"}', "prompt[0].content is missing"),
    (b'{"prompt": [{"role": "user", "content": ["x"]}], "label": "2"}', "prompt[0].content is a list"),
    (b'{"prompt": "a", "label": "2", "responses": "r"}', "responses is a string, not a list"),
    (b'{"prompt": "a", "label": "2", "responses": ["r"]}', "responses[0] is a string"),
    (b'{"prompt": "a", "label": "2", "responses": [{"text": "r"}]}', "responses[0].source is missing"),
    (b'{"prompt": "a", "label": "2", "responses": [{"text": "", "source": "expert"}]}', "responses[0].text is empty"),
    (b'{"prompt": "a", "label": "2", "responses": [{"text": "r", "source": "self"}]}', "responses[0].source is 'self'"),
    *(
        (b'{"prompt": "a", "label": "2", "responses": [{"text": "r", "source": "expert", %s}]}' % tokens, reason)
        for tokens, reason in [
            (b'"token_scores": "high"', "responses[0].token_scores is a string, not a list"),
            (b'"token_scores": [1, "2"]', "responses[0].token_scores[1] is 2, not a finite number"),
            (b'"token_scores": [true]', "responses[0].token_scores[0] is True, not a finite number"),
            (b'"token_scores": [1e999]', "responses[0].token_scores[0] is inf, not a finite number"),
            (b'"token_scores": [1' + b"0" * 400 + b"]", "not a finite number"),
            (b'"token_groups": [0, 1.0]', "responses[0].token_groups[1] is 1.0, not an integer of 0 to 63"),
            (b'"token_groups": [-1]', "responses[0].token_groups[0] is -1, not an integer of 0 to 63"),
            (b'"token_groups": [64]', "responses[0].token_groups[0] is 64, not an integer"),
            (b'"token_scores": [1], "token_groups": [1]', "both token_scores and token_groups"),
        ]
    ),
    (b'{"prompt": "a", "label": "2", "metadata": []}', "metadata is a list, not an object"),
    (b'{"prompt": "a", "label": "2", "metadata": {"x": "\\udfff"}}', "metadata has a lone surrogate"),
    (b'{"prompt": "' + b"x" * 10_000_000 + b'", "label": "2"}', f"the line is longer than {MAX_LINE_BYTES} bytes"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES, ids=[reason[:30] for _, reason in BAD_LINES])
def test_bad_line_is_named_and_its_neighbours_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    (first, before), (second, bad), (third, after) = read_rows(path)
    assert (first, second, third) == (1, 2, 3)
    assert isinstance(bad, BadRow) and reason in str(bad) and len(str(bad)) < 200
    assert before == after == Row("1+1=", "2", (), "{}")


def test_byte_order_mark_crlf_blank_lines_and_other_keys_are_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    separator = "\u2028"  # ends a line for str.splitlines, not for JSON Lines
    rows = [json.dumps(GOOD), "", json.dumps({"prompt": separator + "x", "label": "2", "id": 7}, ensure_ascii=False)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert list(read_rows(path)) == [(1, Row("1+1=", "2", (), "{}")), (3, Row(separator + "x", "2", (), "{}"))]


def test_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    row = {
        "prompt": [message | {"name": "n"} for message in messages],
        "label": "2",
        "responses": [
            {"text": "two", "source": "expert", "token_scores": [1, -0.5]},
            {"text": "ii", "source": "teacher", "token_scores": None, "token_groups": [0, 3]},
        ],
        "metadata": {"b": 1, "a": ["\u00e9"]},
    }
    path.write_text(json.dumps(row))
    responses = (RowResponse("two", Source.EXPERT, [1, -0.5]), RowResponse("ii", Source.TEACHER, None, [0, 3]))
    expected = Row(messages, "2", responses, '{"a": ["\u00e9"], "b": 1}')
    assert list(read_rows(path)) == [(1, expected)]


def test_parquet_equals_json_lines(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "1+1=",
            "label": "2",
            "responses": [{"text": "2", "source": "expert", "token_scores": [0.5]}],
            "metadata": {"d": [1, 1]},
        },
        {"prompt": "a", "label": "b", "responses": None, "metadata": None},
        {"prompt": None, "label": "b", "responses": [], "metadata": {"d": [2]}},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # The suffix does not matter, the content does.
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.data")
    from_json, from_parquet = (list(read_rows(tmp_path / name)) for name in ("rows.jsonl", "rows.data"))
    assert from_parquet[:2] == from_json[:2]
    assert from_parquet[2][0] == 3 and str(from_parquet[2][1]) == str(from_json[2][1]) == "prompt is null, not a string"


def test_parquet_values_that_json_has_not(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "label": "b", "metadata": {"day": datetime.date(2026, 1, 1), "x": 1.0}}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    [(_, bad)] = read_rows(tmp_path / "rows.parquet")
    assert isinstance(bad, BadRow) and "metadata is not JSON" in str(bad)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    for name, reason in (("missing.jsonl", "No such file"), (".", "Is a directory"), ("broken.parquet", "Parquet")):
        with pytest.raises(ValueError, match=f"data file .* cannot be read: .*{reason}") as error:
            list(read_rows(tmp_path / name))
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
