"""Each way of scoring against a computation of its own, and the file that comes out against what training reads."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import load_program
from scoring.cluster import Cluster
from scoring.excess import Excess
from scoring.keep import Keep
from scoring.kmeans import k_means
from scoring.rows import score_file
from scoring.tfidf import TfIdf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)

from gft_megatron.data.prompts import prepare_prompts

CHAT = [{"role": "user", "content": "1+1?"}]
# Merged and single characters, a character of two bytes, white space, control tokens as text, one at the end.
TEXTS = ["ababab caba", "a\u00e4 <eos> b [SEP] c", "abc<eos>", "b \n b", "c" * 40 + " ba" * 9]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two causal models with one tokenizer, `policy` and `reference`, and a classifier with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("hf")
    tiny = load_program("tools/make_tiny_model.py")
    (folder / "corpus").write_text("abab caba abc\n" * 20)
    sizes = dict(hidden_size=16, num_layers=2, intermediate_size=16, init_std=0.5)
    for seed, name in enumerate(["policy", "reference"]):
        tiny.write_tiny_model(
            tiny.TinyModel(
                output=folder / name,
                tokenizer="byte-bpe",
                corpus=(folder / "corpus",),
                vocab_size=270,
                seed=seed,
                **sizes,
            )
        )
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "b",
        "ab",
        "##a",
        "##b",
        "##c",
        "##ab",
        "c",
        "ba",
        "[",
        "]",
        "se",
    ]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder / "classifier")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, num_labels=2, initializer_range=0.5,
    )  # fmt: skip
    BertForTokenClassification(config).save_pretrained(folder / "classifier")
    return folder


def write(folder: Path, *responses: list[str], prompt: Any = "1+1=") -> Path:
    """A data file of a row for each list of responses."""
    rows = [
        {"prompt": prompt, "label": "2", "responses": [{"text": text, "source": "expert"} for text in texts]}
        for texts in responses
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def scored(path: Path, key: str = "token_scores") -> list[list[float]]:
    return [response[key] for line in path.open() for response in json.loads(line)["responses"]]


def tokens_of(text: str, hf: Path) -> list[int]:
    """As training encodes a response, without the end of the sequence."""
    tokenizer = AutoTokenizer.from_pretrained(hf / "policy")
    return tokenizer.encode(text.removesuffix("<eos>"), add_special_tokens=False, split_special_tokens=True)


def test_tfidf_by_hand(tmp_path: Path, hf: Path) -> None:
    # z, y and x are tokens of one character. z is in 2 of 3 responses, y in 2, x in 1, <eos> in 3.
    data = write(tmp_path, ["zzy", "y"], ["xz"])
    score_file(TfIdf(input=data, output=tmp_path / "out", hf_checkpoint=str(hf / "policy")))
    two, one, three = (math.log(4 / (1 + df)) + 1 for df in (2, 1, 3))
    expected = [
        [2 / 4 * two, 2 / 4 * two, 1 / 4 * two, 1 / 4 * three],
        [1 / 2 * two, 1 / 2 * three],
        [1 / 3 * one, 1 / 3 * two, 1 / 3 * three],
    ]
    for found, wanted in zip(scored(tmp_path / "out"), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("prompt", ["1+1=", CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("tokens_per_pass", [1, 100])
def test_excess_is_the_difference_of_two_losses(tmp_path: Path, hf: Path, prompt: Any, tokens_per_pass: int) -> None:
    data = write(tmp_path, TEXTS[:2], TEXTS[2:], prompt=prompt)
    policy, reference = str(hf / "policy"), str(hf / "reference")
    score_file(
        Excess(
            input=data, output=tmp_path / "out", hf_checkpoint=policy, ref_hf_checkpoint=reference,
            tokens_per_pass=tokens_per_pass, device="cpu",
        )
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(policy)
    if prompt is CHAT:
        prompt_ids = tokenizer.encode("user: 1+1?\nassistant: ", add_special_tokens=False)
    else:
        prompt_ids = tokens_of(prompt, hf)
    networks = [AutoModelForCausalLM.from_pretrained(name).double() for name in (policy, reference)]
    for text, found in zip(TEXTS, scored(tmp_path / "out"), strict=True):
        response = [*tokens_of(text, hf), tokenizer.eos_token_id]
        with torch.no_grad():
            losses = [-network(torch.tensor([prompt_ids + response])).logits[0].log_softmax(-1) for network in networks]
        for i, token in enumerate(response):
            before = len(prompt_ids) + i - 1
            wanted = losses[0][before, token] - losses[1][before, token]
            assert found[i] == pytest.approx(float(wanted), rel=1e-4, abs=1e-4)
        assert len(found) == len(response)


@pytest.mark.parametrize("window", [64, 7])
def test_keep_is_the_mean_of_the_overlapping_sub_tokens(tmp_path: Path, hf: Path, window: int) -> None:
    data = write(tmp_path, TEXTS)
    score_file(
        Keep(
            input=data, output=tmp_path / "out", hf_checkpoint=str(hf / "policy"), model=str(hf / "classifier"),
            window=window, tokens_per_pass=20, device="cpu",
        )
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(hf / "policy")
    sub_tokenizer = AutoTokenizer.from_pretrained(hf / "classifier")
    classifier = BertForTokenClassification.from_pretrained(hf / "classifier").double()
    for text, found in zip(TEXTS, scored(tmp_path / "out"), strict=True):
        text = text.removesuffix("<eos>")
        plain = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        sub_tokens = sub_tokenizer(text, **plain)
        kept = []
        for start in range(0, len(sub_tokens["input_ids"]), window - 2):
            ids = sub_tokens["input_ids"][start : start + window - 2]
            with torch.no_grad():
                probabilities = classifier(torch.tensor([[2, *ids, 3]])).logits[0].softmax(-1)[:, 1]
            kept += probabilities[1:-1].tolist()
        wanted = []
        for start, end in tokenizer(text, **plain)["offset_mapping"]:
            of = [p for p, (s, e) in zip(kept, sub_tokens["offset_mapping"], strict=True) if s < end and e > start]
            wanted.append(sum(of) / len(of) if of else 0.0)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert scored(tmp_path / "out")[3].count(0.0) == 3  # space, line feed, space: no sub-token has them


@pytest.fixture(scope="module")
def two_kinds(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model to which z and y are one thing and everything else the opposite."""
    folder = tmp_path_factory.mktemp("two_kinds")
    tokenizer = AutoTokenizer.from_pretrained(hf / "policy")
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(hf / "policy")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        signs = torch.full((len(embedding), 1), -1.0)
        signs[tokenizer.convert_tokens_to_ids(["z", "y"])] = 1.0
        embedding.copy_(20 * signs * torch.ones(16).index_fill_(0, torch.arange(8), -1.0) + embedding)
    model.save_pretrained(folder)
    return str(folder)


