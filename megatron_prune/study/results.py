"""From a study's folder to results: rows, matched comparisons and verdicts.

What is finished, and its numbers, come from the artifacts of the cells (``evidence``), never from the ledger.

A row (``rows``) is one side of one comparison: the pruned and the scratch arm of every method, pattern, ratio, budget,
setting, kind of scratch (``against``) and seed, and one row for each parent. A run that serves several
comparisons (a pruned run under both settings, a scratch run for two methods of one shape) has a row in each;
``cell`` tells. A gap is only computed after the accounts have matched (``match``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.study import conclusions, config, environment, evidence, grid, match, origins, rows, sweep
from megatron_prune.study.budgets import Lay
from megatron_prune.study.commands import CORPORA
from megatron_prune.study.places import Places
from megatron_prune.study.prunings import parent_cell, parent_cells
from megatron_prune.study.rows import COLUMNS
from megatron_prune.study.sweep import Sweep
from megatron_prune.study.trends import Trend
from megatron_prune.study.verdicts import Verdict
from megatron_prune.training import lineage
from megatron_prune.training.lineage import Stage

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """A comparison with what came of it: ``status`` is finished, pending or not run."""

    comparison: grid.Comparison
    tokens: int  # of the retraining
    status: str
    match: tuple[match.Line, ...] = ()

    @property
    def group(self) -> dict[str, Any]:
        """What is the same for all seeds."""
        return self.comparison.group(self.tokens)


@dataclass(frozen=True)
class Results:
    """Everything that a report shows."""

    study: config.Study
    lay: Lay
    parent: Record | None
    records: Mapping[str, Record]
    compared: tuple[Compared, ...]
    rows: tuple[dict[str, Any], ...]
    verdicts: tuple[Verdict, ...]
    trends: tuple[Trend, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    disbelieved: tuple[str, ...] = ()  # what the ledger says that the artifacts do not
    left_out: tuple[evidence.LeftOut, ...] = ()  # runs that the folder holds and the study does not ask for
    ran: str = ""  # what the trainings ran with


def collect(places: Places, study: config.Study | None = None) -> Results:
    """Read a study's folder: ``study`` as it is now, or as it was last run.

    AccountError when two runs that should match do not, or the files of one contradict each other.
    """
    study = study or config.from_mapping(artifacts.read_json(places.root / "study.json"), str(places.root))
    held = evidence.gather(study, places)
    outlook, records = held.outlook, held.records
    lay, consumed = outlook.lay, outlook.consumed(study)
    judged, sweeps = sweep.choose(outlook.grid(study).comparisons, records)
    matching = _Matching(study, places, lay, records, consumed)
    compared = tuple(matching.compare(comparison) for comparison in judged)
    found = [row for item in compared for row in rows.of_comparison(study, item, records, consumed)]
    return Results(
        study, lay, _parent(study, records), records, compared, (*rows.of_parents(study, records), *found),
        tuple(conclusions.judge(study, places, compared, records, held.compared)),
        tuple(conclusions.follow(compared, records)), sweeps, held.disbelieved, held.left_out,
        environment.words(matching.ran(records)),
    )  # fmt: skip


def _parent(study: config.Study, records: Mapping[str, Record]) -> Record | None:
    """The parent's record; where every seed has one, the first's with the mean of their losses."""
    parents = [records[cell] for cell, _ in parent_cells(study) if cell in records]
    if len(parents) < 2:
        return parents[0] if parents else None
    losses = {f"{name}_loss": sum(one[f"{name}_loss"] for one in parents) / len(parents) for name in CORPORA}
    return {**parents[0], **losses}


class _Matching:
    """Comparisons of finished runs by their accounts, each of which is read once."""

    def __init__(
        self,
        study: config.Study,
        places: Places,
        lay: Lay,
        records: Mapping[str, Record],
        consumed: Mapping[str, int],
    ):
        self.study, self.places, self.lay, self.records, self.consumed = study, places, lay, records, consumed
        self._accounts: dict[Path, Any] = {}
        self._behind: dict[Path, list[Stage]] = {}

    def compare(self, made: grid.Comparison) -> Compared:
        """The match of a comparison whose runs are finished; AccountError when they do not match."""
        tokens = self.lay.retrain(made.budget).steps * self.lay.batch.tokens
        if made.not_run:
            return Compared(made, tokens, "not run" if made.pruned in self.records else "pending")
        finished = made.pruned in self.records and made.scratch in self.records
        made_again = any(name not in self.records for name in (made.pruning.cell, parent_cell(self.study, made.seed)))
        if made.scratch is None or not finished or not made.chosen or made_again:
            return Compared(made, tokens, "pending")
        origins.refuse_others(self.study, made.pruning, self.records)
        pruning = self.records[made.pruning.cell]
        swept = {rate: (self._account(a), self._account(b or "")) for rate, a, b in made.swept}
        runs = match.Runs(
            made.pruned,
            made.scratch,
            self._account(made.pruned),
            self._account(made.scratch),
            weights=pruning["fingerprint"],
            texts=self._texts(made),
            warmup=self.study.recipe.warmup_iters,
            parent=self._stages(made.seed),
            between=[
                self.lay.retrain(link.retrained, link.base.trained).samples
                for link in made.pruning.links
                if link.base is not None and link.retrained
            ],
            masks=pruning.get("masks"),
            dense=made.against == "dense",
            swept=swept or None,
            scored=(self._scored(made.pruned), self._scored(made.scratch)),
        )
        return Compared(made, tokens, "finished", tuple(self._lines(made, runs)))

    def _texts(self, made: grid.Comparison) -> dict[str, Any]:
        """What every run was evaluated on whose loss stands beside the others, or decides which of them it is."""
        swept = [name for _, *names in made.swept for name in names]
        cells = [made.pruned, made.scratch, *swept, made.pruning.cell, parent_cell(self.study, made.seed)]
        return {cell: self.records[cell]["text"] for cell in cells if cell is not None}

    def _lines(self, made: grid.Comparison, runs: match.Runs) -> list[match.Line]:
        if made.setting == "equal-training":
            return match.equal_training(runs)
        if made.setting == "equal-total":
            assert self.lay.parent_tokens is not None
            read = self.consumed.get(made.pruning.name, 0)
            return match.equal_total(runs, self.lay.parent_tokens, read, declared=self.lay.declared)
        spent = rows.spent_on(self.study, made.pruning, self.records, self.consumed)
        assert self.lay.parent_flops is not None and spent is not None
        declared = self.lay.declared_flops or 0
        return match.equal_flops(runs, self.lay.parent_flops, spent, declared=declared)

    def _stages(self, seed: int) -> list[Stage]:
        """What is behind a seed's parent, as its checkpoint and the files next to it say now."""
        path = self.places.parent(self.study, seed)
        if path not in self._behind:
            self._behind[path] = lineage.of(open_checkpoint(path))
        return self._behind[path]

    def _scored(self, cell: str) -> dict[str, str]:
        return environment.of_scores(self._read(self.places.scores(cell)))

    def ran(self, cells: Iterable[str]) -> list[dict[str, str]]:
        """What these cells were trained with."""
        return [environment.of_account(self._account(cell)) for cell in cells if self.places.account(cell).is_file()]

    def _account(self, cell: str) -> Any:
        return self._read(self.places.account(cell))

    def _read(self, path: Path) -> Any:
        if path not in self._accounts:
            self._accounts[path] = artifacts.read_json(path)
        return self._accounts[path]


