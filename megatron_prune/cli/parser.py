"""The parser of a verb: help that fits a screen, and refusals in one line.

A verb that runs Megatron's model takes two kinds of flags: its own, which are the fields of its settings (``verbs/``),
and Megatron's. Its own are read here, before Megatron is imported; the remaining words go to Megatron's parser. The
Megatron flags that users of a verb need are ``mentioned``, which only affects the help.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from megatron_prune import verbs
from megatron_prune.errors import CommandLineError
from megatron_prune.settings import Settings, add_flags, nearest

PROGRAM = "megatron-prune"
WIDTH = 120
HELP_MEGATRON = "--help-megatron"
_COLUMN = 36  # where the texts of flags begin
_HELP = ("-h", "--help")


class Parser(argparse.ArgumentParser):
    """``Parser("apply", "Cuts a checkpoint as a plan says.", verbs.Apply, example="--load …")``

    ``example`` is a working command line without the program and the verb; with ``several`` it runs under torchrun.
    ``mentioned`` lists (title, flag, metavar, text) of Megatron flags; a verb that has any takes all of Megatron's
    flags. ``methods`` explains ``--method``. ``after`` ends the usage line, for words that are not flags.
    """

    def __init__(
        self,
        verb: str,
        about: str,
        *settings: type[Settings],
        example: str,
        mentioned: Sequence[tuple[str, str, str | None, str]] = (),
        methods: str = "",
        after: str = "",
    ):
        super().__init__(prog=f"{PROGRAM} {verb}", description=about, add_help=False, allow_abbrev=False)
        self.verb, self.about, self.example, self.megatron = verb, about, example, bool(mentioned)
        self.settings = settings
        add_flags(self, *settings)
        if methods:
            self._option_string_actions["--method"].help = methods
        flags = {flag.name: flag for one in settings for flag in one.flags()}.values()
        required = [flag.shown for flag in sorted(flags, key=lambda flag: flag.positional) if flag.required]
        more = [" [FLAGS]"] if len(required) < len(flags) else []
        self.usage = f"{self.prog}{''.join(' ' + word for word in required)}{''.join(more)}{after}"
        self._mentions: dict[str, list[argparse.Action]] = {}
        for title, flag, metavar, text in mentioned:
            text = text.replace("%", "%%")
            made: argparse.Action = argparse._StoreTrueAction([flag], "_", help=text)
            if metavar:
                made = argparse._StoreAction([flag], "_", metavar=metavar, help=text)
            self._mentions.setdefault(title, []).append(made)

    def read(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The verb's own flags as given, and the words left for Megatron. Prints help and exits on ``--help``."""
        words = list(argv)
        if any(word in _HELP for word in words):
            print(self.format_help())
            sys.exit(0)
        if self.megatron and HELP_MEGATRON in words:
            _help_megatron()
        options, rest = self.parse_known_args(words)
        if not self.megatron and rest:
            flag = rest[0].split("=", 1)[0]
            hint = nearest(flag, self._option_string_actions) if flag.startswith("-") else None
            what = "is not a flag" if flag.startswith("-") else "is one word too many"
            self.refuse(f"{flag} {what} of {self.verb}{f'; did you mean {hint}?' if hint else ''}")
        return options, rest

    def refuse(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else ";"
        raise CommandLineError(f"{message}{end} `{self.prog} --help` lists the flags")

    def error(self, message: str) -> NoReturn:
        """Reports argparse's own errors in one line, like all others."""
        self.refuse(message)

    def format_help(self) -> str:
        """The usage, what the verb does, the flags in groups, an example."""
        made = _Formatter(self.prog, max_help_position=_COLUMN, width=WIDTH)
        made.add_text(self.about)
        titles = dict.fromkeys([*(str(group.title) for group in self._action_groups), *self._mentions])
        own = {str(group.title): group._group_actions for group in self._action_groups}
        for title in titles:
            actions = [*own.get(title, []), *self._mentions.get(title, [])]
            if actions:
                made.start_section(title)
                made.add_arguments(actions)
                made.end_section()
        usage = textwrap.fill(f"usage: {self.usage}", WIDTH, subsequent_indent=" " * 7, break_on_hyphens=False)
        text = f"{usage}\n\n{made.format_help().rstrip()}"
        text += "\n\nexample:\n" + "\n".join(f"  {line}" for line in self.example.strip().splitlines())
        if self.megatron:
            text += f"\n\n`{self.prog} {HELP_MEGATRON}` lists the flags of Megatron that it takes."
        return text


class _Formatter(argparse.HelpFormatter):
    """argparse's formatter, but a list is ``AXIS …`` instead of ``AXIS [AXIS ...]``."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar or default_metavar} …"
        return super()._format_args(action, default_metavar)


def start_engine() -> None:
    """Set torch up for this machine, before anything imports Megatron."""
    from megatron_prune.engine import cpu

    cpu.prepare()


class Verbs:
    """A verb with subcommands: ``study run``, ``convert import``."""

    def __init__(self, verb: str, about: str, parts: dict[str, str]):
        self.verb, self.about, self.parts = verb, about, parts

    def read(self, argv: Sequence[str]) -> tuple[str, list[str]]:
        """The subcommand and the words after it. Prints help and exits on ``--help``."""
        prog = f"{PROGRAM} {self.verb}"
        if not argv or argv[0] in _HELP:
            print(self.format_help())
            sys.exit(0 if argv else 2)
        if argv[0] not in self.parts:
            hint = nearest(argv[0], self.parts)
            raise CommandLineError(
                f"{argv[0]} is not one of {', '.join(self.parts)}"
                f"{f'; did you mean {prog} {hint}?' if hint else f'; `{prog} --help` explains them'}"
            )
        return argv[0], list(argv[1:])

    def format_help(self) -> str:
        prog, width = f"{PROGRAM} {self.verb}", max(map(len, self.parts))
        lines = [f"usage: {prog} {'|'.join(self.parts)} …", "", self.about, ""]
        lines += [f"  {name:<{width}}  {text}" for name, text in self.parts.items()]
        return "\n".join([*lines, "", f"`{prog} {next(iter(self.parts))} --help` lists its flags."])


def _help_megatron() -> NoReturn:
    """Print the help of Megatron's own parser: thousands of lines."""
    start_engine()
    from megatron_prune.engine import arguments

    print(arguments.megatron_parser().format_help())
    sys.exit(0)


# Megatron flags named in the help of verbs that take Megatron's flags: (title, flag, metavar, text).
Mention = tuple[str, str, str | None, str]
MODEL = verbs.ModelSettings.TITLE

LOAD: Mention = (MODEL, "--load", "CKPT", "the checkpoint to read; an iter_… folder selects that step")
SAVE: Mention = (MODEL, "--save", "CKPT", "where the pruned checkpoint goes")
TOKENIZER: tuple[Mention, ...] = (
    (MODEL, "--tokenizer-type", "TYPE", ", ".join(verbs.TOKENIZERS)),
    (MODEL, "--tokenizer-model", "PATH", "its files, if the checkpoint has none"),
)
LAYOUT: tuple[Mention, ...] = (
    (MODEL, "--tensor-model-parallel-size", "T", "ranks that share each layer (default: 1)"),
    (MODEL, "--pipeline-model-parallel-size", "P", "stages of layers (default: 1)"),
    (MODEL, "--bf16", None, "compute in bf16 (--fp16, --fp32; default: as the checkpoint)"),
)
SHAPE_FROM, PARALLEL_RESIDUAL, FP8 = (
    (MODEL, flag.option, flag.shown.partition(" ")[2], flag.help)
    for flag in verbs.ModelSettings.flags()
    if flag.name in ("shape_from", "parallel_residual", "fp8_preset")
)
SEED: Mention = (MODEL, "--seed", "N", "seed of random windows, of searches and of the method random (default: 1234)")
