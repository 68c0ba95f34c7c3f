"""Reads a study.yaml with its includes, and records the line of each key.

``include: common.yaml`` (or a list of files, relative to the file that names them) reads other files first: mappings
are merged key by key, anything else is replaced, and the including file takes precedence. Anchors and merge keys
(``<<``) work as in any YAML file. Duplicate keys (YAML would take the last one), tabs, circular includes and
exponentially growing aliases are refused.

A ``Location`` is the path to a value: ``("methods", 0, "settings")``. Errors write it as ``methods.0.settings``.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_prune.artifacts import read_json
from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.study.values import ValueProblem
from megatron_prune.untrusted import read_bytes

Location = tuple[Any, ...]
INCLUDE = "include"
RESOLVED = "study.json"  # in the folder of a study that has begun
MOST_VALUES = 100_000  # per file, with every alias expanded
MOST_BYTES = 128 << 10  # of a file: PyYAML reads 100 kB a second at worst
_LONG_NUMBER = re.compile(r"[0-9_:]{1000}")


@dataclass(frozen=True)
class Position:
    """A line of a file, counted from 1, and the text of a scalar on it."""

    file: str
    line: int
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


class WrongStudy(UsageError):
    """All errors in a study.yaml, one per line."""

    lines = True

    def __init__(self, problems: Sequence[Exception]):
        self.problems = tuple(problems)
        Exception.__init__(self, "\n".join(str(problem) for problem in problems))


@dataclass(frozen=True)
class Written:
    """The content of a study.yaml as plain data, with the positions of its keys."""

    content: Any
    file: str = ""
    positions: Mapping[Location, Position] = field(default_factory=dict)

    def place(self, location: Location) -> str:
        """``study.yaml, line 3: `` for the innermost written key on the path to ``location``; empty if the content is
        not from a file."""
        for length in range(len(location), 0, -1):
            if found := self.positions.get(location[:length]):
                return f"{found}: "
        return f"{self.file}: " if self.file else ""

    def shown(self, location: Location, value: Any) -> str:
        """A value as it is written: YAML 1.1 reads an unquoted 4:2 as 242."""
        found = self.positions.get(location)
        return repr(value if found is None or found.text is None else found.text)

    def location(self, dotted: str) -> Location:
        """The path for ``data.train`` in an error or, by a method's label, ``methods.wanda-2-4.target``.

        As far as it is written; the empty path if none of it is.
        """
        methods = self.content.get("methods") if isinstance(self.content, dict) else None
        for number, entry in enumerate(methods if isinstance(methods, list) else []):
            for tag in self._tags(entry, number):
                if dotted == f"methods.{tag}" or dotted.startswith(f"methods.{tag}."):
                    dotted = f"methods.{number}{dotted.removeprefix(f'methods.{tag}')}"
        known = {".".join(map(str, location)): location for location in self.positions}
        return max((at for name, at in known.items() if f"{dotted}.".startswith(f"{name}.")), key=len, default=())

    def _tags(self, entry: Any, number: int) -> list[str]:
        """Names of a method in errors: its label, or else its name and pattern."""
        if not isinstance(entry, dict):
            return []
        if entry.get("label"):
            return [str(entry["label"])]
        pattern = self.positions.get(("methods", number, "pattern"))
        name = str(entry.get("name"))
        return [f"{name}-{str(pattern.text).replace(':', '-')}" if pattern else name]

    def of_parent(self, label: str) -> Written:
        """The study of one of ``parents``: it becomes ``parent``, and its label joins the study's name."""
        content = {key: value for key, value in self.content.items() if key != "parents"}
        content |= {"name": f"{content['name']}.{label}", "parent": self.content["parents"][label]}
        moved = {("parent", *at[2:]): where for at, where in self.positions.items() if at[:2] == ("parents", label)}
        return replace(self, content=content, positions={**self.positions, **moved})


def read(path: str | Path) -> Written:
    """Read a study.yaml and its includes; UsageError (WrongStudy for several) names file, line and key."""
    if Path(path).is_dir():
        return Written(read_json(_resolved_in(Path(path))), str(Path(path) / RESOLVED))
    if not Path(path).is_file():
        raise UsageError("STUDY.yaml", got=f"{path}, which does not exist", expected="the YAML file of a study")
    content, positions = _read(Path(path), ())
    return Written(content, str(path), positions)


