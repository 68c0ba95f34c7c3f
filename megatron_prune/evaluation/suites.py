"""Suites: lm-eval tasks with the metric that counts of each, and corpora with where their text comes from.

``suites.yaml`` in this folder has those that come with the package; a file of the same form may be read in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_prune.errors import UsageError

STRICT = ConfigDict(extra="forbid")
FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True, config=STRICT)
class TextSource:
    """Where a corpus comes from: a data set (``NAME[:CONFIG]`` on the hub, or a folder) or ``files``."""

    dataset: str | None = None
    split: str = "train"
    column: str = "text"
    files: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Suite:
    """``tasks``: the metric that counts of each lm-eval task. ``windows`` and ``seq_length``: what of each of the
    ``corpora`` is scored. ``few_shot``: what the suite is defined with, if it says so."""

    about: str
    tasks: Mapping[str, str] = Field(default_factory=dict)
    corpora: Mapping[str, TextSource] = Field(default_factory=dict)
    few_shot: Annotated[int, Field(ge=0)] | None = None
    windows: Annotated[int, Field(gt=0)] | None = None
    seq_length: Annotated[int, Field(gt=0)] | None = None


@functools.cache
def known() -> Mapping[str, Suite]:
    """The suites of the package, by name."""
    return read(FILE)


def read(path: str | Path) -> Mapping[str, Suite]:
    """The suites of a YAML file; UsageError says what is wrong with it."""
    if not Path(path).is_file():
        raise UsageError("SUITE", got=path, expected="the YAML file of suites, which exists")
    try:
        found: Mapping[str, Suite] = TypeAdapter(dict[str, Suite]).validate_python(
            yaml.safe_load(Path(path).read_text())
        )
    except (yaml.YAMLError, ValidationError) as error:
        raise UsageError("SUITE", got=path, expected="suites by name", why=" ".join(str(error).split())) from error
    return found


def tasks_of(names: Iterable[str], own: Mapping[str, Mapping[str, str]] | None = None) -> list[str]:
    """The names of lm-eval, each once, with suites replaced by their tasks; ``own``: more suites, by name."""
    suites = {name: suite.tasks for name, suite in known().items()} | dict(own or {})
    return list(dict.fromkeys(task for name in names for task in (suites.get(name) or {name: ""})))


def metrics_of(name: str, own: Mapping[str, Mapping[str, str]] | None = None) -> Mapping[str, str] | None:
    """The tasks of a suite with the metric of each; None if no suite has this name."""
    if own and name in own:
        return own[name]
    return known()[name].tasks if name in known() else None


def metric_that_counts(there: Iterable[str]) -> str | None:
    """Of a task that no suite names: ``acc_norm``, or else ``acc``, or else the first metric it has."""
    names = list(there)
    return next((name for name in ("acc_norm", "acc", *names) if name in names), None)
