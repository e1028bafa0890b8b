"""CADFT's compatibility-guided rewriting (arXiv:2606.11206): demonstrations that never fit the policy are replaced by
what the policy itself would say.

After a warm-up, every so many steps, the share of recorded responses with the highest moving average of compatibility
scores is taken, and each of them is replaced with some probability by a nucleus sample of the present policy. No reward
is asked. The score is the response's mean negative log-likelihood as a z-score of its batch; the paper's moving average
has no stated constant, here it is 0.9 for each visit, and the first visit counts as it is.

The data stay as they are: a rewrite lies over its row, and is gone when it is dropped. Nothing here draws samples.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gft_megatron.data.store import PromptStore
from gft_megatron.groups import Prompt, RecordedResponse

Place = tuple[int, int]
"""Row of the data and number of the response in it."""
_KEEP = 0.9
_EPS = 1e-6


@dataclass
class Rewrites:
    """Scores of recorded responses, and which of them were replaced. All of it is in every checkpoint."""

    scores: dict[Place, float] = field(default_factory=dict)
    replaced: dict[Place, np.ndarray] = field(default_factory=dict)  # [response length] int64
    refused: int = 0

    def observe(self, rows: Tensor, responses: Tensor, nll: Tensor) -> None:
        """Take in one batch.

        Args:
            rows: [n] int64.
            responses: [n] int64, -1 for own samples, which have no place.
            nll: [n] mean negative log-likelihood of each response.
        """
        recorded = responses >= 0
        values = nll[recorded].double()
        normalised = (values - values.mean()) / (values.std(correction=0) + _EPS) if len(values) else values
        for place, score in zip(
            zip(rows[recorded].tolist(), responses[recorded].tolist(), strict=True), normalised.tolist(), strict=True
        ):
            before = self.scores.get(place)
            self.scores[place] = score if before is None else _KEEP * before + (1.0 - _KEEP) * score

    def choose(self, *, share: float, probability: float, seed: str) -> list[Place]:
        """Of the `share` of all scored responses with the highest scores, each with this probability."""
        count = round(share * len(self.scores))
        worst = sorted(self.scores, key=lambda place: (-self.scores[place], place))[:count]
        chance = random.Random(seed)
        return [place for place in worst if chance.random() < probability]

    def put(self, place: Place, token_ids: np.ndarray | None) -> None:
        """Replace a response, or count that its rewrite was refused (None). A new text has no score yet."""
        if token_ids is None:
            self.refused += 1
        else:
            self.replaced[place] = token_ids
            del self.scores[place]

    def restore(self, place: Place) -> None:
        """Back to the response of the data."""
        del self.replaced[place]
        self.scores.pop(place, None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": [[*place, score] for place, score in self.scores.items()],
            "replaced": [[*place, ids.tolist()] for place, ids in self.replaced.items()],
            "refused": self.refused,
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Rewrites:
        return Rewrites(
            {(row, response): score for row, response, score in state["scores"]},
            {(row, response): np.array(ids, np.int64) for row, response, ids in state["replaced"]},
            state["refused"],
        )


@dataclass(frozen=True)
class RewrittenPrompts:
    """A prompt store with the rewrites laid over it."""

    store: PromptStore
    rewrites: Rewrites
    decode: Callable[[Sequence[int]], str]

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> Prompt:
        prompt = self.store[row]
        responses = tuple(self._response(row, i, response) for i, response in enumerate(prompt.responses))
        return replace(prompt, responses=responses)

    def _response(self, row: int, index: int, original: RecordedResponse) -> RecordedResponse:
        ids = self.rewrites.replaced.get((row, index))
        return original if ids is None else RecordedResponse(self.decode(ids[:-1].tolist()), ids, original.source)


def write_rewrites(path: Path, prompts: RewrittenPrompts) -> None:
    """One line of JSON for each rewrite there is, the original beside it."""
    lines = []
    for row, response in sorted(prompts.rewrites.replaced):
        before, now = prompts.store[row].responses[response], prompts[row].responses[response]
        lines.append(
            json.dumps({"row": row, "response": response, "original": before.text, "rewritten": now.text}) + "\n"
        )
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines))
    os.replace(partial, path)
