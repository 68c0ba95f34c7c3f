"""Settings: one frozen dataclass per verb or method, from which its flags, their help and their checks are made.

    @dataclass(frozen=True, kw_only=True)
    class Apply(Settings):
        TITLE = "files"                                       # title of the group of flags in --help
        load: str = setting(metavar="CKPT", help="the parent that the plan was made for")      # no default: required
        workers: int = setting(1, metavar="N", help="processes that share the weights")

The fields are the flags: ``workers`` is ``--workers`` on a command line, ``workers`` in a Python call and ``workers``
in study.yaml (where dashes and underscores are the same). A field is an int, float, str or bool, one of these ``|
None``, or a ``tuple[…, ...]`` of them (several words after one flag). There are three ways to make the object, and all
check each value in the same place (``Flag.convert``):

* ``Apply(load=…, workers=2)``                    from Python, as typed; nothing is converted
* ``Apply.read({"load": …, "workers": 2}, where="methods.apply")``    a mapping: a YAML entry, keywords of a call
* ``add_flags(parser, Apply)`` and then ``Apply.of(namespace)``        a command line (``cli/parser.py`` does both)

A bool that is True by default has the flag ``--no-NAME``.

and back: ``words()`` is the command line, ``to_json()`` what an artifact keeps, ``==`` compares.
``was_given("workers")`` distinguishes a given flag from a default.

Settings are combined by inheritance (``class Prune(Target, Sparsity, Calibration)``): help shows
a group for each class that has its own ``TITLE``. The settings of verbs are in ``verbs/``, those of methods in
``methods/options.py``. Nothing here imports torch, so that help is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from decimal import Decimal
from functools import cache, partial
from typing import Any, ClassVar, Self

from megatron_prune.errors import CommandLineError, UsageError

_KINDS = {int: "a whole number", float: "a number", str: "text"}


def setting(
    default: Any = MISSING,
    *,
    help: str,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    kind: Callable[[str], Any] | None = None,
    positional: bool = False,
    repeated: bool = False,
    alone: Any = None,
) -> Any:
    """A field of ``Settings``; required without a ``default``.

    ``kind`` converts a word to a value instead of the field's type (it may raise ValueError); ``positional``: a word
    without a flag; ``repeated``: the flag may be given several times, with one value each; ``alone``: the value of the
    flag without a word after it.
    """
    told = {
        "help": help, "metavar": metavar, "choices": choices, "kind": kind, "positional": positional,
        "repeated": repeated, "alone": alone,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=told)


@dataclass(frozen=True)
class Flag:
    """One field, as the command line sees it."""

    name: str
    title: str  # of its group in --help
    type: Any  # of one value
    many: bool
    default: Any
    help: str
    metavar: str | None
    choices: Sequence[str] | None
    kind: Callable[[str], Any] | None
    positional: bool
    repeated: bool
    alone: Any

    @property
    def option(self) -> str:
        """``ratio_of`` → ``--ratio-of``; the metavar of a positional word; ``--no-…`` of what is on by default."""
        if self.positional:
            return self.metavar or self.name
        return f"--{'no-' * self.is_on}{self.name.replace('_', '-')}"

    @property
    def is_on(self) -> bool:
        """True if the flag switches off what is on without it."""
        return self.type is bool and self.default is True

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def shown(self) -> str:
        """The option with its metavar, for usage lines."""
        if self.positional or self.type is bool:
            return f"{self.option} …" if self.many else self.option
        value = self.metavar or ("|".join(self.choices) if self.choices else self.name.upper())
        return f"{self.option} {value}{' …' if self.many and not self.repeated else ''}"

    def convert(self, word: Any, called: str | None = None) -> Any:
        """Convert a word, or a value written like one. UsageError names ``called``, or the option."""
        called, text = called or self.option, str(word)
        if self.kind is not None:
            try:
                return self.kind(text)
            except ValueError as error:
                raise UsageError(called, got=text, expected=str(error)) from error
        try:
            value = self.type(text)
        except ValueError as error:
            raise UsageError(called, got=text, expected=_KINDS[self.type]) from error
        if self.type is float and not math.isfinite(value):
            raise UsageError(called, got=text, expected="a finite number")
        if self.choices is not None and value not in self.choices:
            raise UsageError(called, got=text, expected=f"one of {', '.join(self.choices)}")
        return value

    def read(self, value: Any, called: str) -> Any:
        """The field's value from a value in a mapping."""
        if self.type is bool:
            if not isinstance(value, bool):
                raise UsageError(called, got=value, expected="true or false")
            return value
        if self.many:
            items = value if isinstance(value, (list, tuple)) else [value]
            return tuple(self.convert(item, called) for item in items)
        if isinstance(value, (list, tuple, dict, bool)):
            raise UsageError(called, got=value, expected="one value")
        return self.convert(value, called)

    def words(self, value: Any) -> list[str]:
        """The command-line words for ``value``."""
        if value is None:
            return []
        if self.type is bool:
            return [self.option] if value is not self.is_on else []
        items = [str(item) for item in value] if self.many else [str(value)]
        if self.positional:
            return items
        if self.repeated:
            return [word for item in items for word in (self.option, item)]
        return [self.option, *items]

    def add(self, group: argparse._ActionsContainer) -> None:
        """Add the flag to argparse. Flags not given stay out of the namespace: ``Settings.of`` adds defaults."""
        text = self.help.replace("%", "%%")
        silent = isinstance(self.default, bool) or self.default in (MISSING, None, ())  # but 1 == True
        if not silent and "default" not in text:
            default = " ".join(map(str, self.default)) if self.many else f"{self.default}"
            text += f" (default: {default})".replace("%", "%%")
        more: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if self.type is bool:
            group.add_argument(self.option, dest=self.name, action=f"store_{not self.is_on}".lower(), **more)
            return
        if self.metavar is None and self.choices is not None:
            more["metavar"] = "{" + ",".join(self.choices) + "}"
        elif self.metavar is not None:
            more["metavar"] = self.metavar
        more["type"] = partial(_convert, self)
        if self.positional:
            group.add_argument(self.name, nargs="*" if self.many else "?", **more)  # `_make` reports a missing one
            return
        if self.repeated:
            more["action"] = "append"
        elif self.many:
            more["nargs"] = "+"
        elif self.alone is not None:
            more |= {"nargs": "?", "const": self.alone}
        group.add_argument(self.option, dest=self.name, **more)


