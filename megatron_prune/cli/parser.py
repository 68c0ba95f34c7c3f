"""The parser of a verb: help that fits a screen, and refusals in one line.

A verb that runs Megatron's model takes two kinds of flags: its own, and Megatron's. Its own are read here, before
Megatron is imported. What is left over goes to Megatron's parser. Flags of Megatron that a user of the verb needs are
``mentioned`` in the help, and only there.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from megatron_prune.errors import CommandLineError

PROGRAM = "megatron-prune"
WIDTH = 100
_COLUMN = 32  # where the texts of flags begin


class Parser(argparse.ArgumentParser):
    """``Parser("apply", "Cuts a checkpoint as a plan says.", usage="--load CKPT …", example="…")``

    ``megatron``: the verb takes Megatron's flags as well, and ``--help-megatron`` lists them.
    """

    def __init__(self, verb: str, about: str, *, usage: str, example: str, megatron: bool = False):
        super().__init__(prog=f"{PROGRAM} {verb}", description=about, add_help=False, allow_abbrev=False)
        self.verb, self.about, self.example, self.megatron = verb, about, example, megatron
        self.usage = f"{self.prog} {usage}"
        self._mentions: dict[int, list[argparse.Action]] = {}

    def group(self, title: str) -> argparse._ArgumentGroup:
        """A titled group of flags, in the order in which they are added."""
        return self.add_argument_group(title)

    def mention(self, group: argparse._ArgumentGroup, flag: str, metavar: str | None, text: str) -> None:
        """Show a flag of Megatron in ``group``'s help; Megatron's parser is the one that reads it."""
        made = argparse._StoreAction([flag], "_", metavar=metavar, help=text, nargs=None if metavar else 0)
        self._mentions.setdefault(id(group), []).append(made)

    def read(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The verb's own arguments, and the words that are left for Megatron. Prints help and exits where asked to."""
        if asked_for_help(argv):
            print(self.format_help())
            sys.exit(0)
        options, rest = self.parse_known_args(list(argv))
        if not self.megatron:
            self.refuse_unknown(rest)
        return options, rest

    def refuse_unknown(self, words: Iterable[str], known: Iterable[str] = ()) -> None:
        """Refuse the first of ``words`` that is a flag neither of this parser nor in ``known``; name the nearest."""
        flags = {*self._option_string_actions, *known}
        for word in words:
            flag = word.split("=", 1)[0]
            if flag in flags or (self.megatron and not word.startswith("--")):
                continue
            nearest = difflib.get_close_matches(flag, flags, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            what = "is not a flag" if word.startswith("-") else "is one word too many"
            raise CommandLineError(f"{word} {what} of {self.verb}{hint} `{self.prog} --help` lists the flags")

    def error(self, message: str) -> NoReturn:
        """argparse's own refusals, in one line, as every other."""
        raise CommandLineError(f"{message}; `{self.prog} --help` lists the flags")

    def format_help(self) -> str:
        """The usage, what the verb does, the flags in groups, an example."""
        made = argparse.HelpFormatter(self.prog, max_help_position=_COLUMN, width=WIDTH)
        made.add_usage(self.usage, [], [])
        made.add_text(self.about)
        for group in self._action_groups:
            actions = [*group._group_actions, *self._mentions.get(id(group), [])]
            if actions:
                made.start_section(group.title)
                made.add_arguments(actions)
                made.end_section()
        text = made.format_help().rstrip()
        text += "\n\nexample:\n" + "\n".join(f"  {line}" for line in self.example.strip().splitlines())
        if self.megatron:
            text += f"\n\nMegatron's other flags are taken too: `{self.prog} --help-megatron` lists them."
        return text


def asked_for_help(argv: Sequence[str]) -> bool:
    """True where a help flag stands among the words before ``--``."""
    words = list(argv)
    words = words[: words.index("--")] if "--" in words else words
    return "-h" in words or "--help" in words
