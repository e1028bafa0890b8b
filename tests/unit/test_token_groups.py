"""Scores and cluster ids of the data become groups of whole responses, and stay with their tokens up to the loss."""

from __future__ import annotations

import asyncio
import json
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import load_program
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gft_megatron.command_line import parse_args
from gft_megatron.data.packing import pack_micro_batch, packed_length
from gft_megatron.data.prompts import PromptStore, PromptStoreInfo, prepare_prompts
from gft_megatron.data.rows import MAX_TOKEN_GROUPS, BadRow, RowResponse
from gft_megatron.data.token_groups import response_groups, top_share
from gft_megatron.groups import GroupKey, Source
from gft_megatron.losses.sft_go import MAX_GROUPS
from gft_megatron.rewards import build_reward
from gft_megatron.rollout.collect import Collector
from gft_megatron.rollout.draws import Draw
from gft_megatron.rollout.engine import SamplingParams
from gft_megatron.rollout.recipe import GroupRecipe
from gft_megatron.rollout.samples import SampleMaker


def test_a_loss_has_room_for_every_group_that_data_may_have():
    assert MAX_TOKEN_GROUPS <= MAX_GROUPS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A token a character."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny = load_program("tools/make_tiny_model.py")
    tiny.write_tiny_model(tiny.TinyModel(output=folder, hidden_size=8, num_layers=1))
    return AutoTokenizer.from_pretrained(folder)


def expert(text: str, **tokens: Any) -> dict[str, Any]:
    return {"text": text, "source": "expert"} | tokens


def prepare(folder: Path, tokenizer: PreTrainedTokenizerBase, *rows: list[Any], **options: Any) -> PromptStoreInfo:
    """A store of a row for each list of responses."""
    lines = [json.dumps({"prompt": "1+1=", "label": "2", "responses": responses}) for responses in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return prepare_prompts(
        [folder / "rows.jsonl"],
        tokenizer,
        store_path=folder / "store.arrow",
        quarantine_path=folder / "quarantine.jsonl",
        max_prompt_length=16,
        max_response_length=16,
        vocab_size=len(tokenizer),
        max_bad_row_frac=1.0,
        **options,
    )


# Few values, so that many are equal.
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=60), st.integers(1, 99))
def test_top_share_takes_the_highest_and_of_equal_ones_the_first(scores: list[float], percent: int) -> None:
    groups = top_share(np.array(scores), percent / 100)
    assert groups.dtype == np.int64
    count = int((Decimal(percent) / 100 * len(scores)).to_integral_value(ROUND_CEILING))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert groups.tolist() == [int(i in order[:count]) for i in range(len(scores))]


def test_share_is_of_the_decimal_that_was_written() -> None:
    assert 0.07 * 100 > 7 and top_share(np.arange(100.0), 0.07).sum() == 7
    assert top_share(np.zeros(3), 1e-9).tolist() == [1, 0, 0]  # never nobody


def test_left_out_end_of_sequence_takes_the_median_or_the_last_group() -> None:
    def groups(num_tokens: int, eta: float = 0.5, **tokens: Any) -> list[int]:
        return response_groups(RowResponse("x", Source.EXPERT, **tokens), num_tokens, eta).tolist()

    assert groups(4, token_scores=[3, 1, 2], eta=0.25) == [1, 0, 0, 0]
    assert groups(4, token_scores=[3, 1, 2], eta=0.5) == [1, 0, 1, 0]  # the median is 2, and the earlier 2 comes first
    assert groups(4, token_scores=[3, 1, 2], eta=0.75) == [1, 0, 1, 1]
    assert groups(4, token_scores=[3, 1, 2, 9], eta=0.25) == [0, 0, 0, 1]
    assert groups(4, token_groups=[7, 0, 5]) == [7, 0, 5, 5]
    assert groups(4, token_groups=[7, 0, 5, 1]) == [7, 0, 5, 1]
    assert groups(1, token_scores=[]) == [1] and groups(1, token_groups=[]) == [0]
    assert response_groups(RowResponse("x", Source.EXPERT), 4, 0.5) is None
    for wrong in ([1, 2], [1, 2, 3, 4, 5]):
        with pytest.raises(BadRow, match=f"token_scores has {len(wrong)} numbers for 3 tokens"):
            groups(4, token_scores=wrong)


