"""``time`` and lines of every ``--help``.

    python -m tests.cli.helps        measures, and writes the table in docs/pages/benchmarks.md again

Tests check the lines (``test_help.py``); the seconds depend on the machine and are only shown.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_prune.__main__ import NAMES
from megatron_prune.cli.checkpoint_commands import CONVERT_PARTS
from megatron_prune.cli.study_commands import STUDY_PARTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "pages" / "benchmarks.md"
BEGIN, END = "<!-- help: begin -->", "<!-- help: end -->"
PARTS = {"convert": CONVERT_PARTS, "study": STUDY_PARTS}
REPEATS = 5

# As a user runs it, and then what was imported on the way: the last line of stderr.
PROBE = """
import atexit, sys
atexit.register(lambda: print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr))
from megatron_prune.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def commands() -> list[tuple[str, ...]]:
    """The words of every command with a help: none, a verb, or a verb and its part."""
    found: list[tuple[str, ...]] = [()]
    for verb in NAMES:
        found += [(verb,), *((verb, part) for part in PARTS.get(verb, {}))]
    return found


def ask(words: tuple[str, ...]) -> tuple[str, set[str]]:
    """The help of a command, and the packages that were imported to print it."""
    command = [sys.executable, "-c", PROBE, *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"})
    return done.stdout, set(done.stderr.split())


def measure(words: tuple[str, ...]) -> tuple[float, int]:
    """Seconds (the best of several) and lines of a command's help."""
    command, seconds, text = [sys.executable, "-m", "megatron_prune", *words, "--help"], [], ""
    for _ in range(REPEATS):
        begun = time.perf_counter()
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - begun)
    return min(seconds), len(text.splitlines())


def table() -> str:
    rows = ["| command | seconds | lines |", "| --- | --- | --- |"]
    for words in commands():
        seconds, lines = measure(words)
        rows.append(f"| `{' '.join(['megatron-prune', *words, '--help'])}` | {seconds:.2f} | {lines} |")
    return "\n".join(rows)


def main() -> None:
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(f"{before}\n{table()}\n{after}")


if __name__ == "__main__":
    main()
