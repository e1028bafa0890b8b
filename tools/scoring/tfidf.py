"""TF-IDF: a token matters that is frequent in its response and rare in others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scoring.method import Method, Pass, Response, Score
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TfIdf(Method):
    """Statistics: TF-IDF of each token over the responses of the data. Needs no model, only its tokenizer.

    The documents are the N recorded responses. A token that is in df of them and n times among the r tokens of this
    one scores n / r * (ln((1 + N) / (1 + df)) + 1), the smooth idf of scikit-learn.
    """

    def scorer(self, tokenizer: PreTrainedTokenizerBase, responses: Pass) -> Score:
        num_documents = 0
        document_frequency = np.zeros(len(tokenizer), np.int64)
        for chunk in responses("counting tokens"):
            num_documents += len(chunk)
            for response in chunk:
                document_frequency[np.unique(response.token_ids)] += 1
        idf = np.log((1 + num_documents) / (1 + document_frequency)) + 1

        def score(responses: Sequence[Response]) -> list[np.ndarray]:
            return [_frequency(response.token_ids) * idf[response.token_ids] for response in responses]

        return score


def _frequency(token_ids: np.ndarray) -> np.ndarray:  # [r] -> [r]: share of the response's tokens that are this one
    _, where, counts = np.unique(token_ids, return_inverse=True, return_counts=True)
    return counts[where] / len(token_ids)
