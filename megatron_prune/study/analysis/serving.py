"""What each model of a study costs to run: from its shape and masks, and as measured, if it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from megatron_prune import artifacts
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.evaluation import efficiency
from megatron_prune.study.prunings import Places
from megatron_prune.study.schema import StudyConfig
from megatron_prune.untrusted import check

MEASURED = "efficiency.json"  # in the study's folder: what `benchmark` wrote
COSTS = ("flops_forward", "flops_forward_kept", "weight_bytes", "weight_bytes_packed", "cache_bytes_per_token")
TIMES = (
    "prefill_seconds",
    "decode_seconds",
    "decode_tokens_per_second",
    "decode_seconds_2_4",
    "decode_seconds_fp8_2_4",
)
_SPARSE = {"decode_seconds_2_4": "2:4", "decode_seconds_fp8_2_4": "fp8 2:4"}  # kinds of kernels in what was measured


def costs(
    study: StudyConfig,
    shape: ModelShape | None,
    record: Mapping[str, Any] | None,
    *,
    source: ModelShape | None = None,
    removed_linears: float | None = None,
    pattern: str | None = None,
) -> dict[str, Any]:
    """The columns ``COSTS`` of a finished run of ``shape``; empty for others.

    ``removed_linears`` is the share of the linears of ``source`` that its pruning removed, in all. It counts, like the
    ``pattern``, if the run trained under masks, as its account says.
    """
    if shape is None or record is None:
        return {}
    removed, trained, kept = 0, record.get("flops"), record.get("flops_theoretical")
    if source is not None and removed_linears is not None and trained and kept and kept < trained:
        removed = shape.linear_parameters() - round((1 - removed_linears) * source.linear_parameters())
    packable = 2 * removed if pattern == efficiency.PACKED else 0
    half = study.recipe.arguments.get("bf16") or study.recipe.arguments.get("fp16")
    found = efficiency.cost(shape, 2 if half else 4, removed=removed, packable=packable)
    values = (found.flops, found.flops_kept, found.weight_bytes, found.weight_bytes_packed, found.cache_bytes)
    return dict(zip(COSTS, values, strict=True))


class _Times(TypedDict):
    seconds: float
    tokens_per_second: float


class _Measured(TypedDict, total=False):
    prefill: _Times
    decode: _Times


class _MeasuredModel(TypedDict):
    fingerprint: str
    measured: NotRequired[dict[str, _Measured]]


class _Efficiency(TypedDict):
    models: list[_MeasuredModel]


def times(places: Places) -> dict[str, dict[str, Any]]:
    """The columns ``TIMES`` of the models that were measured, by the fingerprint of their weights; without those of
    sparse kernels that did not run."""
    path = places.root / MEASURED
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    for model in check(_Efficiency, artifacts.read_json(path), str(path))["models"]:
        measured = model.get("measured", {})
        dense = measured.get("dense", {})
        if "prefill" in dense and "decode" in dense:
            values = (dense["prefill"]["seconds"], dense["decode"]["seconds"], dense["decode"]["tokens_per_second"])
            own = {key: measured.get(kind, {}).get("decode") for key, kind in _SPARSE.items()}
            sparse = {key: times["seconds"] for key, times in own.items() if times is not None}
            found[model["fingerprint"]] = dict(zip(TIMES, values, strict=False)) | sparse
    return found
