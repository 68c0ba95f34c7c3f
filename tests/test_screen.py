"""Screen and log of a process that prints in every way and ends in every way."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prune import screen

ROOT = Path(__file__).parents[1]
# A verb with two lines for the screen; all other output goes to the log.
CHATTY = """
import ctypes, logging, os, subprocess, sys, warnings
from megatron_prune import screen
from megatron_prune.errors import UsageError
with screen.quiet("chatty", sys.argv[1:]) as words:
    screen.divert()
    screen.say("said first")
    print("from print")
    warnings.warn("from warnings")
    logging.getLogger("any").error("from logging")
    os.write(1, b"from a descriptor\\n")
    libc = ctypes.CDLL(None)
    libc.puts(b"from C")
    libc.fflush(None)
    subprocess.run([sys.executable, "-c", "print('from a child')"])
    screen.say("said " + " ".join(words))
    print("from print again")
    {ending}
screen.say("and after it")
"""
SAID = ["said first", "said words"]
CHATTER = ["print", "warnings", "logging", "a descriptor", "C", "a child", "print again"]


def run(ending: str, tmp_path: Path, *words: str, **environment: str) -> tuple[int, list[str], list[str]]:
    """Exit code, the lines of standard output and those of standard error of ``CHATTY``."""
    own = {"PYTHONPATH": str(ROOT), screen.VERBOSE_VARIABLE: "0", screen.LOGS_VARIABLE: str(tmp_path / "logs")}
    done = subprocess.run(
        [sys.executable, "-c", CHATTY.format(ending=ending), "words", *words],
        capture_output=True, text=True, env=os.environ | own | environment,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def log_of(lines: list[str], tmp_path: Path) -> Path:
    """The log that the first line names, which has all of the chatter."""
    named = re.fullmatch(rf"log: ({tmp_path}/logs/chatty-\d+-\d+-\d+-rank0\.log) .*", lines[0])
    assert named, lines
    written = Path(named[1]).read_text()
    for origin in CHATTER:
        assert f"from {origin}\n" in written, (origin, written)
    assert "said" not in written
    return Path(named[1])


def test_what_is_said_is_on_the_screen_and_the_rest_in_a_log(tmp_path: Path) -> None:
    code, out, errors = run("pass", tmp_path)
    assert (code, out[1:], errors) == (0, [*SAID, "and after it"], [])
    log_of(out, tmp_path)


@pytest.mark.parametrize(("words", "variable"), [(("--verbose",), "0"), ((), "1")])
def test_verbose_leaves_everything_on_the_screen(tmp_path: Path, words: tuple[str, ...], variable: str) -> None:
    code, out, errors = run("pass", tmp_path, *words, **{screen.VERBOSE_VARIABLE: variable})
    assert code == 0 and [line for line in out if line.startswith("said")] == SAID
    for origin in CHATTER:
        assert any(f"from {origin}" in line for line in (*out, *errors)), origin
    assert not (tmp_path / "logs").exists()


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    """Their logs have their output, in files with the number of the process that started them."""
    code, out, errors = run("pass", tmp_path, RANK="3", LOCAL_RANK="3")
    assert (code, out, errors) == (0, [], [])
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name.endswith(f"-{os.getpid()}-rank3.log") and "from C\n" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_killed_has_said_and_logged_everything(tmp_path: Path, number: signal.Signals) -> None:
    code, out, errors = run(f"os.kill(os.getpid(), {int(number)})", tmp_path)
    assert (code, out[1:], errors) == (-number, SAID, [])
    log_of(out, tmp_path)


def test_a_bug_keeps_its_traceback_and_names_the_log(tmp_path: Path) -> None:
    code, out, errors = run("1 / 0", tmp_path)
    log = log_of(out, tmp_path)
    assert code == 1 and errors[0] == f"rank 0 failed; the rest of its output is in {log}"
    assert errors[1].startswith("Traceback") and errors[-1].startswith("ZeroDivisionError")
    code, out, errors = run("1 / 0", tmp_path, RANK="1")
    assert out == [] and re.match("rank 1 failed; .*-rank1.log$", errors[0]) and errors[-1].startswith("ZeroDivision")


def test_an_error_of_ours_is_for_the_caller_to_print(tmp_path: Path) -> None:
    """It follows the earlier output on the screen directly."""
    ending = "raise UsageError('--ratio', expected='less', got=2)"
    code, out, errors = run(ending, tmp_path)
    assert code == 1 and out[1:] == SAID and errors[0].startswith("Traceback") and "--ratio" in errors[-1]


def test_a_library_that_exits_is_heard(tmp_path: Path) -> None:
    code, out, errors = run("print('its last words'); sys.exit(3)", tmp_path)
    assert code == 3 and out[1:] == SAID and errors == [f"the end of {log_of(out, tmp_path)}:", "its last words"]
    code, out, errors = run("sys.exit(0)", tmp_path)
    assert (code, out[1:], errors) == (0, SAID, [])


def test_without_room_for_a_log_the_screen_has_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    code, out, _ = run("pass", tmp_path)
    assert code == 0 and "from C" in out and out[0] == "said first"


def test_in_a_slurm_job_logs_are_where_it_was_submitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(screen.LOGS_VARIABLE, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert screen._folder() == tmp_path / "megatron-prune-logs"


def test_logs_do_not_follow_a_link_that_another_user_could_have_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the folder for temporary files anybody can make a link to a folder of this user."""
    for name in (screen.LOGS_VARIABLE, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "precious").mkdir()
    (tmp_path / f"megatron-prune-{os.getuid()}").symlink_to("precious")
    monkeypatch.setattr(screen.tempfile, "tempdir", str(tmp_path))
    found = screen._folder()
    assert found.resolve() == found and found.parent == tmp_path and found.name != "precious"


