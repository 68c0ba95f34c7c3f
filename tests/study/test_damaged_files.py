"""Every file of a finished study, damaged in every key: `study status` and `study report` end in a refusal, or find
that the cell is not finished. They never end in a traceback."""

from __future__ import annotations

import copy
import json
import random
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import MegatronPruneError
from megatron_prune.study.analysis import results
from megatron_prune.study.prunings import Places
from megatron_prune.study.run import status

SAMPLE = 20  # in the default tier: a quarter of a second each
WRONG: tuple[Any, ...] = (None, 7, -1, 1.5, 10**30, True, "", "x", [], [7], {}, {"x": 7}, [[]], "DELETE")
TEXTS = (
    b"",
    b"7",
    b"[]",
    b"{}",
    b'"x"',
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a": 1e999}',
    b'{"a": NaN}',
    b"\0" * 9,
)


def damages(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place in a JSON value, with every wrong value for it."""
    for value in WRONG:
        yield place, value
    inside = (
        list(content.items())
        if isinstance(content, dict)
        else list(enumerate(content[:1]))
        if isinstance(content, list)
        else []
    )
    for key, entry in inside:
        if len(place) < 4:
            yield from damages(entry, (*place, key))


def damaged(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    whole = copy.deepcopy(content)
    held = whole
    for key in place[:-1]:
        held = held[key]
    if value == "DELETE":
        del held[place[-1]]
    else:
        held[place[-1]] = value
    return whole


def cases(places: Places) -> Iterator[tuple[Path, str, bytes]]:
    """File, what is done to it, and its new content. Cells of one kind have the same files: one of each kind."""
    kinds: dict[str, Path] = {}
    for path in sorted(places.root.glob("cells/*/cell.json")):
        kinds.setdefault(json.loads(path.read_text())["about"]["kind"], path.parent)
    files = [places.ledger, places.root / "study.json"]
    files += [path for cell in kinds.values() for path in (*cell.glob("*.json"), *cell.glob("checkpoint/*.json"))]
    for path in files:
        for number, text in enumerate(TEXTS):
            yield path, f"text {number}", text
        if path == places.ledger:
            first, rest = path.read_bytes().split(b"\n", 1)
            for place, value in damages(json.loads(first)):
                yield (
                    path,
                    f"{place} = {value!r}",
                    json.dumps(damaged(json.loads(first), place, value)).encode() + b"\n" + rest,
                )
        else:
            content = json.loads(path.read_text())
            for place, value in damages(content):
                yield path, f"{place} = {value!r}", json.dumps(damaged(content, place, value)).encode()
    for cell in kinds.values():
        for losses in cell.glob("checkpoint/losses.csv"):
            whole = losses.read_bytes()
            for number, text in enumerate(
                (*TEXTS, whole[:40], whole.replace(b",", b";"), whole + b"x,y,z,,\n", whole + b"\n")
            ):
                yield losses, f"text {number}", text


def look(places: Places, chosen: list[tuple[Path, str, bytes]]) -> list[str]:
    """What ended otherwise than it should."""
    wrong = []
    for path, what, content in chosen:
        whole = path.read_bytes()
        path.write_bytes(content)
        for verb in (lambda: status.table("made-up", places), lambda: results.collect(places)):
            try:
                verb()
            except MegatronPruneError as error:
                if len(str(error)) > 4000:
                    wrong.append(f"{path}: {what}: a message of {len(str(error))} characters")
            except Exception:
                wrong.append(f"{path}: {what}:\n{''.join(traceback.format_exc().splitlines(keepends=True)[-6:])}")
        path.write_bytes(whole)
    return wrong


def test_a_damaged_file_is_never_a_traceback(finished_copy: Places) -> None:
    every = list(cases(finished_copy))
    wrong = look(finished_copy, random.Random(0).sample(every, SAMPLE))
    assert not wrong, f"{len(wrong)} of {SAMPLE}:\n" + "\n".join(wrong)


@pytest.mark.slow
def test_no_damage_of_any_file_is_a_traceback(finished_copy: Places) -> None:
    every = list(cases(finished_copy))
    wrong = look(finished_copy, every)
    assert not wrong, f"{len(wrong)} of {len(every)}:\n" + "\n".join(wrong)
