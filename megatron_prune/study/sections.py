"""The sections of study.yaml as frozen dataclasses; ``schema.StudyConfig`` combines them."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from megatron_prune.errors import UsageError
from megatron_prune.evaluation import suites
from megatron_prune.masks.pattern import Pattern
from megatron_prune.study.values import (
    CHOSEN,
    STRICT,
    Blend,
    Compare,
    Flags,
    Fraction,
    Label,
    Names,
    PatternText,
    Positive,
    Rate,
    Share,
    Tokens,
    finds,
)

CORPORA = ("validation", "test")  # the keys of ``data`` whose text is held out; test decides


@dataclass(frozen=True, config=STRICT)
class TokenizerSection:
    """Megatron's names for the tokenizer that the corpora were tokenized with."""

    type: str
    model: str


@dataclass(frozen=True, config=STRICT)
class Data:
    """One stream of training tokens, and corpora that no stage trains on.

    ``max_near_duplicates``: share of a held-out corpus's documents that may have a near-duplicate in another stage's
    corpus; not checked by default (it takes about 0.1 µs per training token).
    """

    train: Blend
    calibration: str
    validation: str
    test: str
    seq_length: Positive
    tokenizer: TokenizerSection | None = None
    stream_seed: int = 1
    epochs: Positive = 1
    max_near_duplicates: float | None = None

    @finds
    def __post_init__(self) -> None:
        training = {os.path.abspath(prefix) for _, prefix in self.train}
        for name in ("calibration", "validation", "test"):
            if os.path.abspath(getattr(self, name)) in training:
                raise UsageError(
                    f"data.{name}",
                    got=getattr(self, name),
                    expected="a corpus that is not in data.train",
                    why="no stage may train on it",
                )
        if len({weight is None for weight, _ in self.train}) > 1:
            raise UsageError("data.train", got="weights for some", expected="a weight for every prefix, or for none")

    @property
    def blend(self) -> list[str]:
        """The words for Megatron's ``--data-path``: prefixes, or weights and prefixes in turn."""
        return [
            word for weight, prefix in self.train for word in ([] if weight is None else [f"{weight:g}"]) + [prefix]
        ]


@dataclass(frozen=True, config=STRICT)
class PretrainSection:
    """A parent trained here: its tokens and Megatron flags, including its shape unless ``parent.shape`` has it.

    ``seed`` must not be one of the study's, since masks fit the parent's initial weights. ``lr`` defaults to the
    recipe's; it is required if the recipe has several.
    """

    tokens: Tokens
    arguments: Flags = dataclasses.field(default_factory=dict)
    seed: PositiveInt = 1234
    lr: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True, config=STRICT)
class Parent:
    """Exactly one of: trained here, a checkpoint, or a Hugging Face directory.

    ``declared_tokens``: tokens that a parent from elsewhere was trained on before any accounted training.
    ``declared_unseen``: why it has not seen the study's text, if no account shows that; the report prints it.
    ``equal_total: run`` requests a scratch run on as many tokens as the parent's; otherwise that arm is not run.

    ``shape``: Megatron flags for its size, or a Hugging Face ``config.json``: a file, a directory, or the name of a
    model whose config is in the local cache. A parent trained here is made by these flags; for others ``study plan``
    uses them while the parent does not exist. ``planned_tokens``: for ``study plan``, how many tokens another study
    will train a checkpoint on, on the same stream.
    """

    pretrain: PretrainSection | None = None
    load: str | None = None
    import_hf: str | None = None
    shape: Flags | str | None = None
    planned_tokens: Tokens | None = None
    declared_tokens: Tokens | None = None
    declared_unseen: Annotated[str, Field(min_length=1)] | None = None
    equal_total: Literal["run", "skip"] = "skip"

    @finds
    def __post_init__(self) -> None:
        given = [name for name in ("pretrain", "load", "import_hf") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                "parent",
                got=" and ".join(given) or "none of them",
                expected="exactly one of pretrain, load and import_hf",
            )
        if self.pretrain and (self.declared_tokens or self.declared_unseen or self.equal_total == "run"):
            raise UsageError(
                "parent.declared_tokens, parent.declared_unseen, parent.equal_total",
                got="parent.pretrain",
                expected="parent.load or parent.import_hf with them",
                why="a parent that is trained here has an account",
            )
        if self.pretrain and isinstance(self.shape, str):
            raise UsageError(
                "parent.shape", got=self.shape, expected="Megatron flags with parent.pretrain",
                why="the parent is trained by them",
            )  # fmt: skip
        if self.planned_tokens and not self.load:
            raise UsageError(
                "parent.planned_tokens", got=self.planned_tokens, expected="no such key without parent.load"
            )
        if self.equal_total == "run" and not self.pretrain and not self.declared_tokens and not self.load:
            raise UsageError(
                "parent.equal_total",
                got="run",
                expected="skip",
                why="the parent's tokens are unknown",
                do="give parent.declared_tokens to run it",
            )

    @property
    def flags(self) -> dict[str, Any]:
        """The Megatron flags of a parent trained here, in addition to the recipe's."""
        shape = self.shape if isinstance(self.shape, dict) else {}
        return shape | (self.pretrain.arguments if self.pretrain else {})