def test_clusters_are_kinds_of_tokens_and_always_the_same(tmp_path: Path, two_kinds: str) -> None:
    texts = ["zyaz", "cyz" * 5, "1z2y3", "y"] * 3
    data = write(tmp_path, *([text] for text in texts))

    def groups(**options: Any) -> list[list[int]]:
        settings = dict(num_clusters=2, fit_responses=6, device="cpu") | options
        score_file(Cluster(input=data, output=tmp_path / "out", hf_checkpoint=two_kinds, **settings))
        return scored(tmp_path / "out", "token_groups")

    found = groups()
    kind = found[0][0]
    for text, its in zip(texts, found, strict=True):
        assert [group == kind for group in its] == [character in "zy" for character in text] + [False]
    assert {group for its in found for group in its} == {0, 1}
    assert groups() == found == groups(tokens_per_pass=1)
    more = groups(num_clusters=4)
    assert groups(num_clusters=4) == more and {group for its in more for group in its} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="--num-clusters 64: the sample has only .* different hidden states"):
        groups(num_clusters=64)


def test_k_means_finds_planted_centers() -> None:
    generator = torch.Generator().manual_seed(1)
    planted = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = planted.repeat(50, 1) + 0.1 * torch.randn(200, 2, generator=generator)
    means = torch.stack([points[i::4].mean(0) for i in range(4)])
    for seed in range(5):
        centers = k_means(points, 4, torch.Generator().manual_seed(seed))
        order = torch.cdist(planted, centers).argmin(1)
        torch.testing.assert_close(centers[order], means)


