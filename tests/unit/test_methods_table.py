"""docs/methods.md says of each loss what the loss says of itself, and its flags and links exist."""

import re
from pathlib import Path

from gft_megatron.command_line import flat_values, parse_args
from gft_megatron.config import _NATURAL_GROUPS
from gft_megatron.losses import LOSSES, batch_sums_of_policy, is_token_local, natural_responses, required_inputs

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
INPUTS = {
    "rewards": "advantages",
    "old": "old_log_probs",
    "entropy": "entropy",
    "reference": "ref_log_probs",
    "reference's logits": "ref_kl",
    "logits": "top_entropy",
    "token scores": "token_groups",
    "sampler's log-probs": "rollout_log_probs",
}


def test_every_loss_has_its_row():
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\([^)]*\) (\|.*)$", TEXT, re.M))
    assert rows.keys() == LOSSES.keys()
    for name, loss in LOSSES.items():
        needs, groups, local, _ = [cell.strip() for cell in rows[name].split("|")[1:-1]]
        words = set() if needs == "-" else set(needs.split(", "))
        assert {INPUTS[word] for word in words - {"batch"}} == required_inputs(loss), name
        assert ("batch" in words) == batch_sums_of_policy(loss), name
        assert groups == "+".join(map(str, _NATURAL_GROUPS[natural_responses(loss)])), name
        assert (local == "yes") == is_token_local(loss), name


def test_links_lead_to_a_heading():
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= headings


def test_flags_exist():
    known = flat_values(parse_args(["--hf-checkpoint", "model", "--prompt-data", "rows.jsonl", "--train-iters", "2"]))
    named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*[a-z])", TEXT)} - {"config"}
    assert {name.removeprefix("no_") for name in named} <= known.keys()