@dataclass(frozen=True, config=STRICT)
class DynamicBatch:
    """Dynamic batch loading (Sheared-LLaMA) in the compared runs, over the corpora of ``data.train``: every ``every``
    steps their proportions change by the loss on ``validation`` over ``references``, one of each for every corpus.

    ``references``: numbers, or a file as for ``pretrain --reference-losses``. ``samples``: of each validation corpus.
    ``scratch: follow``: at equal training the scratch run reads what the pruned one has read, step by step; ``own``: it
    has its own proportions, by its own losses, as it always has in other settings.
    """

    every: Positive
    validation: list[str]
    references: list[Annotated[float, Field(ge=0)]] | str
    samples: Positive = 500
    scratch: Literal["follow", "own"] = "follow"

    @property
    def flags(self) -> dict[str, Any]:
        """For ``pretrain``."""
        return {
            "dynamic-batch-every": self.every,
            "domain-validation": self.validation,
            "reference-losses": self.references,
            "domain-samples": self.samples,
        }

    def check(self, data: Data, rates: int) -> None:
        """UsageError if the study's corpora or rates do not fit."""
        where = "recipe.dynamic_batch"
        check_domains(data, where, validation=self.validation, references=self.references)
        if rates > 1 and self.scratch == "follow":
            raise UsageError(
                f"{where}.scratch", got="follow with several recipe.lr", expected="own",
                why="each arm chooses its own rate, and the schedule to follow would be another run's",
            )  # fmt: skip


def check_domains(data: Data, where: str, **entries: Any) -> None:
    """UsageError unless there are several corpora to train on, and each of ``entries`` has a value for each of them.
    References may be the name of a file."""
    corpora = len(data.train)
    if corpora < 2 or data.epochs > 1:
        raise UsageError(
            where, got=f"{corpora} corpora in data.train and data.epochs {data.epochs}",
            expected="it with at least two corpora and one epoch",
            why="it changes their proportions, and reads every sample once",
        )  # fmt: skip
    for key, value in entries.items():
        count = len(value) if isinstance(value, list) else 0
        if count != corpora and not (isinstance(value, str) and key.startswith("reference")):
            raise UsageError(
                f"{where}.{key}", got=count, expected=f"{corpora} entries, one for each corpus of data.train"
            )


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """One training recipe for every arm. Warm-up and cosine horizon are fractions of each run's own steps; the warm-up
    has at most ``warmup_at_most`` steps.

    Several ``lr`` are a sweep: every arm is trained at each of them, and the one with the lowest validation loss (mean
    over the seeds) is the arm's result.
    """

    lr: Rate
    global_batch_size: Positive
    micro_batch_size: Positive
    min_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    warmup_at_most: Positive | None = None  # steps
    save_interval: Positive | None = None  # steps; None: at the end only
    arguments: Flags = dataclasses.field(default_factory=dict)
    dynamic_batch: DynamicBatch | None = None

    def warmup_iters(self, steps: int) -> int:
        """Warm-up steps given to a run of ``steps``; 0 if it is given the fraction."""
        if self.warmup_at_most is None:
            return 0
        return min(round(self.warmup_fraction * steps), self.warmup_at_most)

    @property
    def rates(self) -> list[float]:
        """All learning rates of an arm."""
        return self.lr if isinstance(self.lr, list) else [self.lr]


