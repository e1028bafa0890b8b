"""The order in which prompts are taken: endless, each row exactly once an epoch, the same for any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np


class PromptOrder:
    """Positions 0, 1, 2, ... of an endless sequence of row numbers, and how far it has been read.

    Epoch e is a permutation made from (seed, e) alone, so a resumed run, on however many ranks, goes on where it was.

    Args:
        num_rows: rows of the prompt store.
        fingerprint: of the prompt store; a resumed run must have the same.
    """

    def __init__(self, num_rows: int, seed: int, *, shuffle: bool = True, fingerprint: str = "") -> None:
        if num_rows < 1:
            raise ValueError(f"an order needs at least one row, got {num_rows}")
        if seed < 0:
            raise ValueError(f"--seed is {seed}; it cannot be negative")
        self._num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = fingerprint
        self._position = 0
        self._epoch_rows: tuple[int, np.ndarray] | None = None

    @property
    def position(self) -> int:
        """Rows taken so far."""
        return self._position

    def take(self, n: int) -> list[int]:
        """The next n row numbers."""
        rows: list[int] = []
        while len(rows) < n:
            epoch, offset = divmod(self._position, self._num_rows)
            part = self._rows_of(epoch)[offset : offset + n - len(rows)].tolist()
            rows += part
            self._position += len(part)
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "num_rows": self._num_rows,
            "shuffle": self._shuffle,
            "fingerprint": self._fingerprint,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with its seed: another seed halfway would repeat and leave out rows.

        Raises:
            ValueError: the state belongs to other prompts.
        """
        for name, mine in (("num_rows", self._num_rows), ("fingerprint", self._fingerprint)):
            if state[name] != mine:
                raise ValueError(
                    f"the checkpoint was made with other prompts ({name} {state[name]}, now {mine}): resume with the "
                    f"same --prompt-data, tokenizer and --eta, or start a new run"
                )
        self._seed = state["seed"]
        self._shuffle = state["shuffle"]
        self._position = state["position"]
        self._epoch_rows = None

    def _rows_of(self, epoch: int) -> np.ndarray:  # [num_rows]
        if self._epoch_rows is None or self._epoch_rows[0] != epoch:
            self._epoch_rows = (epoch, self._permutation(epoch))
        return self._epoch_rows[1]

    def _permutation(self, epoch: int) -> np.ndarray:  # [num_rows]
        if not self._shuffle:
            return np.arange(self._num_rows)
        # Not Generator.permutation: NumPy keeps raw bits the same for ever (NEP 19), but not what is drawn from them.
        keys = np.random.Philox(np.random.SeedSequence([self._seed, epoch])).random_raw(self._num_rows)
        return np.argsort(keys, kind="stable")
