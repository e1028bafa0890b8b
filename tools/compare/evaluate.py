"""Figures of trained models on held-out and on training problems: tools/compare/evaluate.py --models DIR... --output F

All models in one process, because starting takes longer than evaluating one. Writes {DIR: {"test": {...}, "train":
{...}, "expert_nll": nats per token of the held-out problems' expert answers}}.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gft_megatron.command_line import parse_flags
from gft_megatron.data.prompts import prepare_prompts
from gft_megatron.data.store import PromptStore
from gft_megatron.groups import Prompt
from gft_megatron.rewards import build_reward
from gft_megatron.rollout.collect import Collector
from gft_megatron.rollout.engine import SamplingParams
from gft_megatron.rollout.figures import evaluation_figures, evaluation_sums
from gft_megatron.rollout.local import LocalEngine
from gft_megatron.rollout.samples import SampleMaker

_MAX_PROMPT_LENGTH, _MAX_RESPONSE_LENGTH = 26, 6
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of trained models."""

    models: tuple[Path, ...]
    """Hugging Face folders of one architecture and tokenizer."""
    test: Path
    """Held-out problems with an expert's answer each."""
    train: Path
    """Training problems; as many of them are used as there are held-out ones."""
    output: Path
    """File to write."""
    samples: int = 8
    """Samples of each problem."""


def evaluate(settings: Evaluation) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(settings.models[0])
    test = _prompts(settings.test, tokenizer)
    problems = {"test": test, "train": _prompts(settings.train, tokenizer)[: len(test)]}
    figures = asyncio.run(_figures(settings, tokenizer, problems))
    settings.output.write_text(json.dumps(figures, indent=1) + "\n")


async def _figures(
    settings: Evaluation, tokenizer: PreTrainedTokenizerBase, problems: dict[str, list[Prompt]]
) -> dict[str, dict[str, object]]:
    engine = LocalEngine(
        settings.models[0],
        eos_token_ids={tokenizer.eos_token_id},
        pad_token_id=tokenizer.pad_token_id,
        max_batch_size=512,
        seed=_SEED,
    )
    maker = SampleMaker(
        engine=engine,
        reward=build_reward("examples/countdown_reward.py:score"),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        seed=_SEED,
        max_concurrent_samples=100_000,
    )
    collector = Collector(maker)
    figures: dict[str, dict[str, object]] = {}
    for folder in settings.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # One version for all: the random numbers depend on it, and every model shall get the same ones.
        await engine.update_weights(model.named_parameters(), version=0)
        figures[str(folder)] = {"expert_nll": expert_nll(model, problems["test"])}
        for name, prompts in problems.items():
            samples = await collector.sample(prompts, settings.samples, SamplingParams(_MAX_RESPONSE_LENGTH), name=name)
            figures[str(folder)][name] = evaluation_figures(evaluation_sums(samples), settings.samples)
    await engine.close()
    return figures


@torch.no_grad()
def expert_nll(model: PreTrainedModel, prompts: list[Prompt]) -> float:
    """Mean over the tokens of the first recorded response of each prompt."""
    rows: list[Tensor] = []
    starts: list[int] = []
    for prompt in prompts:
        rows.append(torch.tensor([*prompt.token_ids, *prompt.responses[0].token_ids]))
        starts.append(len(prompt.token_ids))
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [n, longest]; causal: padding is not seen
    log_probs = model(tokens).logits[:, :-1].float().log_softmax(-1)
    of_tokens = log_probs.gather(-1, tokens[:, 1:, None])[..., 0]  # [n, longest - 1]
    position = torch.arange(1, tokens.shape[1])
    of_answer = (position >= torch.tensor(starts)[:, None]) & (position < lengths[:, None])
    return float(-of_tokens[of_answer].double().mean())


def _prompts(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.arrow"
        prepare_prompts(
            [file],
            tokenizer,
            store_path=path,
            quarantine_path=path.with_suffix(".bad"),
            max_prompt_length=_MAX_PROMPT_LENGTH,
            max_response_length=_MAX_RESPONSE_LENGTH,
            vocab_size=len(tokenizer),
        )
        store = PromptStore(path)
        return [store[row] for row in range(len(store))]


if __name__ == "__main__":
    try:
        evaluate(parse_flags(Evaluation, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
