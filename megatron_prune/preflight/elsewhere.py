"""Command lines that name checkpoints which are not on this machine, or not made yet.

Their model's flags can be given in a file instead (``--model``): Megatron's flags, ``#`` begins a comment. The flags
that would read the checkpoint are left out of what is rehearsed, and reported as not checked.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.errors import UsageError

STARTS = ("--pretrained-checkpoint", "--shape-from")


@dataclass(frozen=True)
class CommandLine:
    """``argv`` can be rehearsed here; ``absent`` are the flags that were left out, with their directories."""

    argv: list[str]
    absent: dict[str, str]


def resolve(argv: list[str], model: str | None) -> CommandLine:
    """Leave out what is elsewhere. UsageError where the model's arguments are there, and no ``model`` says them."""
    named = {flag: value for flag in (*STARTS, "--load") if (value := _value(argv, flag)) is not None}
    absent = {flag: path for flag, path in named.items() if flag in STARTS and not Path(path).exists()}
    source = named.get("--load") if _exists(named.get("--load")) else named.get("--pretrained-checkpoint")
    source = source or named.get("--load")
    asks = "--use-checkpoint-args" in argv and source is not None and not Path(source).exists()
    if (asks or "--shape-from" in absent) and model is None:
        raise UsageError(
            "--model", given="nothing", allowed="a file with the model's flags",
            why=f"they are in {absent.get('--shape-from', source)}, which is not on this machine",
        )  # fmt: skip
    words = []
    skip = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        if skip or flag in absent or (asks and flag == "--use-checkpoint-args"):
            skip = not skip and flag in absent and not equals
            continue
        words.append(word)
    return CommandLine([*(read_flags(model) if asks or absent else []), *words], absent)


def read_flags(path: str | Path | None) -> list[str]:
    """The words of a file of flags."""
    if path is None:
        return []
    if not Path(path).is_file():
        raise UsageError("--model", given=path, allowed="a file with the model's flags")
    return shlex.split(Path(path).read_text(), comments=True)


def _exists(path: str | None) -> bool:
    return path is not None and Path(path).exists()


def _value(argv: list[str], flag: str) -> str | None:
    """The last value of ``flag``, as argparse would have it."""
    found = None
    for place, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            found = word.partition("=")[2]
        elif word == flag and place + 1 < len(argv):
            found = argv[place + 1]
    return found
