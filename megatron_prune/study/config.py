"""study.yaml as frozen dataclasses: what a study is, read strictly and refused early.

Every key is known or refused by name; every number is checked where it is read. ``load`` gives a
``Study`` (its sections: ``sections``; what they are written in: ``values``) whose defaults are filled
in; ``resolved`` gives it back as JSON for the run's folder. Paths are relative to the directory that
the command is called from, as Megatron's are.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_prune.errors import UsageError
from megatron_prune.study import study_file
from megatron_prune.study.budgets import Batch
from megatron_prune.study.family import Family
from megatron_prune.study.launch import Launch, Tracking
from megatron_prune.study.sections import Calibration, Data, Evaluation, Method, Parent, Recipe
from megatron_prune.study.values import (
    RESERVED,
    STRICT,
    Fraction,
    Retention,
    Scratch,
    Scratches,
    Setting,
    Settings,
    Tokens,
)


@dataclass(frozen=True, config=STRICT)
class Study:
    """Everything that a study is."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: Data
    parent: Parent
    recipe: Recipe
    methods: Annotated[list[Method], Field(min_length=1)]
    budgets: Annotated[list[Tokens], Field(min_length=1)]
    ratios: list[Fraction] = dataclasses.field(default_factory=list)
    ratio_of: Literal["linears", "all"] = "linears"
    settings: Settings = dataclasses.field(default_factory=lambda: ["equal-training", "equal-total"])
    scratch: Scratches = dataclasses.field(default_factory=lambda: ["masked"])  # beside sparse methods
    seeds: Annotated[list[PositiveInt], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [1])
    launch: Launch = dataclasses.field(default_factory=Launch)
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    tracking: Tracking = dataclasses.field(default_factory=Tracking)
    retention: Retention = "all"  # of checkpoints of the compared runs
    family: Family = dataclasses.field(default_factory=Family)  # the comparisons that Holm's correction is over
    parent_per_seed: bool = False  # a parent trained under each seed, so that intervals are not conditional on one

    def __post_init__(self) -> None:
        batch = self.recipe.micro_batch_size * self.launch.data_parallel
        if self.recipe.global_batch_size % batch:
            raise UsageError(
                "recipe.global_batch_size",
                given=self.recipe.global_batch_size,
                allowed=f"a multiple of micro_batch_size x data parallel size = {batch}",
            )
        for where, flags in (
            ("recipe.arguments", self.recipe.arguments),
            ("parent.pretrain.arguments", self.parent.pretrain.arguments if self.parent.pretrain else {}),
        ):
            for flag in flags:
                if flag in RESERVED:
                    raise UsageError(
                        f"{where}.{flag}",
                        given="set",
                        allowed="Megatron flags that the study does not set itself",
                        why="it would not be the same for every arm",
                    )
        if self.parent.pretrain and self.parent.pretrain.lr is None and len(self.recipe.rates) > 1:
            raise UsageError("parent.pretrain.lr", given="nothing", allowed="a learning rate",
                             why="recipe.lr has several, for the runs that are compared")  # fmt: skip
        if self.parent_per_seed and self.parent.pretrain is None:
            raise UsageError("parent_per_seed", given="true", allowed="only with parent.pretrain",
                             why="an outside parent cannot be trained again")  # fmt: skip
        for what in ("budgets", "ratios", "seeds"):
            values = getattr(self, what)
            if len(set(values)) != len(values):
                raise UsageError(what, given=values, allowed="different values")
        self._refuse_budgets_of_one_run()
        tags = [method.tag for method in self.methods]
        for tag in tags:
            if tags.count(tag) > 1:
                raise UsageError("methods", given=f"{tag} twice", allowed="a label for each of them")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag):
                raise UsageError("methods", given=tag, allowed="labels of letters, digits, dots and dashes")
        names = [(method.title, method.last_pattern) for method in self.methods]
        if len(set(names)) < len(names):
            raise UsageError("methods", given="two of one name and pattern", allowed="another label for each of them")
        self.family.check(
            methods=(method.title for method in self.methods),
            patterns=(method.last_pattern for method in self.methods),
            ratios=[*self.ratios, *(method.own_ratio for method in self.methods)],
            settings=(setting for method in self.methods for setting, _ in self.compared(method)),
            budgets=self.budgets,
        )
        if not self.ratios and not all(method.target or method.own_ratio or method.chain for method in self.methods):
            raise UsageError("ratios", given="none", allowed="at least one ratio, or a target or N:M for every method")
        if self.ratio_of != "linears" and any(method.sparse for method in self.methods):
            raise UsageError(
                "ratio_of", given=self.ratio_of, allowed="linears in a study with sparse methods",
                why="they remove their ratio of every linear",
            )  # fmt: skip

    def _refuse_budgets_of_one_run(self) -> None:
        """Budgets are trained as whole batches: two of as many are one run, which would count as two."""
        batch = Batch(self.recipe.global_batch_size, self.data.seq_length)
        known: dict[int, int] = {}
        for budget in self.budgets:
            steps = batch.steps(budget, "budgets")
            if steps in known:
                raise UsageError(
                    "budgets", given=f"{known[steps]} and {budget}",
                    allowed="budgets of different numbers of steps",
                    why=f"both are {steps} step{'s' * (steps != 1)} of {batch.tokens:,} tokens: one run",
                )  # fmt: skip
            known[steps] = budget

    def compared(self, method: Method) -> list[tuple[Setting, Scratch]]:
        """The comparisons that a pruned model of ``method`` is for."""
        asked = method.compare or dict.fromkeys(self.settings)
        default: list[Scratch] = self.scratch if method.sparse else ["dense"]
        return [(setting, kind) for setting, kinds in asked.items() for kind in kinds or default]

    def parent_run(self, replicate: int) -> tuple[int, float]:
        """Seed and learning rate that a parent is trained with; ``replicate`` is what ``parent_cells`` has for it."""
        assert self.parent.pretrain is not None
        return self.parent.pretrain.seed + replicate, self.parent.pretrain.lr or self.recipe.rates[0]

    @property
    def evaluation_seq_length(self) -> int:
        return self.evaluation.seq_length or self.data.seq_length

    @property
    def calibration_seq_length(self) -> int:
        return self.calibration.seq_length or self.data.seq_length


