"""Schedules against values worked out by hand."""

import math

import pytest

from gft_megatron.schedules import parse_schedules


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("mu=0.9:0.1:linear:4", {0: 0.9, 1: 0.7, 2: 0.5, 4: 0.1, 9: 0.1}),
        ("mu=0.9:0.1:linear:4:3", {0: 0.9, 3: 0.9, 5: 0.5, 7: 0.1}),
        ("mu=1:0:cosine:4", {0: 1.0, 1: (1 + math.cos(math.pi / 4)) / 2, 2: 0.5, 4: 0.0}),
        ("mu=1:0:step:3", {0: 1.0, 2: 1.0, 3: 0.0}),
        ("mu=0:1:linear", {0: 0.0, 5: 0.5, 10: 1.0}),  # to the last of the phase's 11 steps
    ],
)
def test_values(text, values):
    schedule = parse_schedules([text])["mu"]
    assert {step: schedule.at(step, num_steps=11) for step in values} == pytest.approx(values)


def test_a_phase_of_one_step():
    assert parse_schedules(["lam=0.9:0:linear"])["lam"].at(0, num_steps=1) == 0.9


@pytest.mark.parametrize(
    "text", ["mu", "mu=1", "mu=1:0", "mu=1:0:sine", "mu=a:0:linear", "mu=1:0:linear:x", "mu=1:nan:linear",
             "=1:0:step:2", "mu=1:0:linear:0", "mu=1:0:linear:5:-1", "mu=1:0:linear:5:1:1"]
)  # fmt: skip
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(ValueError, match="--schedule .*expected NAME=START:END:SHAPE"):
        parse_schedules([text])


def test_two_schedules_of_one_number_are_refused():
    with pytest.raises(ValueError, match="--schedule mu: given twice"):
        parse_schedules(["mu=1:0:linear", "mu=0.5:0:step"])
