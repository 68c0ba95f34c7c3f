"""The question: the parent, the amount to remove, and the token budget.

``tokens`` are those of training after the parent: of retraining, and before it of learning masks, for a method that
learns them. Scratch gets as many (equal training), or the parent's as well (equal total), as in studies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.config import args_of
from megatron_prune.errors import UsageError
from megatron_prune.masks.pattern import Pattern
from megatron_prune.methods.base import DIMENSIONS
from megatron_prune.structured.target import flag_of
from megatron_prune.training import lineage

LETTERS = {"L": "num_layers", "h": "hidden_size", "H": "num_attention_heads", "G": "num_query_groups",
           "d": "kv_channels", "F": "ffn_hidden_size"}  # fmt: skip
SETTINGS = ("equal-training", "equal-total", "equal-flops")


@dataclass(frozen=True)
class AdvisedTarget:
    """``ratio`` is the fraction to remove of the blocks' linear weights or of all parameters (``ratio_of``)."""

    ratio: float
    ratio_of: str
    setting: str
    tokens: float | None = None
    flops: float | None = None  # of training, if the budget is in GPU-hours
    pattern: str | None = None
    method: str | None = None
    parent_params: int | None = None
    parent_tokens: int | None = None
    cuts: frozenset[str] | None = None  # the sizes that an explicit shape cuts
    parent_shape: ModelShape | None = None
    served: float | None = None  # tokens that the model will be served for

    def budget(self, flops_per_token: float, learned: float = 0, learned_flops: float = 0) -> float:
        """Tokens of retraining for a model with this number of FLOPs per token, after its masks were learned on as many
        tokens and FLOPs."""
        if self.tokens is not None:
            return self.tokens - learned
        return (cast(float, self.flops) - learned_flops) / flops_per_token

    def same_cuts(self, shape: str) -> bool:
        """Whether a pruned shape (a tag) is cut in the same sizes as the requested one."""
        if self.cuts is None or self.parent_shape is None:
            return True
        if "v" in shape:  # its layers differ, which an explicit shape cannot ask for
            return False
        sizes = {LETTERS[letter]: int(size) for letter, size in re.findall(r"([LhHGdF])(\d+)", shape)}
        return self.cuts == {field for field, size in sizes.items() if size != getattr(self.parent_shape, field)}

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "ratio_of": self.ratio_of,
            "setting": self.setting,
            "tokens": self.tokens,
            "flops": self.flops,
            "pattern": self.pattern,
            "method": self.method,
            "parent_params": self.parent_params,
            "parent_tokens": self.parent_tokens,
            "cuts": None if self.cuts is None else sorted(self.cuts),
            "served": self.served,
        }


def from_settings(options: verbs.AdviseSettings, parent_params: int) -> AdvisedTarget:
    """The target that settings describe; ``parent_params`` are the ledger's parent's."""
    said = {"--parent": options.parent, "--hf": options.hf, "--parent-params": options.parent_params}
    if len(given := [flag for flag, value in said.items() if value is not None]) > 1:
        raise UsageError(", ".join(given), got=" and ".join(given), expected="at most one of them")
    shape = open_checkpoint(options.parent).shape if options.parent else None
    if options.hf is not None:
        shape = ModelShape.from_args(args_of(options.hf))
    sizes = {field: size for field in DIMENSIONS if (size := getattr(options, "target_" + field)) is not None}
    _refuse_another_granularity(options, sizes)
    pattern = str(Pattern.parse(options.pattern)) if options.pattern else None
    own = Pattern.parse(pattern).ratio if pattern else None
    params = shape.parameters() if shape else options.parent_params
    ratio, ratio_of = _ratio(options, sizes, shape, params or parent_params, own)
    tokens, flops = _budget(options)
    trained = _trained_on(Path(options.parent)) if options.parent else None
    return AdvisedTarget(
        ratio, ratio_of, options.setting, tokens, flops, pattern, options.method, params,
        options.parent_tokens or trained,
        frozenset(sizes) if sizes else None, shape, options.served_tokens,
    )  # fmt: skip