def _resolved_in(folder: Path) -> Path:
    """The study in the folder of one that has begun; UsageError for another folder."""
    if (folder / RESOLVED).is_file():
        return folder / RESOLVED
    inside = sorted(str(path) for path in folder.glob("*.y*ml"))
    raise UsageError(
        "STUDY.yaml", got=f"{folder}, a folder without {RESOLVED}",
        expected="the YAML file of a study, or the folder of one that has begun",
        do=f"give {' or '.join(inside[:3])}" if inside else "",
    )  # fmt: skip


def root_of(path: str | Path, runs_dir: str | Path, name: str) -> Path:
    """The folder of the study ``name`` in the file ``path``; if ``path`` is that folder, as its commands write it: from
    here, or from the root of the file system."""
    folder = Path(path)
    if not folder.is_dir():
        return Path(runs_dir) / name
    begun = "".join(cell.read_text() for cell in itertools.islice(folder.glob("cells/*/cell.json"), 1))
    known = (folder, Path(os.path.relpath(folder)), folder.absolute())
    return next((root for root in known if f'"{root}/cells/' in begun), folder)


def nearest(word: str, known: Iterable[str]) -> str:
    """The closest known word to ``word``, or an empty string."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def _read(path: Path, including: tuple[Path, ...]) -> tuple[Any, dict[Location, Position]]:
    """One file merged over its includes; ``including``: the chain of files that include it."""
    tree = _Tree(path)
    content, positions = tree.content, tree.positions
    if not isinstance(content, dict) or INCLUDE not in content:
        return content, positions
    named = content.pop(INCLUDE)
    where = f"{positions[INCLUDE,]}: {INCLUDE}"
    files = named if isinstance(named, list) else [named]
    if not files or not all(isinstance(file, str) and file for file in files):
        raise UsageError(where, got=repr(named), expected="a file, or a list of files")
    merged: Any = {}
    lines: dict[Location, Position] = {}
    chain = (*including, path.resolve())
    for file in files:
        other = path.parent / file
        if not other.is_file():
            raise UsageError(where, got=file, expected=f"an existing file, relative to {path}")
        if other.resolve() in chain:
            raise UsageError(where, got=file, expected="a file that does not lead back to this one")
        inner, inner_lines = _read(other, chain)
        if not isinstance(inner, dict):
            raise UsageError(where, got=f"{file} with a {type(inner).__name__}", expected="a file of keys and values")
        merged, lines = _merged((merged, lines), (inner, inner_lines))
    return _merged((merged, lines), (content, positions))


Read = tuple[dict[Any, Any], dict[Location, Position]]


def _merged(below: Read, above: Read, at: Location = ()) -> Read:
    """``above`` over ``below``: mappings key by key, anything else replaced, with the lines of the resulting values."""
    values, lines = dict(below[0]), dict(below[1])
    for key, value in above[0].items():
        here = (*at, key)
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key], lines = _merged((values[key], lines), (value, above[1]), here)
        else:
            values[key] = value
            lines = {one: where for one, where in lines.items() if one[: len(here)] != here}
            lines |= {one: where for one, where in above[1].items() if one[: len(here)] == here}
    return values, lines


class _Tree:
    """The values of one YAML file, and the lines of its keys."""

    def __init__(self, path: Path):
        self.path = path
        self.positions: dict[Location, Position] = {}
        try:
            self.loader = yaml.SafeLoader(read_bytes(path, MOST_BYTES).decode())
            self._refuse_long()
            node = self.loader.get_single_node()
            if node is not None:
                self._refuse_what_multiplies(node)
                self._refuse_twice(node)
            self.content = None if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            raise self._no_yaml(error) from error
        except RecursionError as error:
            raise UsageError("STUDY.yaml", got=path, expected="values that are not nested as deeply") from error
        except UsageError:
            raise
        except MegatronPruneError as error:  # of the file itself
            raise UsageError("STUDY.yaml", got=path, expected="a small text file", why=str(error)) from error
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date or number that is none
            why = " ".join(str(error).split())
            raise UsageError("STUDY.yaml", got=path, expected="valid YAML", why=why) from error

    def _refuse_long(self) -> None:
        """UsageError for a word that YAML would take for a number in base 60: reading it takes quadratic time."""
        for number, line in enumerate(self.loader.buffer.split("\n"), start=1):
            if _LONG_NUMBER.search(line):
                raise UsageError(
                    f"{Position(str(self.path), number)}", got="a number of thousands of digits", expected="a value"
                )

    def _no_yaml(self, error: yaml.MarkedYAMLError) -> UsageError:
        mark = error.problem_mark or error.context_mark
        where = Position(str(self.path), mark.line + 1) if mark else self.path
        why = " ".join(filter(None, (error.context, error.problem)))
        if "'\\t'" in why:
            why = "there is a tab, and YAML is indented with spaces"
        return UsageError("STUDY.yaml", got=where, expected="valid YAML", why=why)

    def _line(self, node: yaml.Node, value: yaml.Node | None = None) -> Position:
        text = value.value if isinstance(value, yaml.ScalarNode) else None
        return Position(str(self.path), node.start_mark.line + 1, text)

    def _refuse_what_multiplies(self, root: yaml.Node) -> None:
        """UsageError for recursive aliases, and for more values than any study has."""
        sizes: dict[int, int] = {}
        open_: set[int] = set()

        def size(node: yaml.Node) -> int:
            if id(node) in open_:
                raise UsageError(f"{self._line(node)}", got="an alias of something that holds it", expected="a value")
            if id(node) not in sizes:
                open_.add(id(node))
                inside: Iterable[yaml.Node] = ()
                if isinstance(node, yaml.SequenceNode):
                    inside = node.value
                elif isinstance(node, yaml.MappingNode):
                    inside = (one for pair in node.value for one in pair)
                sizes[id(node)] = 1 + sum(map(size, inside))
                open_.discard(id(node))
            if sizes[id(node)] > MOST_VALUES:
                raise UsageError(f"{self._line(node)}", got="aliases that stand for more",
                                 expected=f"at most {MOST_VALUES:,} values")  # fmt: skip
            return sizes[id(node)]

        size(root)

    def _refuse_twice(self, root: yaml.Node) -> None:
        """WrongStudy for keys written twice in one mapping; keys merged by ``<<`` may be set again."""
        problems: list[UsageError] = []
        done: set[int] = set()

        def look(node: yaml.Node) -> None:
            if id(node) in done:
                return
            done.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                for one in node.value:
                    look(one)
            elif isinstance(node, yaml.MappingNode):
                lines: dict[str, int] = {}
                for key, value in node.value:
                    name, line = str(key.value), key.start_mark.line + 1
                    if isinstance(key, yaml.ScalarNode) and name in lines:
                        problems.append(UsageError(f"{self._line(key)}: {name}", got=f"it on lines "
                                                   f"{lines[name]} and {line}", expected="each key once"))  # fmt: skip
                    lines.setdefault(name, line)
                    look(value)

        look(root)
        if problems:
            raise WrongStudy(problems)

    def _value(self, node: yaml.Node, at: Location) -> Any:
        """The value of a node; the lines of its keys are added to ``positions``."""
        if not isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] not in ("seq", "map"):
            raise UsageError(f"{self._line(node)}", got=f"the tag {node.tag}", expected="a list or keys without a tag")
        if isinstance(node, yaml.SequenceNode):
            values = []
            for number, one in enumerate(node.value):
                self.positions[(*at, number)] = self._line(one, one)
                values.append(self._value(one, (*at, number)))
            return values
        if isinstance(node, yaml.MappingNode):
            self.loader.flatten_mapping(node)
            found: dict[Any, Any] = {}
            for key, value in node.value:
                name = self.loader.construct_object(key, deep=True)
                if not isinstance(name, Hashable):
                    raise UsageError(f"{self._line(key)}", got=f"{name!r}", expected="text as a key")
                here = (*at, name)
                if name in found:  # merged in by ``<<``, and set again
                    self.positions = {one: where for one, where in self.positions.items() if one[: len(here)] != here}
                self.positions[here] = self._line(key, value)
                found[name] = self._value(value, here)
            return found
        return self.loader.construct_object(node, deep=True)


# pydantic's errors in terms of the file.

UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
MISSING = ("missing", "missing_argument")


def problems_of(error: ValidationError, source: Written, study: type) -> Iterator[MegatronPruneError]:
    """pydantic's errors for a ``study``, one per value.

    For a value of several possible types all of them are listed. A missing key is not reported if another key looks
    like it.
    """
    of_value: dict[Location, list[Any]] = {}
    for one in error.errors():
        location = one["loc"] if one["type"] in MISSING else _written_part(one["loc"], source.content)
        of_value.setdefault(location, []).append(one)
    misspelt = {
        (*at[:-1], nearest(str(at[-1]).replace("-", "_"), _keys_at(study, at[:-1])))
        for at, errors in of_value.items()
        if errors[0]["type"] in UNKNOWN
    }
    for location, errors in of_value.items():
        found = errors[0].get("ctx", {}).get("error")
        if isinstance(found, ValueProblem):
            yield placed(found.error, source, source.location(found.key) or location)
            continue
        if len(errors) == 1:
            location = errors[0]["loc"]
        where = f"{source.place(location)}{'.'.join(map(str, location))}"
        kind = errors[0]["type"]
        if kind in UNKNOWN:
            keys = _keys_at(study, location[:-1])
            yield UsageError(where, got="an unknown key", expected=f"one of {', '.join(keys)}",
                             do=_did_you_mean(str(location[-1]), keys, study))  # fmt: skip
        elif kind in MISSING:
            if location not in misspelt:
                yield UsageError(where, got="nothing", expected="a value, since this key is required")
        else:
            words = [one["msg"].removeprefix("Value error, ").removeprefix("Input should be ") for one in errors]
            yield UsageError(
                where, got=source.shown(location, errors[0]["input"]), expected=" or ".join(dict.fromkeys(words))
            )


def placed(error: MegatronPruneError, source: Written, location: Location = ()) -> MegatronPruneError:
    """The same error with the file and line of ``location``, or of the key that it names.

    They are added once, and only if that key is written.
    """
    key = str(getattr(error, "flag", "") or str(error).partition(":")[0])
    location = location or source.location(key)
    if location and (where := source.place(location)) and not str(error).startswith(where):
        error.args = (f"{where}{error}",)
    return error


def _written_part(location: Location, content: Any) -> Location:
    """The part of pydantic's path to an error that is in the file; the rest are alternative types of a value."""
    here, way = content, []
    for part in location:
        if isinstance(here, dict):
            same = [key for key in here if key == part or str(key).replace("_", "-") == part]  # Megatron flags
            if not same:
                break
            here = here[part := same[0]]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            break
        way.append(part)
    return tuple(way)


