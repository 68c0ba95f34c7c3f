"""The methods by name, and the settings of each (see ``settings.py``). Imports no torch: help and study.yaml use it.

Each method's own file explains its settings: ``minitron-width`` is in ``minitron_width.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_prune.errors import UsageError
from megatron_prune.settings import Settings, setting, unknown_key
from megatron_prune.verbs.shared import (
    ALLOCATIONS,
    LearningSettings,
    least_kept_setting,
    owl_bound_setting,
    owl_threshold_setting,
    search_generations_setting,
)

METRICS = ("acc", "acc_norm")  # of a multiple-choice task
ONE_METHOD = "settings of one method (of minitron-width, where the help names no other)"
AXES = {
    "depth": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_query_groups",
}


@dataclass(frozen=True, kw_only=True)
class NoOptions(Settings):
    """A method without settings of its own."""


@dataclass(frozen=True, kw_only=True)
class RandomOptions(Settings):
    TITLE = ONE_METHOD

    axis: str | None = setting(
        None,
        choices=("depth", "width"),
        help="random: what --ratio or --target-params removes: layers, or channels (no default)",
    )


@dataclass(frozen=True, kw_only=True)
class MinitronDepthOptions(Settings):
    TITLE = ONE_METHOD

    score_by: str = setting(
        "loss",
        choices=("loss", "task"),
        help="minitron-depth: what decides, the calibration loss (default) or --task-data",
    )
    task_data: str | None = setting(
        None,
        metavar="FILE.jsonl",
        help='minitron-depth: lines of {"query": text, "choices": [text, …], "gold": number}',
    )
    task_metric: str | None = setting(
        None,
        choices=METRICS,
        help="minitron-depth: the likeliest choice (acc, default), or per character",
    )


@dataclass(frozen=True, kw_only=True)
class WidthOptions(Settings):
    """Settings of minitron-width that need no training."""

    TITLE = ONE_METHOD

    include_final_norm: bool = setting(False, help="count the final norm's output in the importance of hidden channels")
    search: tuple[str, ...] | None = setting(
        None,
        choices=tuple(AXES),
        metavar="AXIS",
        help="let the loss choose among all shapes near the target that differ in these sizes",
    )
    target_shapes: tuple[str, ...] | None = setting(
        None,
        metavar="H/HEADS/FFN",
        help="in place of other targets: score these shapes, take the best",
    )
    max_candidates: int | None = setting(
        None,
        metavar="N",
        help="with --search: only the N shapes nearest to the rule compete (default: all)",
    )


@dataclass(frozen=True, kw_only=True)
class MinitronWidthOptions(WidthOptions):
    TITLE = ONE_METHOD

    retrain_candidates: int | None = setting(
        None,
        metavar="K",
        help="retrain the K best shapes before one is chosen (see retrain-candidates)",
    )
    retrain_tokens: int | None = setting(None, metavar="T", help="tokens of each of these retrainings")


@dataclass(frozen=True, kw_only=True)
class OneLineLearningOptions(LearningSettings):
    """How ``prune --hf`` learns masks, which takes no flags of Megatron."""

    TITLE = "learned masks (sheared-llama)"

    mask_weight_lr: float = setting(
        1e-4, metavar="LR", help="peak learning rate of the weights meanwhile: 10% warm-up, then cosine to a tenth"
    )
    mask_batch_size: int = setting(8, metavar="N", help="sequences per step meanwhile")


@dataclass(frozen=True, kw_only=True)
class UnitOptions(Settings):
    """Of methods that rank query groups and FFN channels (``units.py``)."""

    TITLE = ONE_METHOD

    allocation: str = setting(
        "uniform",
        choices=ALLOCATIONS,
        metavar="HOW",
        help="flap, llm-pruner, wanda-sp: uniform (default), or layers differ: owl, global, search",
    )
    least_kept: float = least_kept_setting()
    owl_threshold: float | None = owl_threshold_setting()
    owl_bound: float | None = owl_bound_setting()
    search_generations: int | None = search_generations_setting()


@dataclass(frozen=True, kw_only=True)
class WandaSpOptions(UnitOptions):
    TITLE = ONE_METHOD


@dataclass(frozen=True, kw_only=True)
class LLMPrunerOptions(UnitOptions):
    TITLE = ONE_METHOD

    taylor: str = setting(
        "first",
        choices=("vector", "first", "second", "mixed"),
        metavar="T",
        help="llm-pruner: estimate of the loss: vector, first, second or mixed",
    )
    exempt_layers: str | None = setting(
        None, metavar="0-3,31", help="llm-pruner: these layers stay whole, so that layers differ"
    )


@dataclass(frozen=True, kw_only=True)
class FlapOptions(UnitOptions):
    TITLE = ONE_METHOD

    metric: str = setting(
        "wifv",
        choices=("wifv", "ifv", "wifn"),
        metavar="M",
        help="flap: an input's score: wifv, ifv (no weights) or wifn (no mean)",
    )
    compensate: bool = setting(True, help="flap: add no biases for the mean of what is removed")


STRUCTURED: Mapping[str, type[Settings]] = {
    "flap": FlapOptions,
    "llm-pruner": LLMPrunerOptions,
    "minitron-depth": MinitronDepthOptions,
    "minitron-width": MinitronWidthOptions,
    "random": RandomOptions,
    "sheared-llama": NoOptions,
    "shortgpt": NoOptions,
    "wanda-sp": WandaSpOptions,
}
# For ``prune``, which learns masks itself, and retrains no candidates.
PRUNED: Mapping[str, type[Settings]] = {
    **STRUCTURED,
    "minitron-width": WidthOptions,
    "sheared-llama": LearningSettings,
}
# For ``prune --hf``, whose own --retrain-tokens trains the pruned model.
ONE_LINE: Mapping[str, type[Settings]] = {**PRUNED, "sheared-llama": OneLineLearningOptions}
# Structured methods whose statistics need a backward pass.
READ_GRADIENTS = ("llm-pruner",)
SPARSE: Mapping[str, type[Settings]] = {
    "magnitude": NoOptions,
    "random": NoOptions,
    "sparsegpt": NoOptions,
    "wanda": NoOptions,
}


def read[S: Settings](
    verb: type[S],
    method: str,
    values: Mapping[str, Any],
    where: str = "",
    *,
    known: Mapping[str, type[Settings]] = STRUCTURED,
) -> tuple[S, Settings]:
    """The settings of ``verb`` and those of ``method`` from one mapping, which is written at ``where``.

    ``known`` says which the verb takes; those that leave some out are read as the method's whole settings.

    UsageError for an invalid value, an unknown key, or a setting that only other methods of ``known`` have.
    """
    shared, own = ([flag.name for flag in cls.flags()] for cls in (verb, known.get(method, NoOptions)))
    made = verb.read({key: value for key, value in values.items() if key.replace("-", "_") in shared}, where)
    rest = {key: value for key, value in values.items() if key.replace("-", "_") not in shared and value is not None}
    refuse_others(method, rest, where, known=known)
    for key in rest:
        if key.replace("-", "_") not in own:
            raise unknown_key(f"{where}.{key}" if where else key, key, [*shared, *own])
    both = {key: value for key, value in values.items() if key.replace("-", "_") in {*shared} & {*own}}
    return made, whole(method, known).read({**rest, **both}, where)


def whole(method: str, known: Mapping[str, type[Settings]]) -> type[Settings]:
    """The settings of ``method`` that ``known`` lists, or, if these are some of the method's own, all of its own."""
    own, taken = STRUCTURED.get(method, NoOptions), known.get(method, NoOptions)
    return own if issubclass(own, taken) else taken


def refuse_others(
    method: str, given: Iterable[str], where: str = "", *, known: Mapping[str, type[Settings]] = STRUCTURED
) -> None:
    """UsageError if one of the settings ``given`` belongs only to other methods."""
    flags = {name: {flag.name: flag.option for flag in cls.flags()} for name, cls in known.items()}
    for key in given:
        name = key.replace("-", "_")
        others = [other for other in flags if name in flags[other] and name not in flags.get(method, {})]
        if others:
            called = f"{where}.{key}" if where else flags[others[0]][name]
            raise UsageError(called, got=f"--method {method}", expected=f"--method {' or '.join(others)} with it")