def _refuse_another_granularity(options: verbs.AdviseSettings, sizes: Mapping[str, int]) -> None:
    """UsageError if ``--method`` is one of ours and cannot cut what is to be cut."""
    if options.method not in (*methods.names(), *methods.sparse_names()):
        return  # a label of a study
    can = methods.get(options.method).dimensions if options.method in methods.names() else ()
    if options.pattern and options.method not in methods.sparse_names():
        raise UsageError(
            "--pattern", got=f"--method {options.method}, which leaves a smaller shape", expected="a sparse method"
        )
    if others := [flag_of(field) for field in sizes if field not in can]:
        raise UsageError(
            ", ".join(others), got=f"--method {options.method}",
            expected="a method that cuts it" if not can else f"{', '.join(map(flag_of, can))} with it",
        )  # fmt: skip


def _ratio(
    options: verbs.AdviseSettings, sizes: Mapping[str, int], shape: ModelShape | None, params: int, own: float | None
) -> tuple[float, str]:
    ways = {
        "--ratio": options.ratio is not None,
        "--target-params": options.target_params is not None,
        "--target-<size>": bool(sizes),
        "--pattern N:M": own is not None,
    }
    given = [flag for flag, used in ways.items() if used]
    if len(given) != 1:
        allowed = "exactly one of --ratio, --target-params, explicit --target-<size> flags, or an N:M pattern"
        raise UsageError("--ratio", got=" and ".join(given) or "no target", expected=allowed)
    if options.ratio_of and options.ratio is None:
        raise UsageError("--ratio-of", got=f"{options.ratio_of} alone", expected="--ratio with it")
    if own is not None:
        return own, "linears"
    if options.ratio is not None:
        if not 0 < options.ratio < 1:
            raise UsageError("--ratio", got=options.ratio, expected="the fraction to remove, a number between 0 and 1")
        return options.ratio, options.ratio_of or "linears"
    if options.pattern:
        raise UsageError("--pattern", got=f"{options.pattern} and a smaller shape", expected="--ratio with it")
    if (target := options.target_params) is not None:
        if target >= params:
            raise UsageError(
                "--target-params", got=target, expected=f"1 to {params - 1}, less than the parent's {params}"
            )
        return 1 - target / params, "all"
    if shape is None:
        raise UsageError(
            ", ".join(flag_of(field) for field in sizes),
            got="none",
            expected="--parent CKPT or --hf HF with it",
            why="how much they remove depends on its shape",
        )
    for field, size in sizes.items():
        if not 1 <= size <= getattr(shape, field):
            raise UsageError(flag_of(field), got=size, expected=f"1 to {getattr(shape, field)}, the parent's size")
    smaller = replace(shape, **cast(dict[str, Any], dict(sizes)))
    if smaller == shape:
        raise UsageError(
            ", ".join(flag_of(field) for field in sizes), got="the parent's sizes", expected="sizes of a smaller model"
        )
    return 1 - smaller.linear_parameters() / shape.linear_parameters(), "linears"


def _budget(options: verbs.AdviseSettings) -> tuple[float | None, float | None]:
    """The budget in tokens, or in FLOPs."""
    if (options.tokens is None) == (options.gpu_hours is None):
        given = "both" if options.tokens is not None else "neither"
        raise UsageError("--tokens, --gpu-hours", got=given, expected="exactly one of them")
    if options.tokens is not None:
        if options.gpu_flops is not None:
            raise UsageError("--gpu-flops", got=f"{options.gpu_flops} alone", expected="--gpu-hours with it")
        return float(options.tokens), None
    if options.gpu_hours is None or options.gpu_flops is None or options.gpu_flops <= 0 or options.gpu_hours <= 0:
        raise UsageError(
            "--gpu-hours",
            got=options.gpu_hours,
            expected="a positive number, with --gpu-flops, such as 4e14",
            why="what an hour does depends on the GPU and the layout",
            do="estimate it with `preflight`",
        )
    return None, 3600 * options.gpu_hours * options.gpu_flops


def _trained_on(parent: Path) -> int | None:
    """The tokens of all stages behind a parent that was trained here."""
    stages = lineage.of(open_checkpoint(parent))
    return lineage.tokens(stages) if lineage.begins_at_random(stages) else None