def _convert(flag: Flag, word: str) -> Any:
    return flag.convert(word)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class. Subclasses are ``@dataclass(frozen=True, kw_only=True)`` with fields made by ``setting``."""

    TITLE: ClassVar[str] = "options"

    @classmethod
    def flags(cls) -> tuple[Flag, ...]:
        """The flags of all fields, base classes first."""
        hashable: Any = cls
        return _flags(hashable)

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Read a mapping; errors name ``where`` it is written (``methods.0.settings``).

        None means the default. UsageError for an unknown key or an invalid value.
        """
        known = {flag.name: flag for flag in cls.flags()}
        found: dict[str, Any] = {}
        for key, value in values.items():
            name, called = key.replace("-", "_"), f"{where}.{key}" if where else key
            if name not in known:
                raise unknown_key(called, key, known)
            if value is not None:
                found[name] = known[name].read(value, called)
        return cls._make(found, where)

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """Take these settings from argparse's namespace (see ``add_flags``). CommandLineError if one is missing."""
        known = {flag.name: flag for flag in cls.flags()}
        found = {name: value for name, value in vars(options).items() if name in known}
        found = {name: tuple(value) if known[name].many else value for name, value in found.items()}
        return cls._make(found, "")

    @classmethod
    def _make(cls, found: Mapping[str, Any], where: str) -> Self:
        missing = [flag for flag in cls.flags() if flag.required and flag.name not in found]
        if missing:
            raise CommandLineError(
                f"{where + ': ' if where else ''}{' and '.join(flag.shown for flag in missing)} "
                f"{'is' if len(missing) == 1 else 'are'} required ({'; '.join(flag.help for flag in missing)})"
            )
        made = cls(**found)
        object.__setattr__(made, "_given", frozenset(found))
        return made

    def was_given(self, name: str) -> bool:
        """True if the field was given explicitly, even with its default, or differs from its default."""
        given: frozenset[str] = getattr(self, "_given", frozenset())
        return name in given or any(
            flag.name == name and getattr(self, name) != flag.default for flag in type(self).flags()
        )

    def words(self) -> list[str]:
        """The command line for these settings, without those that were not given."""
        flags = sorted(type(self).flags(), key=lambda flag: flag.positional)
        return [word for flag in flags if self.was_given(flag.name) for word in flag.words(getattr(self, flag.name))]

    def to_json(self) -> dict[str, Any]:
        """All fields by name; tuples as lists."""
        values = {flag.name: getattr(self, flag.name) for flag in type(self).flags()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@cache
def _flags(cls: Any) -> tuple[Flag, ...]:
    hints = typing.get_type_hints(cls)
    titles: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        titles |= dict.fromkeys(vars(base).get("__annotations__", {}), getattr(base, "TITLE", ""))
    made = []
    for field in dataclasses.fields(cls):
        kind, many = _value_type(hints[field.name])
        made.append(
            Flag(name=field.name, title=titles[field.name], type=kind, many=many, default=field.default,
                 **field.metadata)
        )  # fmt: skip
    return tuple(made)


def _value_type(hint: Any) -> tuple[Any, bool]:
    """``tuple[int, ...] | None`` → (int, True)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def add_flags(parser: argparse.ArgumentParser, *classes: type[Settings]) -> None:
    """Add the flags of ``classes`` to ``parser``, grouped by title. Shared flags are added once."""
    groups = {group.title: group for group in parser._action_groups}
    done: set[str] = set()
    for cls in classes:
        for flag in cls.flags():
            if flag.name in done:
                continue
            done.add(flag.name)
            if flag.title not in groups:
                groups[flag.title] = parser.add_argument_group(flag.title)
            flag.add(groups[flag.title])


def count(text: str) -> int:
    """A whole number above 0: ``163840``, ``160k``, ``1.5M``, ``50B``, ``1e9``. ValueError says what is expected."""
    found = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*([kMBT]?)\s*", text)
    scale = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    value = round(Decimal(found[1].replace("_", "")) * scale[found[2]]) if found else 0
    if value < 1:
        raise ValueError("a positive number such as 400000, 400k, 1.5M, 50B")
    return value


def fraction(text: str) -> float:
    """A number from 0 to less than 1. ValueError says what is expected."""
    expected = "a fraction, from 0 to less than 1"
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(expected) from error
    if not 0 <= value < 1:
        raise ValueError(expected)
    return value


def unknown_key(called: str, key: str, known: Iterable[str]) -> UsageError:
    """The error for ``key`` of a mapping, which is none of ``known``."""
    hint = nearest(key.replace("-", "_"), known := list(known))
    why = f"did you mean {hint}?" if hint else ""
    return UsageError(called, got="an unknown key", expected=f"one of {', '.join(known)}", why=why)


def numbers_of(text: str, flag: str) -> tuple[int, ...]:
    """The layers that ``0-3,7`` names, ascending. UsageError of ``flag``."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or found & set(range(first, last + 1)):
            raise UsageError(flag, got=text, expected="numbers and ranges such as 0-3,7, each layer once")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def value_of(words: Sequence[str], flag: str) -> str | None:
    """The last value of ``flag`` in a command line."""
    found = None
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else words[place + 1] if place + 1 < len(words) else None
    return found


def either(words: Sequence[str]) -> str:
    """``a, b or c``"""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The closest match for ``word`` in ``known``, or None."""
    bare = {one.lstrip("-"): one for one in known}
    found = difflib.get_close_matches(word.lstrip("-"), bare, n=1, cutoff=0.7)
    return bare[found[0]] if found else None