def test_groups_are_stored_counted_and_part_of_the_fingerprint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    scored = [expert("abc", token_scores=[3, 1, 2]), expert("ab", source="teacher"), expert("ab", token_groups=[7, 8])]
    info = prepare(tmp_path, tokenizer, scored, [expert("z")])
    assert (info.num_expert, info.num_teacher, info.num_scored) == (3, 1, 2)
    first, second = (PromptStore(info.path)[row].responses for row in (0, 1))
    assert first[0].token_groups.tolist() == [1, 0, 1, 0] and first[0].token_groups.dtype == np.int64
    assert first[1].token_groups is None and first[2].token_groups.tolist() == [7, 8, 8]
    assert second[0].token_groups is None

    def fingerprint(*responses: dict[str, Any], **options: Any) -> str:
        return prepare(tmp_path, tokenizer, list(responses), **options).fingerprint

    assert fingerprint(*scored) == fingerprint(*scored)
    plain = [expert("abc"), expert("ab", source="teacher"), expert("ab")]
    others = [fingerprint(*plain), fingerprint(*scored, eta=0.75), fingerprint(scored[0], *plain[1:])]
    assert len({fingerprint(*scored), *others}) == 4


def test_fingerprint_of_data_without_scores_is_that_of_older_checkpoints(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [expert("abc"), expert("ab", source="teacher")], []
    old = "c3535777bcaf0b697f8321eaf0e2c3d92d216a822681f5b938f4eee4f1e767a7"
    assert prepare(tmp_path, tokenizer, *rows).fingerprint == old


def test_numbers_that_do_not_fit_the_tokens_are_a_bad_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    info = prepare(tmp_path, tokenizer, [expert("a"), expert("abc", token_scores=[1.0])], [expert("a")])
    assert (info.num_rows, info.num_bad_rows, info.num_scored) == (1, 1, 0)
    assert "responses[1].token_scores has 1 numbers for 3 tokens" in info.quarantine_path.read_text()


@pytest.mark.parametrize("cp_size", [1, 2])
def test_groups_reach_the_micro_batch_beside_their_labels(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cp_size: int
) -> None:
    # The group of every token is told by its character.
    texts = ["3142", "5", "20202"]
    rows = [[expert(text, token_groups=[int(digit) for digit in text] + [9])] for text in texts]
    store = PromptStore(prepare(tmp_path, tokenizer, *rows, [expert("44")]).path)
    maker = SampleMaker(engine=None, reward=build_reward("exact"), decode=str, seed=0, max_concurrent_samples=1)
    recipe = GroupRecipe(
        n_expert=1, n_teacher=0, n_self=0, sampling=SamplingParams(max_new_tokens=1), needs_advantages=False
    )
    draws = [Draw(GroupKey(0, i), i, i) for i in range(len(store))]
    batch = asyncio.run(Collector(maker).collect(store, draws, recipe)).batch
    indices, multiple = [2, 0, 3, 1], 2 * cp_size
    length = packed_length(batch.lengths[indices].tolist(), sequence_multiple=multiple) + multiple
    seen = []
    for rank in range(cp_size):
        packed = pack_micro_batch(
            batch, indices, length=length, sequence_multiple=multiple, cp_size=cp_size, cp_rank=rank
        )
        for label, sequence, group in zip(
            *(column.tolist() for column in (packed.labels, packed.sequence_ids, packed.token_groups)), strict=True
        ):
            if label == -100 or indices[sequence] == 3:
                assert group == -1
            else:
                assert group == (9 if label == tokenizer.eos_token_id else int(tokenizer.decode([label])))
                seen.append(group)
    assert sorted(seen) == sorted([int(digit) for digit in "".join(texts)] + [9] * 3)


@pytest.mark.parametrize("eta", ["0", "1", "-0.5", "nan"])
def test_eta_out_of_range_is_refused(eta: str) -> None:
    with pytest.raises(ValueError, match=r"--eta is .*; it has to be above 0 and below 1"):
        parse_args(["--hf-checkpoint", "m", "--prompt-data", "d", "--train-iters", "1", "--eta", eta])
