"""What a person reads: whole lines in a log, a view that fits on any terminal, model text that does nothing."""

import io
import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from gft_megatron.observe.console import Console, LogConsole, SampleRow, build_console
from gft_megatron.observe.live import LiveConsole
from gft_megatron.observe.wording import collecting, count, duration, inert, phrases, shorten
from gft_megatron.rollout.counts import CollectNews

FIGURES = {
    "train/loss": 0.12341,
    "train/nll": 1.2341,
    "train/entropy_mean": 0.412,
    "train/grad_norm": 0.8,
    "train/lr": 1e-4,
    "train/tokens_per_sec": 5231.0,
    "rollout/reward_mean_self": 0.31,
    "rollout/reward_mean_expert": 1.0,
    "time/step_sec": 0.31,
    "time/generate_sec": 0.31 * 0.41,
    "time/forward_backward_sec": 0.31 * 0.45,
    "time/optimizer_sec": 0.31 * 0.05,
}
EVALUATION = {
    "eval/accuracy_avg@8": 0.2581,
    "eval/accuracy_pass@8": 0.8012,
    "eval/response_length_mean": 9.13,
    "eval/truncated_frac": 0.014,
    "eval/num_prompts": 394.0,
}
HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]x[/] [/nothing] \u202e\ud800 a\r\nb\tc\x9b31m :smile:"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class ClosedTerminal(Terminal):
    def write(self, text):
        raise OSError(5, "Input/output error")


def log_lines(*calls, **options):
    stream = io.StringIO()
    console = LogConsole(stream, **{"train_iters": 300, **options})
    for call in calls:
        call(console)
    return stream.getvalue().splitlines()


def live_text(monkeypatch, columns, *calls):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    console = LiveConsole(stream, train_iters=300)
    for call in calls:
        call(console)
    console.close()
    return stream.getvalue()


