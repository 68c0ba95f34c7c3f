"""study.yaml as frozen dataclasses: what a study is, read strictly and refused early.

Every key is known or refused by name; every number is checked where it is read. ``load`` gives a
``Study`` whose defaults are filled in; ``resolved`` gives it back as JSON for the run's folder.
Paths are relative to the directory that the command is called from, as Megatron's are.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_prune.errors import UsageError
from megatron_prune.study.values import RESERVED, STRICT, Blend, Flags, Fraction, Positive, Setting, Tokens


@dataclass(frozen=True, config=STRICT)
class Launch:
    """How runs are put on this machine: processes of one run, and runs at a time."""

    launcher: Literal["local"] = "local"
    nproc: Positive = 1
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    parallel_cells: Positive = 1
    threads: Positive | None = None  # CPU threads of a process; None: the cores, shared evenly

    def __post_init__(self) -> None:
        if self.nproc % (self.tensor_parallel * self.pipeline_parallel):
            raise UsageError(
                "launch.nproc",
                given=self.nproc,
                allowed=f"a multiple of tensor_parallel x pipeline_parallel = "
                f"{self.tensor_parallel * self.pipeline_parallel}",
            )

    @property
    def data_parallel(self) -> int:
        return self.nproc // (self.tensor_parallel * self.pipeline_parallel)

    def threads_per_process(self, cells: int) -> int:
        """Threads for each process while up to ``cells`` runs share the machine."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // (cells * self.nproc))


@dataclass(frozen=True, config=STRICT)
class Tokenizer:
    """Megatron's names for the tokenizer that the corpora were tokenized with."""

    type: str
    model: str


@dataclass(frozen=True, config=STRICT)
class Data:
    """One stream of training tokens, and corpora that no stage trains on.

    ``max_near_duplicates``: share of a held-out corpus's documents that may nearly be in another stage's
    corpus; not looked for when it is not given (it takes about 0.1 µs a training token).
    """

    train: Blend
    calibration: str
    validation: str
    test: str
    seq_length: Positive
    tokenizer: Tokenizer | None = None
    stream_seed: int = 1
    epochs: Positive = 1
    max_near_duplicates: float | None = None

    def __post_init__(self) -> None:
        training = {os.path.abspath(prefix) for _, prefix in self.train}
        for name in ("calibration", "validation", "test"):
            if os.path.abspath(getattr(self, name)) in training:
                raise UsageError(
                    f"data.{name}",
                    given=getattr(self, name),
                    allowed="a corpus that is not in data.train",
                    why="no stage may train on it",
                )
        if len({weight is None for weight, _ in self.train}) > 1:
            raise UsageError("data.train", given="weights for some", allowed="a weight for every prefix or for none")

    @property
    def blend(self) -> list[str]:
        """What Megatron's ``--data-path`` takes: prefixes, or weights and prefixes in turn."""
        return [
            word for weight, prefix in self.train for word in ([] if weight is None else [f"{weight:g}"]) + [prefix]
        ]


@dataclass(frozen=True, config=STRICT)
class Pretrain:
    """A parent trained here: its shape as Megatron flags, and its tokens."""

    tokens: Tokens
    arguments: Flags
    seed: int = 1


@dataclass(frozen=True, config=STRICT)
class Parent:
    """Exactly one of: trained here, a checkpoint, or a Hugging Face directory.

    ``declared_tokens`` is what an outside parent says that it was trained on. ``equal_total: run``
    says that a scratch run on that many tokens is wanted and feasible; otherwise that arm is not run.
    """

    pretrain: Pretrain | None = None
    load: str | None = None
    import_hf: str | None = None
    declared_tokens: Tokens | None = None
    equal_total: Literal["run", "skip"] = "skip"

    def __post_init__(self) -> None:
        given = [name for name in ("pretrain", "load", "import_hf") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                "parent",
                given=" and ".join(given) or "none of them",
                allowed="exactly one of pretrain, load, import_hf",
            )
        if self.pretrain and (self.declared_tokens or self.equal_total == "run"):
            raise UsageError(
                "parent.declared_tokens, parent.equal_total",
                given="beside parent.pretrain",
                allowed="only with load or import_hf",
                why="a parent trained here is accounted",
            )
        if self.equal_total == "run" and not self.pretrain and not self.declared_tokens and not self.load:
            raise UsageError(
                "parent.equal_total",
                given="run",
                allowed="skip, or give parent.declared_tokens",
                why="the parent's tokens are unknown",
            )


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One training recipe for every arm. Warmup and cosine horizon are fractions of each run's own steps."""

    lr: Annotated[float, Field(gt=0)]
    global_batch_size: Positive
    micro_batch_size: Positive
    min_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    save_interval: Positive | None = None  # steps; None: at the end only
    arguments: Flags = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Method:
    """A pruning method by its name, its settings as flags of ``plan``, and perhaps an explicit shape."""

    name: str
    settings: Flags = dataclasses.field(default_factory=dict)
    target: Flags = dataclasses.field(default_factory=dict)
    label: str | None = None  # how cells and rows call it; needed when a method comes twice

    @property
    def tag(self) -> str:
        return self.label or self.name


@dataclass(frozen=True, config=STRICT)
class Calibration:
    """How many windows of ``data.calibration`` the statistics see. ``random`` draws them by the seed."""

    sequences: Positive = 128
    seq_length: Positive | None = None  # None: data.seq_length
    sampling: Literal["sequential", "random"] = "random"


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """Fixed windows of validation and test text that verdicts rest on."""

    windows: Positive = 256
    seq_length: Positive | None = None  # None: data.seq_length
    micro_batch_size: Positive | None = None  # None: the recipe's


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
    settings: Annotated[list[Setting], Field(min_length=1)] = dataclasses.field(
        default_factory=lambda: ["equal-training", "equal-total"]
    )
    seeds: Annotated[list[int], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [1])
    launch: Launch = dataclasses.field(default_factory=Launch)
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)

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
        for what in ("budgets", "ratios", "settings", "seeds"):
            values = getattr(self, what)
            if len(set(values)) != len(values):
                raise UsageError(what, given=values, allowed="different values")
        tags = [method.tag for method in self.methods]
        for tag in tags:
            if tags.count(tag) > 1:
                raise UsageError("methods", given=f"{tag} twice", allowed="a label for each of them")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag):
                raise UsageError("methods", given=tag, allowed="labels of letters, digits, dots and dashes")
        if not self.ratios and not all(method.target for method in self.methods):
            raise UsageError("ratios", given="none", allowed="at least one ratio, or a target for every method")

    @property
    def evaluation_seq_length(self) -> int:
        return self.evaluation.seq_length or self.data.seq_length

    @property
    def calibration_seq_length(self) -> int:
        return self.calibration.seq_length or self.data.seq_length


def load(path: str | Path) -> Study:
    """Read a study.yaml; UsageError names the key that is wrong and what is allowed there."""
    path = Path(path)
    if not path.is_file():
        raise UsageError("STUDY.yaml", given=path, allowed="an existing file")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError("STUDY.yaml", given=path, allowed="valid YAML", why=str(error)) from error
    return from_mapping(content, where=str(path))


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
    return TypeAdapter(Study).dump_python(study, mode="json")


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
