"""Every bad input to every verb that reads it: refused in one line, within two seconds and 300 MB, and nothing runs.

``python -m pytest tests/fuzz/test_front_door.py -s`` prints the table. The default tier gives every third input to one
of its verbs, in turn; the tier ``slow`` gives every input to all of them.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_prune import screen
from megatron_prune.__main__ import main
from megatron_prune.errors import EXIT_REFUSED
from tests.fuzz import good
from tests.fuzz.bad import INPUTS, VERBS, Input
from tests.fuzz.limits import CPU_SECONDS, MEMORY_BYTES, Ended, run

PLACES = ("ckpt", "masked", "legacy", "hf", "corpus", "other", "tokenizer", "ledger")
FILES = {"plan": "plan.json", "statistics": "statistics.safetensors", "learned": "learned.safetensors",
         "study": "study.yaml", "text": "text.jsonl"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A bad input, a verb, and the answer; ``wrong`` is empty if the answer is a refusal as it should be."""

    input: str
    of: str
    verb: str
    ended: Ended
    executed: bool
    left: tuple[str, ...]

    @property
    def wrong(self) -> str:
        # Two lines say what was read and where the log is.
        lines = [one for one in self.ended.output.strip().splitlines() if not one.startswith(("log: ", "read "))]
        if self.executed:
            return "it executed code"
        if "Traceback" in self.ended.output:
            return "a traceback"
        if self.ended.code == 0:
            return "it was accepted"
        if self.ended.code != EXIT_REFUSED:
            return f"it ended with {self.ended.code}"
        if len(lines) != 1 or len(lines[0]) > 1500:
            return f"{len(lines)} lines"
        if self.ended.seconds > CPU_SECONDS:
            return f"{self.ended.seconds:.1f} s of a core"
        if self.ended.memory > MEMORY_BYTES:
            return f"{self.ended.memory >> 20} MB"
        return f"it left {self.left}" if self.left else ""


def meet(whole: str, numbers: Sequence[tuple[int, str]]) -> list[Row]:
    """Give the inputs of these numbers to these verbs, each in a fork of this process, in a copy of ``whole``."""
    return [_meet(Path(whole), INPUTS[number], verb) for number, verb in numbers]


def _meet(whole: Path, given: Input, verb: str) -> Row:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(whole, folder)
        (folder / "out").mkdir()
        given.attack(folder)
        names = {name: str(folder / name) for name in (*PLACES, "out")}
        names |= {name: str(folder / file) for name, file in (FILES | dict(given.places)).items()}
        words = VERBS[given.of][verb].format(**names).split()

        def command() -> int:
            os.chdir(folder)
            os.environ |= {screen.VERBOSE_VARIABLE: "0", screen.LOGS_VARIABLE: str(folder / "logs")}
            screen.SECONDS_BETWEEN_LINES = math.inf  # on a busy machine progress would be a line
            return main(words)

        ended = run(command)
        left = tuple(sorted(path.name for path in (folder / "out").iterdir()))
        output = ended.output.replace(str(folder), "…")
        shown = Ended(ended.code, output, ended.seconds, ended.memory)
        return Row(given.name, given.of, verb, shown, (folder / "executed").exists(), left)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return good.make(tmp_path_factory.mktemp("whole"), tiny_tokenizer)


def _check(rows: list[Row]) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row.of]["refused" if not row.wrong else "wrong"] += 1
    print(f"\n\n{len({(row.of, row.input) for row in rows})} bad inputs, {len({row.verb for row in rows})} verbs, "
          f"{len(rows)} meetings, {sum(row.ended.seconds for row in rows):.0f} s of a core\n")  # fmt: skip
    print("| what is bad | meetings | refused in one line | slowest | most memory |\n| --- | --- | --- | --- | --- |")
    for of, found in counts.items():
        own = [row.ended for row in rows if row.of == of]
        print(f"| {of} | {len(own)} | {found['refused']} | {max(one.seconds for one in own):.2f} s | "
              f"{max(one.memory for one in own) >> 20} MB |")  # fmt: skip
    wrong = [row for row in rows if row.wrong]
    shown = "\n\n".join(f"{row.of}: {row.input} → {row.verb}: {row.wrong}\n{row.ended.output[-1500:]}" for row in wrong)
    assert not wrong, f"{len(wrong)} of {len(rows)} answers are wrong:\n{shown}"


def test_good_inputs_are_accepted(distributed: Callable[..., Any], whole: Path) -> None:
    """Otherwise a refusal proves nothing. Verbs that run a model, or judge one, are left to their own tests."""
    (rows,) = distributed(_meet_good, 1, str(whole))
    assert {row.verb for row in rows if row.ended.code} == set(), [row for row in rows if row.ended.code]


def _meet_good(whole: str) -> list[Row]:
    lines = {(of, verb) for of, verbs in VERBS.items() for verb in verbs if verb not in _OF_OWN_TESTS}
    nothing = {of: Input(of, "nothing", lambda folder: None) for of, _ in lines}
    return [_meet(Path(whole), nothing[of], verb) for of, verb in sorted(lines)]


_MODEL_VERBS = {"evaluate", "calibrate", "prune", "pretrain", "sparsify", "teach", "learn-masks"}
_OF_OWN_TESTS = _MODEL_VERBS | {"study run", "preflight"}


def test_every_third_bad_input_is_refused(distributed: Callable[..., Any], whole: Path) -> None:
    numbers = []
    for number, given in enumerate(INPUTS):
        if given.name == "a file in place of the folder":  # every verb has code of its own for its output
            numbers += [(number, verb) for verb in VERBS["output"]]
            continue
        verbs = [verb for verb in VERBS[given.of] if verb not in _MODEL_VERBS] or list(VERBS[given.of])
        numbers.append((number, verbs[number % len(verbs)]))
    assert len(numbers) >= 300
    whole_kinds = ("output", "carried")  # an output is every verb's own
    chosen = [one for place, one in enumerate(numbers) if place % 3 == 0 or INPUTS[one[0]].of in whole_kinds]
    assert {INPUTS[number].of for number, _ in chosen} == {given.of for given in INPUTS}
    (rows,) = distributed(meet, 1, str(whole), chosen)
    _check(rows)


@pytest.mark.slow
def test_every_verb_refuses_every_bad_input(distributed: Callable[..., Any], whole: Path) -> None:
    numbers = [(number, verb) for number, given in enumerate(INPUTS) for verb in VERBS[given.of]]
    (rows,) = distributed(meet, 1, str(whole), numbers)
    _check(rows)