def load(path: str | Path) -> Study:
    """Read a study.yaml; UsageError names the key that is wrong and what is allowed there."""
    found = load_all(path)
    if len(found) > 1:
        raise UsageError("STUDY.yaml", given=f"{path} with {len(found)} parents", allowed="a study of one parent")
    return found[0]


def load_all(path: str | Path) -> list[Study]:
    """Read a study.yaml that may have ``parents``, by label, in place of ``parent``: one study for each of them.

    They are called NAME.LABEL, and are studies of their own, in folders of their own.
    """
    content = study_file.read(path)
    if not isinstance(content, dict) or "parents" not in content:
        return [from_mapping(content, where=str(path))]
    parents = content.pop("parents")
    if not isinstance(parents, dict) or not parents or "parent" in content:
        raise UsageError(f"{path}: parents", given=parents if "parent" not in content else "set beside parent",
                         allowed="parents by their labels, in place of parent")  # fmt: skip
    if not isinstance(name := content.get("name"), str):
        raise UsageError(f"{path}: name", given="nothing" if name is None else name, allowed="a name: studies are "
                         "called NAME.LABEL")  # fmt: skip
    return [
        from_mapping({**content, "name": f"{name}.{label}", "parent": parent}, where=f"{path}: {label}")
        for label, parent in parents.items()
    ]


def from_mapping(content: Any, where: str = "study") -> Study:
    """A ``Study`` from plain data, with errors in the words of the file."""
    if not isinstance(content, dict):
        raise UsageError(where, given=type(content).__name__, allowed="a mapping of keys to values")
    try:
        return TypeAdapter(Study).validate_python(content)
    except ValidationError as error:
        raise _usage_error(error, where) from error


def resolved(study: Study) -> dict[str, Any]:
    """The study with every default filled in, as JSON values."""
    values: dict[str, Any] = TypeAdapter(Study).dump_python(study, mode="json")
    return values


def _usage_error(error: ValidationError, where: str) -> UsageError:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"]) or where
    kind = first["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = "one of " + ", ".join(_keys_at(first["loc"][:-1]))
        return UsageError(f"{where}: {location}", given="an unknown key", allowed=allowed)
    if kind in ("missing", "missing_argument"):
        return UsageError(f"{where}: {location}", given="nothing", allowed="a value: this key is required")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return UsageError(f"{where}: {location}", given=repr(first["input"]), allowed=message)


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the dataclass that lies at ``location`` inside a Study."""
    here: Any = Study
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
