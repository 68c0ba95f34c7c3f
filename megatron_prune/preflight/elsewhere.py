"""Command lines that name checkpoints which are not on this machine, or not made yet.

Their model's flags can be given in a file instead (``--model``): Megatron's flags, ``#`` begins a comment. The flags
that would read the checkpoint are left out of what is rehearsed, and reported as not checked.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_prune import storage
from megatron_prune.engine import stores
from megatron_prune.errors import UsageError

STARTS = ("--pretrained-checkpoint", "--shape-from")


@dataclass(frozen=True)
class CommandLine:
    """``argv`` can be rehearsed here; ``absent`` are the flags that were left out, with their directories."""

    argv: list[str]
    absent: dict[str, str]


def resolve(argv: list[str], model: str | None) -> CommandLine:
    """Leave out what is elsewhere, or in a store that does not answer here.

    UsageError where the model's arguments are there, and no ``model`` says them; UsageError or StorageError where the
    store of ``--load`` or ``--save`` cannot be asked."""
    stores.refuse_malformed(argv)
    for flag in ("--load", "--save"):  # a rehearsal asks for them
        if (value := _value(argv, flag)) is not None and storage.is_stored(value):
            storage.refuse_unusable(flag, value)
            storage.path(value).exists()
    load, pretrained, scratch = (_value(argv, flag) for flag in ("--load", *STARTS))
    starts = zip(STARTS, (pretrained, scratch), strict=True)
    absent = {flag: path for flag, path in starts if path is not None and _is_absent(path)}
    # Megatron's precedence: the run's own checkpoint once it has one, else what it starts from.
    source = load if load is not None and not _is_absent(load) else pretrained or load
    left_out = set(absent)
    if "--use-checkpoint-args" in argv and _is_absent(source):
        left_out.add("--use-checkpoint-args")
    if model is None and left_out & {"--use-checkpoint-args", "--shape-from"}:
        raise UsageError(
            "--model", given="nothing", allowed="a file with the model's flags",
            why=f"they are in {absent.get('--shape-from', source)}, which is not on this machine",
        )  # fmt: skip
    described = read_flags(model) if model is not None and left_out else []
    return CommandLine([*described, *_without(argv, left_out)], absent)


def _without(argv: list[str], flags: set[str]) -> list[str]:
    """``argv`` without these flags and the values of those that have one."""
    words = iter(argv)
    kept = []
    for word in words:
        flag, has_value, _ = word.partition("=")
        if flag not in flags:
            kept.append(word)
        elif flag in STARTS and not has_value:
            next(words, None)
    return kept


def read_flags(path: str | Path) -> list[str]:
    """The words of a file of flags."""
    if not Path(path).is_file():
        raise UsageError("--model", given=path, allowed="a file with the model's flags")
    return shlex.split(Path(path).read_text(), comments=True)


def _is_absent(path: str | None) -> bool:
    if path is None or (storage.is_stored(path) and not storage.is_reachable(path)):
        return path is not None
    return not storage.path(path).exists()


def _value(argv: list[str], flag: str) -> str | None:
    """The last value of ``flag``, as argparse would have it."""
    found = None
    for place, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            found = word.partition("=")[2]
        elif word == flag and place + 1 < len(argv):
            found = argv[place + 1]
    return found