def without_styles(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_one_line_a_step():
    (line,) = log_lines(lambda console: console.step(12, FIGURES))
    assert line == (
        "step 12/300 | loss 0.1234 nll 1.234 | reward self 0.31 expert 1.00 | H 0.41 | gnorm 0.8 | lr 1.0e-04 | "
        "5.2k tok/s | step 0.31s (gen 41% train 50% other 9%)"
    )


def test_one_line_an_evaluation():
    (line,) = log_lines(lambda console: console.step(100, EVALUATION), log_every=7)
    assert line == "eval 100/300 | avg@8 0.258 pass@8 0.801 length 9.1 truncated 1% (394 prompts)"


def test_log_every_keeps_the_last_step_and_the_newest_rollout():
    reward = {"rollout/reward_mean_self": 0.5}
    lines = log_lines(
        *(
            lambda console, n=n: console.step(n, {"train/loss": float(n), **(reward if n == 3 else {})})
            for n in range(1, 6)
        ),
        train_iters=5,
        log_every=4,
    )
    assert [line.split(" | eta")[0] for line in lines] == [
        "step 4/5 | loss 4.0000 | reward self 0.50",
        "step 5/5 | loss 5.0000 | reward self 0.50",
    ]


def test_a_step_is_not_charged_with_the_save_of_an_earlier_one():
    saving = {"time/step_sec": 8.0, "time/save_sec": 8.0}
    lines = log_lines(lambda console: console.step(1, saving), lambda console: console.step(2, {"time/step_sec": 2.0}))
    assert lines[0] == "step 1/300 | step 8.00s (save 100%)"
    assert lines[1].split(" | ")[1] == "step 2.00s (other 100%)"


def test_eta_counts_from_the_first_step_of_the_process(monkeypatch):
    clock = iter([1000.0, 1000.0 + 2 * 30.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    lines = log_lines(lambda console: console.step(200, FIGURES), lambda console: console.step(202, FIGURES))
    assert "eta" not in lines[0]
    assert lines[1].endswith(" | eta 49:00")  # 98 steps of 30 seconds


def test_troubles_are_said_only_when_there_are_any():
    assert "trouble" not in phrases({**FIGURES, "rollout/failed_samples": 0.0})
    words = phrases({"rollout/failed_samples": 3.0, "rollout/reward_errors": 1.0})
    assert words == {"trouble": "failed samples 3 reward errors 1"}


def test_figures_that_are_not_finite_are_printed():
    assert phrases({"train/loss": float("nan"), "train/grad_norm": float("inf")}) == {
        "loss": "loss nan",
        "grad_norm": "gnorm inf",
    }


def test_stages_in_a_log(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def read(console):
        with console.stage("reading train.jsonl", unit="rows") as progress:
            for rows in (1000, 2000, 3000):
                now[0] += 6.0
                progress(rows)

    lines = log_lines(read)
    assert lines == [
        "reading train.jsonl ...",
        "reading train.jsonl: 2,000 rows ...",
        "reading train.jsonl: 3,000 rows in 0:18",
    ]


def test_what_a_run_waits_for_is_told_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def waits(console):
        for second in range(25):
            now[0] = second
            console.doing(f"{second} groups")
        console.step(1, FIGURES)
        now[0] = 30
        console.doing("0 groups")  # of the next rollout: has only begun

    lines = log_lines(waits)
    assert lines[:2] == ["10 groups ...", "20 groups ..."] and len(lines) == 3


def test_a_collection_in_words():
    news = CollectNews(num_draws=64, num_groups=12, num_dropped=1, num_in_flight=40)
    assert collecting(CollectNews(8, 2, 0, 6), {}, {}) == "2/8 groups, 6 in flight"
    engine = {
        "workers_healthy": 2.0, "workers_dead": 1.0, "workers_stale": 0.0, "queued": 9.0, "weight_version": 7.0,
        "sync_sec": 0.42, "failures/timed_out": 3.0,
    }  # fmt: skip
    assert collecting(news, engine, {"10.0.0.7:30000": 4123.0}) == (
        "12/64 groups, 40 in flight, 1 dropped | 10.0.0.7:30000 4.1k tok/s | 2 healthy, 1 dead, 9 queued | "
        "weights 7 (0.4s) | failed: timed_out 3"
    )


def test_a_failed_stage_is_not_reported_as_done(monkeypatch):
    def fail(console):
        with pytest.raises(KeyError), console.stage("loading"):
            raise KeyError

    assert log_lines(fail) == ["loading ..."]
    assert "loading in" not in live_text(monkeypatch, 80, fail)


def test_inert_text_has_no_control_characters():
    assert inert(HOSTILE) == "[2J]0;owned[bold red]x[/] [/nothing]  a\\nb c31m :smile:"
    assert all(
        inert(chr(code)) in ("", " ", chr(code), "\\n") and inert(chr(code)).isprintable() for code in range(0x3000)
    )


def test_model_text_is_inert_in_a_log():
    (line,) = log_lines(lambda console: console.show_samples(5, [SampleRow("1,2,3=6:", HOSTILE, 1.0)]))
    assert line == f"sample 5 | reward 1.00 | 1,2,3=6: | {inert(HOSTILE)}"


def test_model_text_is_inert_on_a_terminal(monkeypatch):
    text = live_text(
        monkeypatch,
        200,
        lambda console: console.show_samples(5, [SampleRow("prompt", HOSTILE, 0.5)]),
        lambda console: console.info("[red]info" + HOSTILE),
        lambda console: console.warning("[/]" + HOSTILE),
    )
    for dangerous in ("\x1b[2J", "\x1b]0;owned", "\x07", "\x9b", "\u202e", "\ud800"):
        assert dangerous not in text
    shown = without_styles(text)
    assert shown.count("[bold red]x[/] [/nothing]") == 3
    assert shown.count(":smile:") == 3
    assert "[red]info" in shown
    assert "warning: [/]" in shown


def test_live_view_shows_the_newest_figures(monkeypatch):
    text = live_text(
        monkeypatch,
        120,
        lambda console: console.step(0, EVALUATION),
        lambda console: console.step(299, FIGURES),
        lambda console: console.step(300, {**FIGURES, "train/loss": 0.5}),
    )
    last = without_styles(text).rsplit("step 300/300", 1)[1]
    assert "0.5000 nll 1.234" in last
    assert "self 0.31 expert 1.00" in last
    assert "avg@8 0.258 pass@8 0.801" in last


def test_live_view_drops_a_stage_that_is_over(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    console = LiveConsole(stream, train_iters=300)
    with console.stage("reading", total=9, unit="rows") as progress:
        progress(9)
    views = without_styles(stream.getvalue()).split("step 0/300")
    console.close()
    assert any("now  reading" in view for view in views)
    assert any("reading: 9/9 rows in 0:00" in view for view in views)
    assert "now" not in views[-1]


@pytest.mark.parametrize("columns", [1, 8, 20, 79])
def test_live_view_fits_on_a_narrow_terminal(monkeypatch, columns):
    text = live_text(
        monkeypatch,
        columns,
        lambda console: console.step(0, EVALUATION),
        lambda console: console.step(300, FIGURES),
        lambda console: console.show_samples(300, [SampleRow("p" * 500, "r" * 500, 1.0)]),
    )
    assert max(map(len, without_styles(text).replace("\r", "\n").splitlines())) <= columns


@pytest.mark.parametrize("kind", [LogConsole, LiveConsole])
def test_a_terminal_that_went_away_does_not_end_the_training(monkeypatch, kind):
    monkeypatch.setenv("TERM", "xterm")
    console = kind(ClosedTerminal(), train_iters=3)
    console.info("a")
    with console.stage("loading", total=2, unit="files") as progress:
        progress(1)
    for step in range(4):
        console.step(step, FIGURES)
    console.show_samples(3, [SampleRow("p", "r", 0.0)])
    console.close()
    console.close()


def test_a_log_that_knows_only_ascii_gets_escapes():
    raw = io.BytesIO()
    console = LogConsole(io.TextIOWrapper(raw, encoding="ascii"), train_iters=3)
    console.info("x = \u00bd \u5b57")
    assert raw.getvalue() == b"x = \\xbd \\u5b57\n"


def test_which_console(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert type(build_console(train_iters=1)) is LogConsole
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert type(build_console(train_iters=1, quiet=True)) is Console
    live = build_console(train_iters=1)
    live.close()
    assert type(live) is LiveConsole
    monkeypatch.setenv("TERM", "dumb")
    assert type(build_console(train_iters=1)) is LogConsole


def test_the_live_view_starts_no_thread_and_gives_the_terminal_back(monkeypatch):
    threads = threading.active_count()
    stdout = sys.stdout
    seen = []
    text = live_text(
        monkeypatch, 80, lambda console: seen.append(threading.active_count()), lambda console: console.step(1, FIGURES)
    )
    assert seen == [threads]
    assert sys.stdout is stdout
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden, cursor shown


def test_on_a_real_terminal(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from gft_megatron.observe.console import build_console\n"
        "console = build_console(train_iters=2)\n"
        "print(type(console).__name__)\n"
        "console.step(2, {'train/loss': 0.25})\n"
        "console.close()\n"
    )
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, str(program)], stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    try:
        while block := os.read(parent, 4096):
            shown += block
    except OSError:  # Linux says EIO when the other end is closed
        pass
    assert process.wait() == 0
    text = without_styles(shown.decode())
    assert "LiveConsole" in text
    assert "step 2/2" in text
    assert "0.2500" in text


@pytest.mark.parametrize(
    "function, number, text",
    [
        (count, 0, "0"),
        (count, 999, "999"),
        (count, 5231, "5.2k"),
        (count, 1.25e6, "1.2M"),
        (count, 3e9, "3.0G"),
        (duration, 0.4, "0:00"),
        (duration, 59.6, "1:00"),
        (duration, 3725, "1:02:05"),
    ],
)
def test_numbers_in_words(function, number, text):
    assert function(number) == text


def test_shorten_keeps_both_ends():
    assert shorten("x" * 20, 20) == "x" * 20
    short = shorten("begin" + "x" * 90 + "answer", 30)
    assert len(short) == 30
    assert short.startswith("begin") and short.endswith("answer")
