"""``plan.json``: which layers, hidden channels, heads and FFN channels of one parent are kept, and why.

A ``PruningPlan`` is frozen and validates itself, so any instance can be applied. It is a function of the parent's
shape, the statistics, the method's settings and the seed, and does not depend on a parallel layout. All indices are
in source numbering and ascending.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from pydantic import Field

from megatron_prune import artifacts, methods
from megatron_prune.checkpoint.kept import Kept, removed_indices
from megatron_prune.checkpoint.layout import Axis, ModelShape
from megatron_prune.errors import CheckpointError, PlanError
from megatron_prune.evaluation.latency import PredictedLatency
from megatron_prune.methods.base import Compensation, Gates, NearTie, Selection
from megatron_prune.structured.candidate import Candidate
from megatron_prune.structured.candidates import Question, uses_statistics
from megatron_prune.structured.judge import Scored, judge, spent
from megatron_prune.structured.statistics import Statistics
from megatron_prune.training.learned_file import LearnedMasks
from megatron_prune.untrusted import check

VERSION = 1


@dataclass(frozen=True)
class PruningPlan:
    """What is kept of ``parent``. See the module's docstring; fields are the keys of ``plan.json``."""

    method: str
    settings: dict[str, Any]  # the method's own flags
    seed: int | None  # None: the method draws no random numbers
    ratio: float | None  # as requested; None for explicit sizes or a parameter count
    ratio_of: str  # linears or all
    source: ModelShape
    target: ModelShape
    parent: str  # fingerprint of the checkpoint that this plan is for
    kept_layers: tuple[int, ...]
    kept_hidden: tuple[int, ...] | None = None
    kept_heads: tuple[tuple[int, ...], ...] | None = None  # one entry per kept layer
    kept_ffn: tuple[tuple[int, ...], ...] | None = None  # one entry per kept layer
    near_ties: tuple[NearTie, ...] = ()
    candidates: tuple[Scored, ...] = ()  # all that the model was run with; empty if none competed
    chosen: int | None = None  # index of this plan's candidate
    statistics: str | None = None  # hash; None: the method needs none
    calibration: dict[str, Any] | None = None  # sequences, seq_length, tokens, flops, and the calibration runs
    gates: Gates | None = None  # factors of what is kept; None: unchanged
    compensation: Compensation | None = None  # mean inputs of what is removed, for biases; None: none are added
    latency: PredictedLatency | None = None  # of the target; None: no limit of --at-most asked for it

    def __post_init__(self) -> None:
        source, target = self.source, self.target
        _ascending("kept_layers", self.kept_layers, target.num_layers, source.num_layers)
        if self.kept_hidden is not None:
            _ascending("kept_hidden", self.kept_hidden, target.hidden_size, source.hidden_size)
        wanted, given = target.by_layer(), source.by_layer()
        for name, sets, size in (
            ("kept_heads", self.kept_heads, "num_attention_heads"),
            ("kept_ffn", self.kept_ffn, "ffn_hidden_size"),
        ):
            if sets is None:
                continue
            if len(sets) != len(self.kept_layers):
                raise PlanError(
                    f"plan: {name}: expected one entry for each of {len(self.kept_layers)} kept layers, got {len(sets)}"
                )
            for layer, kept, goal in zip(self.kept_layers, sets, wanted, strict=True):
                _ascending(f"{name} of layer {layer}", kept, getattr(goal, size), getattr(given[layer], size))
        if self.gates is not None:
            self._check_gates(self.gates)
        if self.compensation is not None:
            self._check_compensation(self.compensation)
        if self.chosen not in (range(len(self.candidates)) if self.candidates else (None,)):
            raise PlanError(f"plan: chosen: expected a number below {len(self.candidates)}, got {self.chosen}")
        for layer, heads, goal in zip(self.kept_layers, self.kept_heads or (), wanted, strict=False):
            groups = {h // given[layer].heads_per_group for h in heads}
            counts = {sum(h // given[layer].heads_per_group == g for h in heads) for g in groups}
            if len(groups) != goal.num_query_groups or len(counts) > 1:
                raise PlanError(
                    f"plan: the kept heads of layer {layer}: expected {goal.num_query_groups} query groups with the "
                    f"same number in each, got {len(groups)} groups with {sorted(counts)} heads"
                )
        reached = Selection(self.kept_layers, self.kept_hidden, self.kept_heads, self.kept_ffn).shape(source)
        if reached == source:
            raise PlanError("plan: expected a plan that makes the model smaller, got one that removes nothing")
        if self.compensation is not None:
            reached = reached.with_biases()
        if reached != target:
            raise PlanError(f"plan: expected kept indices that give {target}, got those of {reached}")

    def _check_gates(self, gates: Gates) -> None:
        """One finite factor for all that is kept, of no other kind."""
        for name, factors, kept in (
            ("layers", gates.layers, self.kept_layers if gates.layers is not None else None),
            ("hidden", gates.hidden, self.kept_hidden),
            ("heads", gates.heads, self.kept_heads),
            ("ffn", gates.ffn, self.kept_ffn),
        ):
            if _sizes(factors) != _sizes(kept):
                raise PlanError(f"plan: gates.{name}: expected a number for each index that is kept, got others")
            if factors is not None and not all(map(math.isfinite, _flat(factors))):
                raise PlanError(f"plan: gates.{name}: expected finite numbers, got others")

    def _check_compensation(self, compensation: Compensation) -> None:
        """One finite mean for every input that is removed, of no other kind."""
        heads: Axis = "heads"
        ffn: Axis = "ffn"
        for name, means, kept in ((heads, compensation.heads, self.kept_heads), (ffn, compensation.ffn, self.kept_ffn)):
            sizes = [
                len(removed_indices(name, self.source, layer, self.kept(place)))
                for place, layer in enumerate(self.kept_layers)
            ]
            if (means is None) != (kept is None) or (means is not None and list(map(len, means)) != sizes):
                raise PlanError(
                    f"plan: compensation.{name}: expected a number for each input that is removed, got others"
                )
            if means is not None and not all(map(math.isfinite, _flat(means))):
                raise PlanError(f"plan: compensation.{name}: expected finite numbers, got others")

    def kept(self, position: int) -> Kept:
        """What is kept in the ``position``-th kept layer (``kept_layers[position]`` of the source)."""
        return Kept(
            hidden=self.kept_hidden,
            heads=None if self.kept_heads is None else self.kept_heads[position],
            ffn=None if self.kept_ffn is None else self.kept_ffn[position],
        )

    @property
    def removed_linears(self) -> float:
        """Fraction of the blocks' linear weights that is removed."""
        return 1 - self.target.linear_parameters() / self.source.linear_parameters()

    @property
    def removed_all(self) -> float:
        """Fraction of all parameters that is removed."""
        return 1 - self.target.parameters() / self.source.parameters()

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the plan's content."""
        return artifacts.sha256_json(self._json())

    def _json(self) -> dict[str, Any]:
        # Through JSON, so that tuples and lists hash alike.
        content = json.loads(json.dumps(asdict(self)))
        for name in ("gates", "compensation", "latency"):
            if content[name] is None:
                del content[name]
        rows = ({key: value for key, value in row.items() if value is not None} for row in content["candidates"])
        return {**content, "candidates": artifacts.with_nulls(list(rows))}

    def file(self) -> bytes:
        """Content of ``plan.json``, one list of indices per line."""
        content = {
            "version": VERSION,
            **self._json(),
            "removed_linears": self.removed_linears,
            "removed_all": self.removed_all,
            "hash": self.hash,
        }
        return artifacts.json_bytes(content)

    def write(self, path: str | Path) -> None:
        """Write ``plan.json`` atomically."""
        artifacts.write_bytes(path, self.file())


class _PlanFile(TypedDict):
    """Types of a plan's JSON; ``PruningPlan`` checks what the values say."""

    method: str
    settings: dict[str, Any]
    seed: int | None
    ratio: float | None
    ratio_of: str
    source: dict[str, Any]
    target: dict[str, Any]
    parent: str
    kept_layers: list[int]
    kept_hidden: list[int] | None
    kept_heads: list[list[int]] | None
    kept_ffn: list[list[int]] | None
    near_ties: list[_NearTieRow]
    statistics: str | None
    calibration: dict[str, Any] | None
    candidates: list[_ScoredRow]
    chosen: int | None
    gates: NotRequired[_GatesRow]
    compensation: NotRequired[_CompensationRow]
    latency: NotRequired[_LatencyRow]


class _NearTieRow(TypedDict):
    unit: str
    kept: int
    removed: int
    kept_score: float
    removed_score: float
    others: list[int]
    layer: int | None
    group: int | None


class _ScoredRow(TypedDict):
    candidate: str
    parameters: int
    loss: float | None
    accuracy: NotRequired[float | None]
    rounds: NotRequired[list[Annotated[list[float | None], Field(min_length=2, max_length=2)]]]
    retrained_loss: NotRequired[float | None]


class _CompensationRow(TypedDict):
    heads: list[list[float]] | None
    ffn: list[list[float]] | None


class _LatencyRow(TypedDict):
    table: str
    device: str
    batch: int
    prompt: int
    prefill: float
    decode: float


class _GatesRow(TypedDict):
    layers: list[float] | None
    hidden: list[float] | None
    heads: list[list[float]] | None
    ffn: list[list[float]] | None


def read(path: str | Path) -> PruningPlan:
    """Read and validate a plan; PlanError says what is wrong with it."""
    content = artifacts.read_json(path)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise PlanError(
            f"{path}: expected a pruning plan of version {VERSION}, got another file: give the plan.json that plan "
            "wrote"
        )
    check(_PlanFile, content, str(path), PlanError)
    try:
        optional = {"gates": Gates, "compensation": Compensation, "latency": PredictedLatency}
        fields = {key: content[key] for key in PruningPlan.__dataclass_fields__ if key not in optional}
        for name, made_of in optional.items():
            if (one := content.get(name)) is not None:
                fields[name] = made_of(**{key: _tupled(value) for key, value in one.items()})
        plan = PruningPlan(
            **{
                **fields,
                "source": ModelShape.read(fields["source"]),
                "target": ModelShape.read(fields["target"]),
                "kept_layers": tuple(fields["kept_layers"]),
                "kept_hidden": None if fields["kept_hidden"] is None else tuple(fields["kept_hidden"]),
                "kept_heads": _tuples(fields["kept_heads"]),
                "kept_ffn": _tuples(fields["kept_ffn"]),
                "candidates": tuple(Scored(**_no_nulls(row)) for row in fields["candidates"]),
                "near_ties": tuple(NearTie(**{**t, "others": tuple(t["others"])}) for t in fields["near_ties"]),
            }
        )
    except (KeyError, TypeError, CheckpointError) as error:
        why = str(error) if isinstance(error, CheckpointError) else repr(error)
        raise PlanError(f"{path} is damaged: {why}; run plan again") from error
    if plan.hash != content.get("hash"):
        raise PlanError(
            f"{path}: expected the content that its hash says, got another, changed after it was written: run plan "
            "again"
        )
    return plan


def make(
    question: Question, *, ratio: float | None, ratio_of: str, statistics: Statistics | LearnedMasks | None = None
) -> PruningPlan:
    """Choose what is kept by the method, or by the scores of competing candidates.

    Raises StatisticsError if statistics or scores are needed that are missing, or of another parent.
    """
    method = methods.get(question.method)
    if not uses_statistics(method, question.settings):
        statistics = None
    found = question.candidates(statistics)
    if not method.needs_scores(question.settings):
        return for_candidate(question, found[0], statistics, ratio=ratio, ratio_of=ratio_of)
    assert isinstance(statistics, Statistics)  # learned masks need no scores
    best, table, ties = judge(question, found, statistics)
    made = for_candidate(question, found[best], statistics, ratio=ratio, ratio_of=ratio_of)
    return replace(
        made,
        near_ties=(*ties, *made.near_ties),
        candidates=tuple(table),
        chosen=best,
        calibration={**statistics.provenance(), **spent(question, found, statistics)},
    )


def for_candidate(
    question: Question,
    candidate: Candidate,
    statistics: Statistics | LearnedMasks | None,
    *,
    ratio: float | None = None,
    ratio_of: str = "linears",
) -> PruningPlan:
    """The plan that keeps what ``candidate`` keeps, whatever its score."""
    selection = candidate.selection
    return PruningPlan(
        method=question.method,
        settings=question.settings.to_json(),
        seed=question.seed,
        ratio=ratio,
        ratio_of=ratio_of,
        source=question.source,
        target=candidate.target,
        parent=question.parent,
        kept_layers=selection.layers,
        kept_hidden=selection.hidden,
        kept_heads=selection.heads,
        kept_ffn=selection.ffn,
        near_ties=selection.near_ties,
        statistics=statistics.hash if statistics else None,
        calibration=statistics.provenance() if statistics else None,
        gates=selection.gates,
        compensation=selection.compensation,
    )


def _ascending(name: str, indices: Sequence[int], size: int, limit: int) -> None:
    if any(type(i) is not int for i in indices):
        raise PlanError(f"plan: {name}: expected integers, got others")
    if len(indices) != size:
        raise PlanError(f"plan: {name}: expected the target's {size} indices, got {len(indices)}")
    if any(b <= a for a, b in zip(indices, indices[1:], strict=False)):
        raise PlanError(f"plan: {name}: expected ascending indices without repetitions, got others")
    if indices and (indices[0] < 0 or indices[-1] >= limit):
        raise PlanError(f"plan: {name}: expected indices in 0…{limit - 1}, got {indices[0]}…{indices[-1]}")


def _flat(values: Sequence[Any]) -> list[float]:
    return [number for value in values for number in (value if isinstance(value, tuple) else (value,))]


def _sizes(values: Sequence[Any] | None) -> Any:
    """The number of indices, or one number per set for several sets; None for None."""
    if values is None:
        return None
    return [len(value) for value in values] if values and isinstance(values[0], tuple) else len(values)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _no_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table in the form of ``Scored``: a null loss was not finite."""
    found = {key: math.inf if value is None else value for key, value in row.items()}
    if "rounds" in row:
        found["rounds"] = tuple((windows, math.inf if loss is None else loss) for windows, loss in row["rounds"])
    return found


def _tuples(sets: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...] | None:
    return None if sets is None else tuple(tuple(kept) for kept in sets)
