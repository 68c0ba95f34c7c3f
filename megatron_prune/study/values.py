"""Value types of study.yaml: numbers of tokens, Megatron flags, blends.

Each is a type that pydantic reads strictly; alternative notations are normalised here.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.masks.pattern import Pattern
from megatron_prune.settings import count

# What both arms share: the samples after pruning, all tokens, or all executed FLOPs.
Setting = Literal["equal-training", "equal-total", "equal-flops"]
# The scratch model that a pruned one is compared with: a dense one of its shape, or one under its masks.
Scratch = Literal["dense", "masked"]
# Checkpoints kept after a run: every save, its last one, or (once its line is in the ledger) none.
Retention = Literal["all", "final", "none"]
# What a pruning removes: layers, channels and heads, or single weights.
Granularity = Literal["depth", "width", "sparse"]
GRANULARITIES: tuple[Granularity, ...] = ("depth", "width", "sparse")
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class ValueProblem(ValueError):
    """Our own error, in a form that pydantic collects with others."""

    def __init__(self, error: MegatronPruneError):
        self.error = error
        self.key = str(getattr(error, "flag", "") or str(error).partition(":")[0])
        super().__init__(str(error))


def finds[T](check: Callable[[T], None]) -> Callable[[T], None]:
    """Wrap a section's ``__post_init__`` so that pydantic continues with other sections after an error."""

    @functools.wraps(check)
    def kept(section: T) -> None:
        try:
            check(section)
        except ValidationError as error:  # from a section that this one creates
            found = error.errors()[0].get("ctx", {}).get("error")
            raise (found if isinstance(found, ValueProblem) else error) from error
        except MegatronPruneError as error:
            raise ValueProblem(error) from error

    return kept


# Set by the study for every run; a recipe that set one would make the arms differ.
RESERVED = (
    "load",
    "save",
    "pretrained-checkpoint",
    "shape-from",
    "masks",
    "random-masks",
    "finetune",
    "use-checkpoint-args",
    "data-path",
    "train-data-path",
    "data-cache-path",
    "stream-seed",
    "stream-range",
    "stream-epochs",
    "stream-permutation-seed",
    "dynamic-batch-every",
    "domain-validation",
    "reference-losses",
    "domain-samples",
    "batch-schedule",
    "objective",
    "teacher",
    "teacher-cache",
    "distill-alpha",
    "distill-temperature",
    "distill-kl",
    "distill-hidden-states",
    "distill-hidden-weight",
    "seed",
    "seq-length",
    "global-batch-size",
    "micro-batch-size",
    "train-iters",
    "train-samples",
    "lr",
    "min-lr",
    "lr-warmup-iters",
    "lr-warmup-samples",
    "lr-warmup-fraction",
    "lr-decay-iters",
    "lr-decay-samples",
    "lr-decay-style",
    "save-interval",
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "tensorboard-dir",
    "wandb-project",
    "wandb-entity",
    "wandb-exp-name",
    "wandb-save-dir",
)
# Set by other keys of a method than its settings.
CHOSEN = ("method", "pattern", "ratio", "ratio-of")


def parse_tokens(value: Any) -> Any:
    """``410_000``, ``"410k"``, ``"1.5M"``, ``"50B"``, ``"1e9"`` → a whole number of tokens."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite number of tokens")
    return count(value) if isinstance(value, str) else round(value) if isinstance(value, float) else value


_STEPS = re.compile(r"\s*([0-9][0-9_]*) steps?\s*")


def steps_in_tokens(content: dict[str, Any]) -> dict[str, Any]:
    """A study.yaml in which budgets like ``12_500 steps`` are tokens: steps times the recipe's batch in tokens.

    Without a valid batch they stay as they are, since that is the error to report.
    """

    def number(section: str, key: str) -> int:
        value = (found if isinstance(found := content.get(section), dict) else {}).get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    batch = number("recipe", "global_batch_size") * number("data", "seq_length")

    def tokens(section: Any) -> Any:
        if not batch or not isinstance(section, dict) or not isinstance(section.get("budgets"), list):
            return section
        found = [_STEPS.fullmatch(one) if isinstance(one, str) else None for one in section["budgets"]]
        budgets = [int(step[1].replace("_", "")) * batch if step else one
                   for step, one in zip(found, section["budgets"], strict=True)]  # fmt: skip
        return {**section, "budgets": budgets}

    made: dict[str, Any] = tokens(content)
    return made | {key: tokens(made[key]) for key in ("family", "distill") if key in made}


def _flags(value: Any) -> Any:
    """Keys of Megatron flags, written with underscores or dashes → with dashes."""
    if not isinstance(value, dict):
        return value
    return {str(key).lstrip("-").replace("_", "-"): item for key, item in value.items()}


def _blend(value: Any) -> Any:
    """``prefix``, ``[prefix, …]`` or ``[[weight, prefix], …]`` → the last form; None means no weight."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return [[None, item] if isinstance(item, str) else item for item in value]
    return value


def _pattern(value: Any) -> Any:
    """``unstructured`` or ``N:M``; YAML 1.1 reads an unquoted 2:4 as minutes and seconds, 124."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value // 60}:{value % 60}"
    try:
        return str(Pattern.parse(str(value)))
    except UsageError as error:
        raise ValueError(error.expected) from error


def _rates(value: Any) -> float | list[float]:
    """``1e-3`` (possibly as text, as YAML reads it) or ``[1e-3, 2e-3]`` → numbers."""
    try:
        rates = [float(rate) for rate in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError) as error:
        raise ValueError("a number, or a list of them") from error
    if not all(0 < rate < float("inf") for rate in rates):
        raise ValueError("greater than 0")
    if isinstance(value, list) and len(rates) < 2:
        raise ValueError("at least 2 of them, or a number alone")
    return different(rates) if isinstance(value, list) else rates[0]


def different(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise ValueError("different values")
    return values


def _compare(value: Any) -> Any:
    """``[equal-total]`` or ``{equal-total: [masked, dense]}`` → the last form; None means the study's ``scratch``."""
    if isinstance(value, list):
        return dict.fromkeys(different(value))
    return value


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]
Scalar = bool | int | float | str
Flags = Annotated[dict[str, Scalar | list[Scalar] | None], BeforeValidator(_flags)]
Weight = Annotated[float, Field(gt=0)]
Blend = Annotated[list[tuple[Weight | None, str]], BeforeValidator(_blend), Field(min_length=1)]
Rate = Annotated[float | list[float], PlainValidator(_rates)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Names = Annotated[list[str], AfterValidator(different)]
PatternText = Annotated[str, BeforeValidator(_pattern)]
Settings = Annotated[list[Setting], Field(min_length=1), AfterValidator(different)]
Scratches = Annotated[list[Scratch], Field(min_length=1), AfterValidator(different)]
Compare = Annotated[dict[Setting, Scratches | None], BeforeValidator(_compare), Field(min_length=1)]