# -- progress ---------------------------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_without_a_terminal_there_is_now_and_then_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    for _ in screen.progress(range(100), 100, "reading", "window"):
        clock.now += 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reading: window 10 of 100, 0.25/s, about 6:00 left"
    tens = [int(re.findall(r"window (\d+)", line)[0]) // 10 for line in lines]
    assert tens == list(range(1, 10))
    for _ in screen.progress(range(100), 100, "reading", "window"):
        clock.now += 0.04  # four seconds in all: too short for a bar
    assert capsys.readouterr().out == ""


def test_bytes_unknown_totals_and_long_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with screen.Bar(4_000_000_000, "writing", "B") as bar:
        clock.now += 10
        bar.reach(1_000_000_000)
    with screen.Bar(None, "tokenizing", "B") as bar:
        clock.now += 10
        bar.advance(500_000_000)
        clock.now += 4
        bar.advance(500_000_000)
    with screen.Bar(1000, "scoring", "sequence") as bar:
        for _ in range(4):
            clock.now += 299
            bar.advance()
    assert capsys.readouterr().out.splitlines() == [
        "writing: 1.00 of 4.00 GB, 100 MB/s, about 0:30 left",
        "tokenizing: 0.50 GB, 50 MB/s",
        "scoring: sequence 2 of 1,000, 0.00334/s, about 82:53:22 left",
        "scoring: sequence 4 of 1,000, 0.00334/s, about 82:43:24 left",
    ]


def test_a_note_has_a_line_at_once_and_other_ranks_have_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with screen.Bar(2, "wanda", "block") as bar:
        bar.advance(note="layer 0: done")
    assert capsys.readouterr().out == "wanda: block 1 of 2, layer 0: done\n"
    monkeypatch.setenv("RANK", "1")
    with screen.Bar(2, "wanda", "block") as bar:
        bar.advance(note="layer 0: done")
    assert capsys.readouterr().out == ""


def test_on_a_terminal_there_is_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with screen.Bar(4, "reading", "window") as bar:
        for number in range(4):
            bar.advance(note=f"number {number}")
        screen.say("in between")
    drawn = terminal.getvalue()
    assert re.search(r"reading:  25%\|.*\| 1/4 \[00:00<00:00, .* window/s, number 0\]", drawn), drawn
    assert "\nin between\n" in drawn.replace("\r", "\n")