def _did_you_mean(word: str, keys: list[str], study: type) -> str:
    """The nearest key of the same section, else of another one."""
    if near := nearest(word.replace("-", "_"), keys):
        return f"did you mean {near}?"
    everywhere = dict(_all_keys(study, ""))
    near = nearest(word.replace("-", "_"), everywhere)
    return f"did you mean {everywhere[near]}?" if near else ""


def _all_keys(section: Any, before: str) -> Iterator[tuple[str, str]]:
    """Every key of study.yaml with its path: ``seq_length``, ``data.seq_length``."""
    hints = typing.get_type_hints(section)
    for one in dataclasses.fields(section):
        yield one.name, f"{before}{one.name}"
        inner = _dataclass_in(hints[one.name])
        if dataclasses.is_dataclass(inner):
            yield from _all_keys(inner, f"{before}{one.name}.")


def _keys_at(study: type, location: Location) -> list[str]:
    """The keys of the dataclass at ``location`` inside a ``study``."""
    here: Any = study
    for part in location:
        if isinstance(part, str):
            here = typing.get_type_hints(here)[part]
        here = _dataclass_in(here)
    return [field.name for field in dataclasses.fields(here)]


def _dataclass_in(annotation: Any) -> Any:
    """The dataclass inside ``X``, ``X | None`` or ``list[X]``."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    inside = [_dataclass_in(part) for part in typing.get_args(annotation) if part is not types.NoneType]
    return next((part for part in inside if dataclasses.is_dataclass(part)), annotation)