def test_the_file_is_the_same_but_for_its_scores(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"token_groups": [5], "token_scores": None, "id": 7}  # of another tokenizer
    rows = [
        {"prompt": CHAT, "label": "2", "n": 1.5, "responses": [{"text": "ab", "source": "teacher"} | old]},
        {"prompt": "a", "label": "b"},
        {"prompt": "a"},
        {"prompt": "a", "label": "b", "responses": [{"text": text, "source": "expert"} for text in TEXTS]},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_file(TfIdf(input=data, output=data, hf_checkpoint=str(hf / "policy")))  # in place
    assert "warning: 1 bad rows are left out, the first is line 3: label is missing" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    first, second, last = (json.loads(line) for line in data.open())
    (response,) = first["responses"]
    assert len(response.pop("token_scores")) == len(tokens_of("ab", hf)) + 1
    assert response == {"text": "ab", "source": "teacher", "id": 7} and second == rows[1]
    assert {k: v for k, v in first.items() if k != "responses"} == {"prompt": CHAT, "label": "2", "n": 1.5}
    assert [r["text"] for r in last["responses"]] == TEXTS
    tokenizer = AutoTokenizer.from_pretrained(hf / "policy")
    info = prepare_prompts(
        [data],
        tokenizer,
        store_path=tmp_path / "store",
        quarantine_path=tmp_path / "quarantine",
        max_prompt_length=100,
        max_response_length=100,
        vocab_size=len(tokenizer),
    )
    assert (info.num_rows, info.num_bad_rows, info.num_scored) == (3, 0, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rho"], "METHOD is 'rho'; it has to be one of tfidf, keep, excess, cluster"),
        (["tfidf", "--lambda", "1"], "Unrecognized options: --lambda"),
        (["tfidf", "--hf-checkpoint", "gone"], "--hf-checkpoint gone: no tokenizer"),
        (["tfidf", "--hf-checkpoint", "classifier"], "classifier: the tokenizer has no end-of-sequence token"),
        (["excess", "--ref-hf-checkpoint", "broken"], "a score is nan: a model's output is not finite"),
        (["tfidf", "--input", "gone"], "data file gone cannot be read: No such file"),
        (["tfidf", "--input", "bare"], "no recorded response to score; the first of 1 bad rows is line 2: bad"),
        (["cluster", "--input", "bare"], "bare has no recorded response to score"),
        (["cluster", "--num-clusters", "1"], "--num-clusters is 1; it has to be 2 to 64"),
        (["keep", "--model", "policy"], "--model policy: the files have no 'score.bias'"),
        (["keep", "--model", "classifier", "--window", "65"], "--window is 65; it has to be 3 to 64"),
        (["excess", "--ref-hf-checkpoint", "classifier"], "classifier has another tokenizer than --hf-checkpoint"),
        (["excess", "--ref-hf-checkpoint", "reference", "--input", "long"], "line 1: prompt and response have 13"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for model in ("policy", "reference", "classifier"):
        (tmp_path / model).symlink_to(hf / model)
    write(tmp_path, ["ab"])
    AutoTokenizer.from_pretrained("policy").save_pretrained("broken")
    broken = AutoModelForCausalLM.from_pretrained("policy")
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    broken.save_pretrained("broken")
    (tmp_path / "bare").write_text('{"prompt": "a", "label": "b"}\n{')
    write(tmp_path, ["z" * 127]).rename("long")
    write(tmp_path, ["ab"])
    before = set(tmp_path.iterdir())
    method, *others = arguments
    common = ["--input", "rows.jsonl", "--output", "out", "--hf-checkpoint", "policy"]
    monkeypatch.setattr(sys, "argv", ["score_tokens.py", method, *common, *others])
    with pytest.raises(SystemExit) as stopped:
        load_program("tools/score_tokens.py").main()
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)
    assert "\n" not in str(stopped.value) and set(tmp_path.iterdir()) == before