def to_json(results: Results) -> dict[str, Any]:
    """``results.json``: rows, verdicts, matches and seconds."""
    return {
        "version": 1,
        "study": results.study.name,
        "about": "One row a side of a comparison, and one for the parent; cell names the run behind a row. "
        "Losses are mean nats per predicted token on fixed windows.",
        "one_parent": not results.study.parent_per_seed,
        "columns": list(COLUMNS),
        "rows": list(results.rows),
        "verdicts": [
            asdict(verdict)
            | {
                "winner": verdict.winner,
                "detectable": verdict.detectable,
                "words": f"{verdict.subject}: {verdict.words}",
            }
            for verdict in results.verdicts
        ],
        "trends": [trend.to_json() for trend in results.trends],
        "comparisons": [
            {
                **item.group,
                "seed": item.comparison.seed,
                "pruned": item.comparison.pruned,
                "scratch": item.comparison.scratch,
                "status": item.status,
                "not_run": item.comparison.not_run or None,
                "match": [asdict(line) for line in item.match],
            }
            for item in results.compared
        ],
        "ran": results.ran,
        "disbelieved": list(results.disbelieved),
        "left_out": [
            {
                "cell": one.cell,
                "why": one.why,
                **{key: one.record.get(key) for key in ("validation_loss", "test_loss")},
            }
            for one in results.left_out
        ],
        "sweeps": [asdict(one) | {"edge": one.edge and asdict(one.edge)} for one in results.sweeps],
        "unigram_loss": results.parent["unigram_loss"] if results.parent else None,
        "stages": {cell: record["seconds"] for cell, record in results.records.items()},
    }
