"""What a run takes from a checkpoint beside weights: nothing that its phase does not read, and defaults for the old."""

import torch

from gft_megatron.command_line import parse_args
from gft_megatron.phases import resolve_phases
from gft_megatron.training.setup import phase_of, saved_rewrites, saved_sums

FLAGS = ["--hf-checkpoint", "model", "--prompt-data", "a.jsonl", "--phases"]
OF_ISSUE_3 = {"progress": {"iteration": 1}, "order": {}, "evaluations": {}, "scheduler": {}, "layout": {}}


def test_a_checkpoint_from_before_there_were_phases():
    phases = resolve_phases(parse_args([*FLAGS, "cadft:3:batch_statistics=previous-step", "--rewrite-interval", "2"]))
    assert phase_of(OF_ISSUE_3) == 0
    assert saved_sums(OF_ISSUE_3, phases[0], torch.device("cpu")) is None
    assert saved_rewrites(phases, OF_ISSUE_3).scores == {}


def test_sums_of_the_step_before_are_for_the_same_phase_and_for_who_reads_them():
    first, second, exact = resolve_phases(parse_args([*FLAGS, "(cadft:3:batch_statistics=previous-step)*2,cadft:3"]))
    saved = {"phase": 1, "batch_sums": {"score": 0.1}}
    assert saved_sums(saved, first, torch.device("cpu")) is None
    assert saved_sums(saved, second, torch.device("cpu")) == {"score": torch.tensor(0.1, dtype=torch.float64)}
    assert saved_sums({**saved, "phase": 2}, exact, torch.device("cpu")) is None
