"""Write a number for each token of every recorded response into a data file: what SFT-GO makes its groups of.

python tools/score_tokens.py tfidf   --input rows.jsonl --output scored.jsonl --hf-checkpoint Qwen2.5-0.5B
python tools/score_tokens.py keep    ... --model llmlingua-2-xlm-roberta-large-meetingbank
python tools/score_tokens.py excess  ... --ref-hf-checkpoint Qwen2.5-0.5B-reference
python tools/score_tokens.py cluster ... --num-clusters 8

The first three write `token_scores`; in training, the --eta share of highest score is a response's important group.
`cluster` writes `token_groups`, groups as they are. Prompts and responses are encoded as training encodes them, so the
scores hold for the tokenizer of --hf-checkpoint only. METHOD --help lists the flags of a method.
"""

from __future__ import annotations

import torch
from scoring.cluster import Cluster
from scoring.excess import Excess
from scoring.keep import Keep
from scoring.method import Method
from scoring.rows import score_file
from scoring.tfidf import TfIdf

from gft_megatron.command_line import parse_command

METHODS: dict[str, type[Method]] = {"tfidf": TfIdf, "keep": Keep, "excess": Excess, "cluster": Cluster}


def main() -> None:
    try:
        score_file(parse_command(METHODS, word="METHOD", prog="score_tokens.py", description=__doc__))
    except torch.OutOfMemoryError:
        raise SystemExit("error: the GPU's memory is full: lower --tokens-per-pass, or give --bf16") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
