"""MkDocs hook: writes the reference pages from the code that reads the files, so that they cannot go out of date."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic.dataclasses import is_pydantic_dataclass

# Of a row of model-arguments.json: the title of its section, and what it says.
OUTCOMES = {
    "equal": ("The same loss", "The checkpoint alone has the loss that the trained model had in memory."),
    "refused": ("Refused", "The checkpoint alone is refused, by the argument's name."),
    "not trained": (
        "Not trained",
        "Training with this value alone does not begin, or does not end: this package or Megatron refuses it.",
    ),
    "needs a GPU": (
        "Not on this machine",
        "The table was made without a GPU, and training with these needs one, or a library that needs one.",
    ),
}
MARK = "<!-- study-schema -->"
COMMANDS = "<!-- cli-reference -->"
API = "<!-- api -->"
ARGUMENTS = "<!-- model-arguments -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark of a generated page."""
    for mark, made in ((MARK, study_schema), (COMMANDS, command_line), (API, api), (ARGUMENTS, model_arguments)):
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


def command_line() -> str:
    """The help of every verb, in the order of the overview; a verb that is several has a section for each."""
    from megatron_prune.__main__ import VERBS, command
    from megatron_prune.cli.checkpoint_commands import CONVERT_PARTS
    from megatron_prune.cli.pruning_commands import prune_hf_parser
    from megatron_prune.cli.study_commands import STUDY_PARTS

    parts = {"convert": CONVERT_PARTS, "study": STUDY_PARTS}
    sections = []
    for title, group in VERBS.items():
        sections.append(f"## {title[0].upper()}{title[1:]}")
        for verb in group:
            parser = command(verb, "parser")
            helps = {verb: command(verb, "group")() if verb in parts else parser()}
            helps |= {f"{verb} {part}": parser(part) for part in parts.get(verb, ())}
            helps |= {"prune --hf": prune_hf_parser()} if verb == "prune" else {}
            sections += [f"### {name}\n\n```text\n{one.format_help()}\n```" for name, one in helps.items()]
    return "\n\n".join(sections)


def model_arguments() -> str:
    """What became of every argument of Megatron's model: the table that tests/checkpoint/argument_guard.py made."""
    rows = json.loads(Path(__file__).with_name("model-arguments.json").read_text())
    sections = []
    for outcome, (title, about) in OUTCOMES.items():
        found = [row for row in rows if row["outcome"] == outcome]
        if not found:
            continue
        why = any(row["why"] for row in found)
        sections.append(f"## {title}: {len(found)} of {len(rows)}\n\n{about}\n")
        sections.append(f"| argument | flags |{' reason |' * why}\n| --- | --- |{' --- |' * why}")
        for row in found:
            cells = [f"`{row['argument']}`", f"`{row['flags']}`", *([row["why"]] if why else [])]
            sections.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
        sections.append("")
    return "\n".join(sections)


def api() -> str:
    """A section for everything that ``import megatron_prune`` offers: functions first, then what they return."""
    import megatron_prune

    found = [getattr(megatron_prune, name) for name in megatron_prune.__all__]
    parts = [_function(one) for one in found if inspect.isfunction(one)]
    parts += ["## Results", *(_class(one) for one in found if inspect.isclass(one))]
    return "\n\n".join(parts)


def _function(function: Any, level: int = 2, name: str = "") -> str:
    forms = typing.get_overloads(function) or [function]
    code = "\n\n".join(_signature(name or function.__name__, form) for form in forms)
    return f"{'#' * level} `{name or function.__name__}`\n\n```python\n{code}\n```\n\n{_about(function)}"


def _signature(name: str, function: Any) -> str:
    """A parameter per line, as the code has them."""
    signature = inspect.signature(function)
    lines, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            lines.append("*")
            starred = True
        default = parameter.default
        shown = "" if default is parameter.empty else f" = {getattr(default, '__name__', repr(default))}"
        starred_name = f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name
        lines.append(f"{starred_name}: {_hint(parameter.annotation)}{shown}")
    returns = _hint(signature.return_annotation)
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {returns}"


def _hint(annotation: Any) -> str:
    """A type as the package writes it, its own short names spelt out."""
    return re.sub(r"\b(Words|Place)\b", "str | Path", str(annotation))


def _class(found: Any) -> str:
    fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    rows = [f"| `{field.name}` | `{str(field.type).replace('|', 'or')}` |" for field in fields]
    table = ["", "| field | type |", "| --- | --- |", *rows] if rows else []
    more = []
    for name, member in vars(found).items():
        if isinstance(member, property) and not name.startswith("_"):
            more.append(f"* `{name}`: {_about(member)}")
    parts = [f"### `{found.__name__}`", "", _about(found), *table, *(["", *more] if more else [])]
    for name, member in vars(found).items():
        plain = member.__func__ if isinstance(member, classmethod) else member
        if found.__name__ == "Study" and inspect.isfunction(plain) and not name.startswith("_"):
            parts += ["", _function(plain, 4, f"Study.{name}")]
    return "\n".join(parts)


def _about(found: Any) -> str:
    return inspect.cleandoc(found.__doc__ or "").replace("``", "`")


def study_schema() -> str:
    """A section for each dataclass of study.yaml, in the order in which a reader meets them."""
    from megatron_prune.study.schema import StudyConfig

    parts, pending, done = [], [("the file", StudyConfig)], set()
    while pending:
        key, section = pending.pop(0)
        if section in done:
            continue
        done.add(section)
        parts.append(_section(key, section))
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            pending += [(field.name, inner) for inner in _sections_in(hints[field.name])]
    return "\n\n".join(parts)


def _section(key: str, section: Any) -> str:
    hints = typing.get_type_hints(section, include_extras=True)
    rows = [
        f"| `{field.name}` | {_words(hints[field.name])} | {_default(field)} |" for field in dataclasses.fields(section)
    ]
    title = "The file" if key == "the file" else f"`{key}`"
    about = inspect.cleandoc(section.__doc__ or "").replace("``", "`")
    return "\n".join([f"## {title}", "", about, "", "| key | value | default |", "| --- | --- | --- |", *rows])


def _sections_in(hint: Any) -> list[Any]:
    """The dataclasses inside ``X``, ``X | None``, ``list[X]`` or ``dict[str, X]``."""
    if dataclasses.is_dataclass(hint) and is_pydantic_dataclass(hint):
        return [hint]
    return [found for inner in typing.get_args(hint) for found in _sections_in(inner)]


def _words(hint: Any) -> str:
    """A type as a reader would say it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _words(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(one) for one in inner if one is not types.NoneType)
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if origin is list:
        return f"list of {_words(inner[0])}"
    if origin is tuple:
        return " and ".join(_words(one) for one in inner)
    if origin is dict:
        return f"mapping of {_words(inner[0])} to {_words(inner[1])}"
    if dataclasses.is_dataclass(hint):
        return f"section, see below (`{hint.__name__}`)"  # type: ignore[union-attr]
    plain = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything"}
    return plain.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value: Any = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None or value == {} or value == []:
        return "none"
    return "see below" if dataclasses.is_dataclass(value) else f"`{value}`"
