"""A study's comparisons as curves over budgets: the data behind advice.

Read from a study's ``report/results.json``, which only has comparisons whose accounts matched. The shipped ledger
(``SHIPPED``: the small study of ``examples/miniature``) is such a file, reduced to what advice needs. To make it again
from that study's report:

    python -m megatron_prune.study.advise.ledgers REPORT/results.json megatron_prune/study/advise/miniature.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from pydantic import Field, PositiveInt

from megatron_prune import artifacts
from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.study.advise.question import AdvisedTarget
from megatron_prune.study.analysis import scaling_laws
from megatron_prune.study.analysis.scaling_laws import Arms
from megatron_prune.study.grid import SUBJECT, Subject, label
from megatron_prune.untrusted import check, show

SHIPPED = Path(__file__).with_name("miniature.json")
ROW = ("cell", "arm", "status", "seed", "tokens_train", "flops_train", "params", "removed_linears", "removed_all",
       "shape", "validation_loss", "test_loss", "tokens_declared", "tokens_learned", "flops_pruning")  # fmt: skip
COMPARISON = (*SUBJECT, "tokens", "seed", "pruned", "scratch", "status")
SAME_BUDGET = 1.01  # budgets within this factor are the same


@dataclass(frozen=True)
class Losses:
    """Test losses of both arms at one budget, one per seed, and their source."""

    pruned: np.ndarray  # [seeds]
    scratch: np.ndarray
    source: str  # measured, laws or interpolated


@dataclass(frozen=True)
class Curve(Subject):
    """One method at one ratio in one setting against one kind of scratch, over budgets and seeds."""

    arms: Arms
    removed_linears: float
    removed_all: float
    shape: str
    flops_per_token: float  # of retraining
    learned: float = 0  # tokens that its masks were learned on before that, and the FLOPs of its pruning
    learned_flops: float = 0

    def budget(self, target: AdvisedTarget) -> float:
        """The tokens of retraining that are left of the target's."""
        return target.budget(self.flops_per_token, self.learned, self.learned_flops)

    @property
    def name(self) -> str:
        """The method and its pattern, and whether both arms were distilled."""
        return label(self.method, self.pattern, None, self.objective)

    def removed(self, of: str) -> float:
        return self.removed_linears if of == "linears" else self.removed_all

    def holds(self, tokens: float) -> bool:
        """Whether a budget is within the range of those that were run."""
        return self.arms.tokens[0] / SAME_BUDGET <= tokens <= self.arms.tokens[-1] * SAME_BUDGET

    def break_even(self) -> str | None:
        """A text on where scratch catches up; None for a single budget."""
        if len(self.arms.tokens) < 2:
            return None
        return f"{self.label}: break-even (scratch catches up) {scaling_laws.find(self.arms)[0].words}"

    def at(self, tokens: float) -> Losses:
        """Losses at a budget that ``holds``: as measured; between budgets by the laws, or on a line in log(tokens)."""
        arms = self.arms
        nearest = int(np.argmin(np.abs(np.log(np.array(arms.tokens) / tokens))))
        if max(arms.tokens[nearest], tokens) <= SAME_BUDGET * min(arms.tokens[nearest], tokens):
            return Losses(arms.pruned[:, nearest], arms.scratch[:, nearest], "measured")
        _, pruned, scratch = scaling_laws.find(arms)
        if pruned and scratch and pruned.good and scratch.good:
            beside = np.interp(tokens, arms.tokens, arms.scratch_tokens)
            return Losses(
                np.array([float(scaling_laws.law(arms.tokens, own, pruned=True)(tokens)) for own in arms.pruned]),
                np.array(
                    [float(scaling_laws.law(arms.scratch_tokens, own, pruned=False)(beside)) for own in arms.scratch]
                ),
                "laws",
            )
        logs, at = np.log(arms.tokens), np.log(tokens)
        between = [np.array([np.interp(at, logs, own) for own in arm]) for arm in (arms.pruned, arms.scratch)]
        return Losses(between[0], between[1], "interpolated")


@dataclass(frozen=True)
class Measurements:
    """What one study measured."""

    study: str
    parent_params: int
    parent_tokens: int | None
    one_parent: bool
    curves: tuple[Curve, ...]
    parent_loss: float | None = None  # on the test text
    parent_flops_per_token: float | None = None  # of training


class _Row(TypedDict):
    cell: str
    arm: str
    status: str


