"""The real GSM8K files, where they lie beside the checkout. They are not part of it."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "shared/data/gsm8k"
TRAIN = FOLDER / "train.jsonl"
TEST = FOLDER / "test.jsonl"
MODEL_SOLUTIONS = FOLDER / "example_model_solutions.jsonl"

needs_gsm8k = pytest.mark.skipif(not FOLDER.is_dir(), reason="no ../shared/data/gsm8k beside the checkout")