@dataclass(frozen=True, config=STRICT)
class Link:
    """One pruning of a chain: a method and its amount: a ratio, a target or an N:M pattern.

    ``tokens``: those that its masks are learned on, if it learns masks. ``retrain``: tokens that the result is trained
    on, with the recipe, before the next link.
    """

    name: str
    pattern: PatternText | None = None
    ratio: Fraction | None = None
    settings: Flags = dataclasses.field(default_factory=dict)
    target: Flags = dataclasses.field(default_factory=dict)
    label: str | None = None
    tokens: Tokens | None = None
    retrain: Tokens | None = None

    @finds
    def __post_init__(self) -> None:
        says = [self.ratio is not None, bool(self.target), self.method().own_ratio is not None]
        if sum(says) != 1:
            raise UsageError(
                f"methods.chain.{self.method().tag}",
                got="nothing that says how much" if not any(says) else "more than one of them",
                expected="exactly one of ratio, target and an N:M pattern",
                why="a chain runs once, not at each of the study's ratios",
            )

    def method(self) -> MethodSection:
        """This link as a method."""
        return MethodSection(self.name, self.pattern, self.settings, self.target, self.label, tokens=self.tokens)

    def words(self, *, pattern: bool) -> str:
        """``minitron-depth 25%``, ``sparsegpt 2:4``"""
        shown = f" {self.pattern}" if pattern and self.pattern else ""
        trained = f" + {self.retrain:,} tokens" if self.retrain else ""
        return f"{self.label or self.name}{shown}" + (f" {100 * self.ratio:g}%" if self.ratio else "") + trained

    @property
    def tag(self) -> str:
        """Its name in cells, including the retraining after it."""
        return self.method().tag + (f"-t{self.retrain}" if self.retrain else "")


@dataclass(frozen=True, config=STRICT)
class MethodSection:
    """A pruning method by name, its settings as flags of ``plan``, and optionally an explicit shape.

    With a ``pattern`` it is sparse, and its settings are flags of ``sparsify``. A method whose masks are learned trains
    them on ``tokens``, and its settings are flags of ``learn-masks`` too. A ``chain`` of successive
    prunings replaces all of these.
    """

    name: str = ""
    pattern: PatternText | None = None  # unstructured or N:M, for a sparse method
    settings: Flags = dataclasses.field(default_factory=dict)
    target: Flags = dataclasses.field(default_factory=dict)
    label: str | None = None  # name in cells and rows; required if a method occurs twice
    compare: Compare | None = None  # None: all of the study's settings
    chain: list[Link] = dataclasses.field(default_factory=list)
    tokens: Tokens | None = None  # that masks are learned on (sheared-llama)

    @finds
    def __post_init__(self) -> None:
        where = f"methods.{self.tag}"
        if bool(self.name) == bool(self.chain) or len(self.chain) == 1:
            raise UsageError(where or "methods", got=f"name {self.name!r} and {len(self.chain)} links of a chain",
                             expected="either a name, or a chain of at least two prunings")  # fmt: skip
        if self.chain and (self.pattern or self.settings or self.target or self.tokens):
            raise UsageError(where, got="them beside a chain",
                             expected="pattern, settings, target and tokens in the links of the chain")  # fmt: skip
        sparse = [number for number, link in enumerate(self.chain) if link.pattern]
        if sparse and any(link.tokens for link in self.chain[sparse[0] + 1 :]):
            raise UsageError(
                f"{where}.chain", got=f"masks learned after {self.chain[sparse[0]].tag}",
                expected="learned masks before sparse ones",
                why="the training that learns masks would fill the zeros of an earlier link",
            )  # fmt: skip
        if self.chain and self.chain[-1].retrain:
            raise UsageError(
                f"{where}.chain.retrain", got=f"{self.chain[-1].retrain} after the last link",
                expected="tokens between two links", why="the budgets say how long the last one is trained",
            )  # fmt: skip
        for flag in self.settings:
            if flag in CHOSEN:
                raise UsageError(
                    f"{where}.settings.{flag}", got="it", expected="flags that no other key of the study sets"
                )
        if self.pattern and self.target:
            raise UsageError(
                f"{where}.target",
                got="both",
                expected="either a pattern or a target",
                why="sparse pruning leaves the shape as it is",
            )
        if not self.sparse and any(self.compare.values() if self.compare else ()):
            raise UsageError(
                f"{where}.compare",
                got="kinds of scratch runs",
                expected="settings alone for a method without a pattern",
                why="the scratch run of a smaller shape is always dense",
            )

    @property
    def title(self) -> str:
        """Its name in rows, next to the pattern; a chain is named by its links."""
        links = [link.words(pattern=link is not self.chain[-1]) for link in self.chain]
        return self.label or self.name or " + ".join(links)

    @property
    def last_pattern(self) -> str | None:
        """The pattern shown in rows."""
        return self.chain[-1].pattern if self.chain else self.pattern

    @property
    def tag(self) -> str:
        """Its name in cells: ``wanda-2-4``; for a chain, its links joined by ``then``."""
        if self.chain and not self.label:
            return "-then-".join(link.tag for link in self.chain)
        if self.label or not self.pattern:
            return self.title
        return f"{self.name}-{self.pattern.replace(':', '-')}"

    @property
    def sparse(self) -> bool:
        """True if the result has masks."""
        return self.pattern is not None or any(link.pattern for link in self.chain)

    @property
    def own_ratio(self) -> float | None:
        """The fraction that an N:M pattern removes; None if the study's ratios apply."""
        return Pattern.parse(self.pattern).ratio if self.pattern else None