class _FinishedRow(_Row):
    seed: int
    tokens_train: PositiveInt
    flops_train: PositiveInt
    params: PositiveInt
    removed_linears: float
    removed_all: float
    shape: str
    test_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Compared(TypedDict):
    method: str
    pattern: str | None
    ratio: float | None
    setting: str
    objective: str
    tokens: PositiveInt
    seed: int
    pruned: str
    scratch: str
    status: str


class _Report(TypedDict):
    study: str
    rows: list[_Row]
    comparisons: list[dict[str, Any]]


def read(path: str | Path) -> Measurements:
    """A study's folder, its ``results.json``, or a compact one. UsageError where there is nothing to read."""
    path = Path(path)
    file = path / "report" / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError("--ledger", got=path, expected="the folder of a study that has a report, or its results.json")
    content = artifacts.read_json(file)
    if not isinstance(content, dict) or not {"study", "rows", "comparisons"} <= set(content):
        raise UsageError("--ledger", got=file, expected="the results.json of a study's report")
    check(_Report, content, str(file))
    if any(key not in made for made in content["comparisons"] for key in COMPARISON):
        raise UsageError("--ledger", got=f"{file}, of another version", expected="a report written by this one: "
                         "`study report` writes it again")  # fmt: skip
    rows = {row["cell"]: row for row in content["rows"] if row["status"] == "finished"}
    for number, made in enumerate(content["comparisons"]):
        check(_Compared, made, f"{file}: comparison {number}")
        for cell in (made["pruned"], made["scratch"]) if made["status"] == "finished" else ():
            if cell not in rows:
                raise MegatronPruneError(f"{file} is damaged: comparison {number} is of {show(cell)}, expected a row "
                                         "that has finished")  # fmt: skip
            check(_FinishedRow, rows[cell], f"{file}: row {show(cell)}")
    parents = [row for row in content["rows"] if row["arm"] == "parent"]
    curves = _curves(content["comparisons"], rows)
    if not parents or not curves:
        raise UsageError("--ledger", got=file, expected="a study in which at least one comparison has finished")
    parent = parents[0]
    known = parent.get("flops_train") and parent["tokens_train"]
    return Measurements(
        content["study"], parent["params"], parent["tokens_train"], content.get("one_parent", True), curves,
        parent.get("test_loss"), parent["flops_train"] / parent["tokens_train"] if known else None,
    )  # fmt: skip


def _curves(comparisons: Sequence[Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]]) -> tuple[Curve, ...]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for made in comparisons:
        if made["status"] == "finished":
            groups.setdefault(tuple(made[key] for key in SUBJECT), []).append(made)
    curves = []
    for subject, own in groups.items():
        runs = [
            (made["seed"], made["tokens"], rows[made["scratch"]]["tokens_train"], rows[made["pruned"]]["test_loss"],
             rows[made["scratch"]]["test_loss"])
            for made in own
        ]  # fmt: skip
        arms = scaling_laws.arms(runs, fewest=1)
        assert arms is not None
        pruned = [rows[made["pruned"]] for made in own]
        learned = _mean(row.get("tokens_learned") or 0 for row in pruned)
        curves.append(
            Curve(
                **dict(zip(SUBJECT, subject, strict=True)),
                arms=arms,
                removed_linears=_mean(row["removed_linears"] for row in pruned),
                removed_all=_mean(row["removed_all"] for row in pruned),
                shape=pruned[0]["shape"],
                flops_per_token=pruned[0]["flops_train"] / pruned[0]["tokens_train"],
                learned=learned,
                learned_flops=_mean(row["flops_pruning"] for row in pruned) if learned else 0,
            )
        )
    return tuple(curves)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def compact(content: Mapping[str, Any]) -> dict[str, Any]:
    """A ``results.json`` without matches, verdicts and other parts that advice does not read."""
    rows = {
        row["cell"]: {key: row[key] for key in ROW if key in row}
        for row in content["rows"]
        if row["status"] == "finished"
    }
    comparisons = [{key: made[key] for key in COMPARISON} for made in content["comparisons"]]
    return {
        "version": content["version"],
        "study": content["study"],
        "one_parent": content["one_parent"],
        "rows": list(rows.values()),
        "comparisons": comparisons,
    }


def shorten(report: str | Path, output: str | Path) -> None:
    """Write a report's ``results.json`` as a ledger to ship, one row per line."""
    lines = []
    for key, value in compact(artifacts.read_json(report)).items():
        rows = [json.dumps(item) for item in value] if isinstance(value, list) else None
        text = json.dumps(value) if rows is None else "[\n  " + ",\n  ".join(rows) + "\n ]"
        lines.append(f' "{key}": {text}')
    artifacts.write_bytes(output, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


if __name__ == "__main__":
    shorten(*sys.argv[1:])
