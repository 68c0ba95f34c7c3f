"""Every command line of the studies in examples/, as text for review: golden/*.txt.

    python -m tests.study.golden        writes them again, after an intended change

Nothing runs, and there is no corpus: shapes of parents that a study would read are given here. Flags that all commands
of one verb share appear once, at the top, so that a flag that is wrong in both arms is one line of a diff.
"""

from __future__ import annotations

import contextlib
import shlex
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.study import jobs, outlook, schema
from megatron_prune.study.commands import Command
from megatron_prune.study.grid import Grid
from megatron_prune.study.prunings import Places
from megatron_prune.study.schema import StudyConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = Path(__file__).parent / "golden"
SMOLLM2 = ModelShape(30, 576, 9, 3, 64, 1536, 49152, tied=True)
# Of a parent whose shape study.yaml does not say: its shape.
STUDIES: dict[str, ModelShape | None] = {
    "quickstart/study": None,
    "quickstart/seeds": None,
    "quickstart/distill": None,
    "quickstart/all-methods": None,
    "quickstart/iterated": None,
    "miniature/study": None,
    "miniature/rate": None,
    "miniature/small": None,
    "miniature/small-rate": None,
    "smollm2_135m/study": SMOLLM2,
    "llama3.1_8b/token_scaling": None,
    "llama3.1_8b/ratios": None,
    "llama3.1_8b/ratios_three_seeds": None,
    "llama3.1_8b/sparse": None,
    "llama3.1_8b/imported": None,
}
ONE_SEED = ("miniature/study", "miniature/small")  # large, and their seeds differ in the seed alone
Flag = tuple[str, ...]  # its name and its values


def file(name: str) -> Path:
    return FILES / f"{name.replace('/', '-')}.txt"


def text(name: str) -> str:
    """The golden text of ``examples/<name>.yaml``."""
    return "\n".join(_lines(name, load(name), commands(name)))


def load(name: str) -> StudyConfig:
    """A study of the examples; of one in ``ONE_SEED``, its first."""
    study = schema.load(EXAMPLES / f"{name}.yaml")
    return replace(study, seeds=study.seeds[:1]) if name in ONE_SEED else study


def commands(name: str) -> dict[str, list[Command]]:
    """Every cell of a study with its commands, as if no pruning had cost anything."""
    study, places = load(name), Places(Path("RUN"))
    return jobs.all_commands(jobs.all_cells(study, places, _look(name, study)))


def grid(name: str) -> Grid:
    """Every cell of a study and its comparisons, likewise."""
    study = load(name)
    return _look(name, study).estimated_grid(study)


def _look(name: str, study: StudyConfig) -> outlook.Outlook:
    known = STUDIES[name]
    with mock.patch.object(outlook, "_shape_to_come", lambda _: (known, "")) if known else contextlib.nullcontext():
        found = outlook.look(study, Places(Path("RUN")), planned=True)
    return replace(found, spent=dict.fromkeys(found.targets, 0))


def _lines(name: str, study: StudyConfig, commands: Mapping[str, Sequence[Command]]) -> Iterator[str]:
    corpora = " ".join(study.data.blend)
    yield f"examples/{name}.yaml, every command. RUN is runs/{study.name}, CELL a cell's own folder in it, TRAIN:"
    yield from textwrap.wrap(corpora, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    flags = {(cell, c.stage): split(cell, c.argv, study.data.blend) for cell, many in commands.items() for c in many}
    shared: dict[str, list[Flag]] = {}
    of_stage: dict[str, list[Command]] = defaultdict(list)
    for (_, stage), own in flags.items():
        shared[stage] = [flag for flag in shared.get(stage, own) if flag in own]
    for many in commands.values():
        for command in many:
            of_stage[command.stage].append(command)
    for stage, many in of_stage.items():
        [begin] = {tuple(c.words[: len(c.words) - len(c.argv) + verb_words(c.argv)]) for c in many}
        yield f"\n{stage} x {len(many)}: {shlex.join(begin)}"
        yield from ("  " + shlex.join(flag) for flag in shared[stage])
    for cell, many in commands.items():
        yield f"\n{cell}"
        for command in many:
            own = [flag for flag in flags[cell, command.stage] if flag not in shared[command.stage]]
            line = " ".join([f"{command.stage}:", *map(shlex.join, own)])
            yield from textwrap.wrap(
                line, 118, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
            )
    yield ""


def split(cell: str, argv: Sequence[str], blend: Sequence[str]) -> list[Flag]:
    """The words after a verb as flags with their values; the training corpora as one word, a cell's paths shorter."""
    found: list[list[str]] = []
    own = f"RUN/cells/{cell}/"
    for word in argv[verb_words(argv) :]:
        if word.startswith("--"):
            found.append([])
        found[-1].append(f"CELL/{word.removeprefix(own)}" if word.startswith(own) else word)
    return [tuple(flag if flag[1:] != list(blend) else [flag[0], "TRAIN"]) for flag in found]


def verb_words(argv: Sequence[str]) -> int:
    """How many words the verb has: two for ``convert import``."""
    return next((place for place, word in enumerate(argv) if word.startswith("--")), len(argv))


def main() -> None:
    for name in STUDIES:
        file(name).write_text(text(name))


if __name__ == "__main__":
    main()