@dataclass(frozen=True, config=STRICT)
class CalibrationSection:
    """The number of windows of ``data.calibration`` for statistics; ``random`` draws them with the seed."""

    sequences: Positive = 128
    seq_length: Positive | None = None  # None: data.seq_length
    sampling: Literal["sequential", "random"] = "random"


@dataclass(frozen=True, config=STRICT)
class EvaluationSection:
    """What every arm, the parent and the starts before retraining are scored on, in one load of each model.

    ``windows`` fixed windows of ``data.validation``, of ``data.test``, on which verdicts are based, and of each of
    ``corpora``: further tokenized text, by labels. ``tasks``: suites (``paper-zero-shot``, or one of ``suites``),
    tasks, groups and tags of lm-eval, and those of the YAML files in ``tasks_path``; ``few_shot`` examples before each
    question (none: the task's own number), and the first ``limit`` questions of each. ``suites``: more suites, each a
    mapping of tasks to the metric that counts.

    ``max_contaminated``: share of a task's questions that may have 13 tokens in a row in the training or calibration
    text; ``null`` looks for none (it takes about 0.1 µs per training token, once).

    ``efficiency``: measure the latency of the parent and of one model of each pruning once all cells are finished, on
    the machine that runs the study.
    """

    windows: Positive = 256
    seq_length: Positive | None = None  # None: data.seq_length
    micro_batch_size: Positive | None = None  # None: the recipe's
    corpora: dict[Label, str] = dataclasses.field(default_factory=dict)
    tasks: Names = dataclasses.field(default_factory=list)
    tasks_path: str | None = None
    few_shot: Annotated[int, Field(ge=0)] | None = None
    limit: Positive | None = None
    suites: dict[Label, dict[str, str]] = dataclasses.field(default_factory=dict)
    max_contaminated: Share | None = 0.0
    efficiency: bool = False

    @finds
    def __post_init__(self) -> None:
        for label in self.corpora:
            if label in CORPORA:
                raise UsageError(
                    f"evaluation.corpora.{label}", got=label, expected="another label",
                    why=f"data.{label} is scored already",
                )  # fmt: skip
        if not self.tasks:
            for key in ("tasks_path", "few_shot", "limit", "suites"):
                if getattr(self, key):
                    raise UsageError(f"evaluation.{key}", got="it alone", expected="evaluation.tasks with it")
        for name, metrics in self.suites.items():
            if not metrics or name in suites.known():
                raise UsageError(
                    f"evaluation.suites.{name}", got="a name of the package" if metrics else "no tasks",
                    expected="tasks with the metric of each, under a name of its own",
                )  # fmt: skip
        for name in self.tasks:
            suite = suites.known().get(name)
            if suite is None:
                continue
            if not suite.tasks:
                raise UsageError(
                    "evaluation.tasks", got=f"{name}, a suite of corpora", expected="suites of tasks",
                    do=f"megatron-prune prepare-suite {name}, and name its files in evaluation.corpora",
                )  # fmt: skip
            if suite.few_shot is not None and self.few_shot not in (None, suite.few_shot):
                raise UsageError("evaluation.few_shot", got=self.few_shot, expected=f"{suite.few_shot} with {name}")

    @property
    def lm_eval_tasks(self) -> list[str]:
        """The names that lm-eval knows, each once."""
        return suites.tasks_of(self.tasks, self.suites)
