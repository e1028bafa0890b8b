"""Rewriting: which responses are chosen, what lies over the data, and that all of it survives a checkpoint."""

import json

import numpy as np
import pytest
import torch

from gft_megatron.command_line import parse_args
from gft_megatron.groups import Prompt, RecordedResponse, Source
from gft_megatron.rewriting import Rewrites, RewrittenPrompts, write_rewrites


def observed(batches):
    rewrites = Rewrites()
    for rows, responses, nll in batches:
        rewrites.observe(torch.tensor(rows), torch.tensor(responses), torch.tensor(nll, dtype=torch.float64))
    return rewrites


def test_scores_are_a_moving_average_of_z_scores():
    rewrites = observed([([4, 5, 6], [0, 1, -1], [1.0, 3.0, 99.0]), ([4, 5], [0, 1], [2.0, 2.5])])
    # Own samples (-1) count for nothing. z of two values is -1 and 1.
    assert rewrites.scores == pytest.approx({(4, 0): -1.0, (5, 1): 1.0}, rel=1e-5)
    rewrites.observe(torch.tensor([4, 5]), torch.tensor([0, 1]), torch.tensor([9.0, 1.0]))
    assert rewrites.scores == pytest.approx({(4, 0): -1 * 0.9 + 0.1, (5, 1): 0.9 - 0.1}, rel=1e-5)


def test_the_worst_share_is_chosen_with_this_probability():
    nll = [float(i % 50) for i in range(200)]
    rewrites = observed([(list(range(200)), [0] * 200, nll)])
    worst = {(row, 0) for row in range(200) if row % 50 >= 45}
    assert set(rewrites.choose(share=0.1, probability=1.0, seed="a")) == worst
    half = rewrites.choose(share=0.1, probability=0.5, seed="a")
    assert set(half) < worst and 3 <= len(half) <= 17
    assert (
        half
        == rewrites.choose(share=0.1, probability=0.5, seed="a")
        != rewrites.choose(share=0.1, probability=0.5, seed="b")
    )


def prompt_of(row):
    ids = np.array([1, 2], np.int64)
    responses = (RecordedResponse(f"e{row}", ids, Source.EXPERT), RecordedResponse(f"t{row}", ids, Source.TEACHER))
    return Prompt(row, ids, "label", responses)


def test_rewrites_lie_over_the_data_and_can_be_taken_back(tmp_path):
    rewrites = observed([([0, 1], [0, 1], [1.0, 2.0])])
    rewrites.put((1, 1), np.array([7, 8, 9], np.int64))
    rewrites.put((0, 0), None)
    assert (1, 1) not in rewrites.scores and (0, 0) in rewrites.scores and rewrites.refused == 1
    store = RewrittenPrompts([prompt_of(0), prompt_of(1)], rewrites, lambda ids: "-".join(map(str, ids)))
    assert [response.text for response in (*store[0].responses, store[1].responses[0])] == ["e0", "t0", "e1"]
    new = store[1].responses[1]
    assert new.text == "7-8" and new.token_ids.tolist() == [7, 8, 9] and new.source is Source.TEACHER
    write_rewrites(tmp_path / "rewrites.jsonl", store)
    assert [json.loads(line) for line in (tmp_path / "rewrites.jsonl").read_text().splitlines()] == [
        {"row": 1, "response": 1, "original": "t1", "rewritten": "7-8"}
    ]
    rewrites.restore((1, 1))
    assert store[1].responses[1].text == "t1"


def test_a_checkpoint_holds_all_of_it():
    rewrites = observed([([0, 1, 3], [0, 1, 0], [1.0, 2.0, 5.5])])
    rewrites.put((1, 1), np.array([7, 8, 9], np.int64))
    rewrites.put((0, 0), None)
    again = Rewrites.from_state(json.loads(json.dumps(rewrites.state_dict())))
    assert again.scores == rewrites.scores and again.refused == 1
    assert list(again.scores) == list(rewrites.scores)
    assert again.replaced[1, 1].tolist() == [7, 8, 9] and again.replaced[1, 1].dtype == np.int64


def test_when_a_rewriting_is_due():
    flags = ["--hf-checkpoint", "m", "--prompt-data", "a", "--train-iters", "40", "--loss", "cadft"]
    literal = parse_args([*flags, "--rewrite-interval", "10", "--rewrite-warmup", "15"])
    share = parse_args([*flags, "--rewrite-interval", "10", "--rewrite-warmup", "0.25"])
    assert [step for step in range(1, 41) if literal.rewrites_between(step - 1, step)] == [25, 35]
    assert [step for step in range(1, 41) if share.rewrites_between(step - 1, step)] == [20, 30, 40]
    assert literal.rewrites_between(24, 27) and not literal.rewrites_between(14, 24)
    assert not any(parse_args(flags).rewrites_between(step - 1, step) for step in range(1, 41))
