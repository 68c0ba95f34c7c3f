"""From a study's folder to results: rows, matched comparisons and verdicts.

The state and the numbers of cells come from their artifacts (``evidence``), never from the ledger.

A row is one side of one comparison: the pruned and the scratch arm of every method, pattern, ratio, budget,
setting, kind of scratch (``against``) and seed, and one row per parent. A run in several comparisons (a pruned run in
both settings, a scratch run for two methods of one shape) has a row in each, with the same ``cell``. A gap is only
computed after the accounts have matched (``match``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import AccountError
from megatron_prune.study import custody, evidence, grid, match, pair, schema
from megatron_prune.study.analysis import (
    conclusions,
    contrasts,
    effects,
    headlines,
    measures,
    serving,
    sweep,
)
from megatron_prune.study.analysis.conclusions import Trend
from megatron_prune.study.analysis.contrasts import ContrastResult
from megatron_prune.study.analysis.effects import FourArms
from megatron_prune.study.analysis.headlines import Headline
from megatron_prune.study.analysis.measures import MeasureVerdict
from megatron_prune.study.analysis.sweep import Sweep
from megatron_prune.study.analysis.unfinished import Unfinished, find_unfinished
from megatron_prune.study.analysis.verdicts import Verdict
from megatron_prune.study.outlook import Outlook
from megatron_prune.study.prunings import (
    Places,
    Pruning,
    calibration_cell,
    flops_of,
    parent_cell,
    parent_cells,
    source_cell,
)
from megatron_prune.study.sample_ranges import Lay, counted
from megatron_prune.study.schema import StudyConfig
from megatron_prune.study.sections import CORPORA
from megatron_prune.training import lineage
from megatron_prune.training.account import read_account
from megatron_prune.training.lineage import Stage

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """A comparison and its result; ``status`` is finished, pending or not run."""

    comparison: grid.Comparison
    tokens: int  # of retraining
    status: str
    match: tuple[pair.Line, ...] = ()

    @property
    def group(self) -> dict[str, Any]:
        """The fields that all seeds share."""
        return self.comparison.group(self.tokens)


@dataclass(frozen=True)
class Results:
    """Everything that a report shows."""

    study: schema.StudyConfig
    lay: Lay
    parent: Record | None
    records: Mapping[str, Record]
    compared: tuple[Compared, ...]
    rows: tuple[dict[str, Any], ...]
    verdicts: tuple[Verdict, ...]
    trends: tuple[Trend, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    disbelieved: tuple[str, ...] = ()  # contradictions between ledger and artifacts
    left_out: tuple[evidence.LeftOut, ...] = ()  # runs in the folder that the study does not ask for
    ran: str = ""  # environment of the trainings
    headlines: tuple[Headline, ...] = ()
    measured: tuple[MeasureVerdict, ...] = ()  # on further corpora, tasks and suites
    contrasts: tuple[ContrastResult, ...] = ()  # answers to study.yaml's ``compare``
    four_arms: tuple[FourArms, ...] = ()  # what the start and the teacher give, with several objectives
    unfinished: tuple[Unfinished, ...] = ()  # what conclusions and questions are without
    verified: Mapping[str, int] | None = None  # with --verify: how many files were read again, and how many changed


def collect(places: Places, study: schema.StudyConfig | None = None) -> Results:
    """Read the folder of a study, given as ``study`` or else as last run.

    AccountError if two runs that should match do not, or if the files of one contradict each other.
    """
    study = study or schema.from_mapping(artifacts.read_json(places.root / "study.json"), str(places.root))
    held = evidence.gather(study, places)
    outlook, records = held.outlook, held.records
    lay, consumed = outlook.lay, outlook.consumed(study)
    judged, sweeps = sweep.choose(outlook.grid(study).comparisons, records)
    matching = _Matching(study, places, lay, records, consumed)
    compared = tuple(matching.compare(comparison) for comparison in judged)
    found = [row for item in compared for row in of_comparison(study, item, records, consumed)]
    parents = list(of_parents(study, records))
    _add_costs(study, places, outlook, records, compared, [*parents, *found])
    windows = conclusions.DocumentWindows(study, places)
    verdicts = tuple(conclusions.judge(study, places, compared, records, held.compared, windows))
    groups, answers = conclusions.finished_groups(compared), measures.Answers(study, places, windows)
    measured = measures.judge(answers, groups, records, conclusions.in_family(study, compared, held.compared))
    scatters = conclusions.scatters(groups, records)
    contrasted = contrasts.answer(study, compared, groups, scatters, answers, records)
    taught = effects.answer(study, compared, groups, scatters, answers, records, matching.twins)
    return Results(
        study, lay, _parent(study, records), records, compared, (*parents, *found),
        verdicts, tuple(conclusions.follow(compared, records)), sweeps, held.disbelieved, held.left_out,
        pair.words(matching.ran(records)), headlines.conclude(verdicts, compared, records, windows.interval),
        measured, contrasted, taught, find_unfinished(study, compared),
    )  # fmt: skip


def _add_costs(
    study: schema.StudyConfig,
    places: Places,
    outlook: Outlook,
    records: Mapping[str, Record],
    compared: Iterable[Compared],
    rows: Iterable[dict[str, Any]],
) -> None:
    """Add to every row what its model costs to run."""
    prunings = {cell: item.comparison.pruning for item in compared
                for cell in (item.comparison.pruned, item.comparison.scratch) if cell is not None}  # fmt: skip
    measured = serving.times(places)
    for row in rows:
        record, pruning = records.get(row["cell"] or ""), prunings.get(row["cell"] or "")
        made = {} if pruning is None else records.get(pruning.cell, {})
        row |= serving.costs(
            study,
            outlook.targets.get(pruning.name) if pruning is not None else outlook.source,
            record,
            source=outlook.source,
            removed_linears=row["removed_linears"],
            pattern=row["pattern"],
        )
        marks = [record["fingerprint"]] if record else []
        marks += [made["fingerprint"]] if made and row["arm"] == "pruned" else []  # of the same shape and masks
        row |= next((measured[mark] for mark in marks if mark in measured), {})


def _parent(study: schema.StudyConfig, records: Mapping[str, Record]) -> Record | None:
    """The parent's record; if each seed has its own, the first one with the mean of their losses."""
    parents = [records[cell] for cell, _ in parent_cells(study) if cell in records]
    if len(parents) < 2:
        return parents[0] if parents else None
    losses = {f"{name}_loss": sum(one[f"{name}_loss"] for one in parents) / len(parents) for name in CORPORA}
    return {**parents[0], **losses}


class _Matching:
    """Compares finished runs by their accounts and scores, each of which is read once."""

    def __init__(
        self,
        study: schema.StudyConfig,
        places: Places,
        lay: Lay,
        records: Mapping[str, Record],
        consumed: Mapping[str, int],
    ):
        self.study, self.places, self.lay, self.records, self.consumed = study, places, lay, records, consumed
        self._accounts: dict[Path, Any] = {}
        self._scores: dict[str, dict[str, str]] = {}
        self._behind: dict[Path, list[Stage]] = {}

    def compare(self, made: grid.Comparison) -> Compared:
        """The match of a comparison whose runs are finished; AccountError if they do not match."""
        tokens = self.lay.retrain(made.budget).steps * self.lay.batch.tokens
        if made.not_run:
            return Compared(made, tokens, "not run" if made.pruned in self.records else "pending")
        finished = made.pruned in self.records and made.scratch in self.records
        made_again = any(name not in self.records for name in (made.pruning.cell, parent_cell(self.study, made.seed)))
        if made.scratch is None or not finished or not made.chosen or made_again:
            return Compared(made, tokens, "pending")
        refuse_others(self.study, made.pruning, self.records)
        refuse_other_teachers(made, self.records, parent_cell(self.study, made.seed))
        pruning = self.records[made.pruning.cell]
        swept = {rate: (self._account(a), self._account(b or "")) for rate, a, b in made.swept}
        runs = pair.Runs(
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
            follows=grid.follows(self.study, made.setting),
        )
        return Compared(made, tokens, "finished", tuple(self._lines(made, runs)))

    def twins(self, distilled: str, plain: str, setting: str) -> None:
        """AccountError unless two runs of one arm differ in nothing but the teacher."""
        runs = pair.Runs(
            distilled, plain, self._account(distilled), self._account(plain), weights="",
            texts={cell: self.records[cell]["text"] for cell in (distilled, plain)},
            warmup=self.study.recipe.warmup_iters, swept={} if len(self.study.recipe.rates) > 1 else None,
        )  # fmt: skip
        match.equal_but_for_teacher(runs, own_steps=setting == "equal-flops")

    def _texts(self, made: grid.Comparison) -> dict[str, Any]:
        """The evaluation text of every run whose loss is compared or used to choose a learning rate."""
        swept = [name for _, *names in made.swept for name in names]
        cells = [made.pruned, made.scratch, *swept, made.pruning.cell, parent_cell(self.study, made.seed)]
        return {cell: self.records[cell]["text"] for cell in cells if cell is not None}

    def _lines(self, made: grid.Comparison, runs: pair.Runs) -> list[pair.Line]:
        if made.setting == "equal-training":
            return match.equal_training(runs)
        if made.setting == "equal-total":
            assert self.lay.parent_tokens is not None
            read = self.consumed.get(made.pruning.name, 0)
            return match.equal_total(runs, self.lay.parent_tokens, read, declared=self.lay.declared)
        spent = spent_on(self.study, made.pruning, self.records, self.consumed)
        assert self.lay.parent_flops is not None and spent is not None
        declared = self.lay.declared_flops or 0
        return match.equal_flops(runs, self.lay.parent_flops, spent, declared=declared)

    def _stages(self, seed: int) -> list[Stage]:
        """The stages of a seed's parent, from its checkpoint and the files next to it."""
        path = self.places.parent(self.study, seed)
        if path not in self._behind:
            self._behind[path] = lineage.of(open_checkpoint(path))
        return self._behind[path]

    def _scored(self, cell: str) -> dict[str, str]:
        if cell not in self._scores:
            self._scores[cell] = pair.of_scores(custody.read_scores(self.places.scores(cell)))
        return self._scores[cell]

    def ran(self, cells: Iterable[str]) -> list[dict[str, str]]:
        """The environments that these cells were trained in."""
        return [pair.of_account(self._account(cell)) for cell in cells if self.places.account(cell).is_file()]

    def _account(self, cell: str) -> Any:
        path = self.places.account(cell)
        if path not in self._accounts:
            self._accounts[path] = read_account(path)
        return self._accounts[path]


def describe_unfinished(results: Results, subject: str, setting: str, *, question: bool = False) -> str | None:
    """What a conclusion, or the answer to a question, is without, in words; None if nothing is missing."""
    own = (one.words for one in results.unfinished
           if (one.subject, one.setting, one.question) == (subject, setting, question))  # fmt: skip
    return next(own, None)


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
        "conclusions": [
            headline.to_json() | {"unfinished": describe_unfinished(results, headline.subject, headline.setting)}
            for headline in results.headlines
        ],
        "compare": [
            contrast.to_json()
            | {"unfinished": describe_unfinished(results, contrast.subject, contrast.setting, question=True)}
            for contrast in results.contrasts
        ],
        "teacher": [one.to_json() for one in results.four_arms],
        "measures": [measured.to_json() for measured in results.measured],
        "verdicts": [
            asdict(verdict)
            | {
                "winner": verdict.winner,
                "detectable": verdict.detectable,
                "words": f"{verdict.subject}: {verdict.words}",
            }
            for verdict in results.verdicts
        ],
        "unfinished": [one.to_json() for one in results.unfinished],
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
        "verified": results.verified,
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


COLUMNS = (
    "study", "cell", "method", "pattern", "ratio", "ratio_of", "arm", "setting", "against", "seed", "status",
    "tokens_train", "tokens_total", "flops_total", "flops_train", "flops_train_theoretical", "params", "params_nonzero",
    "loss_initial", "validation_loss", "test_loss", "validation_loss_unretrained", "test_loss_unretrained",
    "tokens_parent", "tokens_pruning", "tokens_declared", "removed_linears", "removed_all", "shape",
    "seconds", "lr", "flops_pruning", "loss_spikes", "losses_not_finite", "tokens_learned", "objective",
    "flops_teacher", *serving.COSTS, *serving.TIMES,
)  # fmt: skip


def of_parents(study: StudyConfig, records: Mapping[str, Record]) -> Iterator[dict[str, Any]]:
    """Rows of finished parents."""
    first = study.parent.pretrain.seed if study.parent.pretrain else None
    for cell, seed in parent_cells(study):
        if parent := records.get(cell):
            yield _row(study, parent, "parent", "finished", seed=None if first is None else first + seed) | {
                "tokens_train": parent["tokens"],
                "tokens_total": parent["tokens"],
                "tokens_parent": parent["tokens"],
                "tokens_declared": parent["declared"],
                "flops_total": parent["flops"],
            }


def of_comparison(
    study: StudyConfig, item: Compared, records: Mapping[str, Record], consumed: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Rows of the pruned side and the scratch side."""
    made = item.comparison
    pruning = records.get(made.pruning.cell, {})
    shared = {
        **{key: value for key, value in item.group.items() if key in COLUMNS},
        "ratio_of": study.ratio_of if made.pruning.ratio is not None else None,
        "seed": made.seed,
        **{key: pruning.get(key) for key in ("removed_linears", "removed_all", "shape")},
    }
    pruned, scratch = records.get(made.pruned), records.get(made.scratch or "")
    rows = [_row(study, pruned, "pruned", "finished" if pruned else "pending", cell=made.pruned, **shared)]
    if pruned:
        parent = records.get(parent_cell(study, made.seed), {})
        rows[0] |= _behind(study, made.pruning, parent, pruned, records, consumed)
    status = "finished" if scratch else "not run" if made.not_run else "pending"
    row = _row(study, scratch, "scratch", status, cell=made.scratch, **shared)
    if scratch:
        row |= {
            "tokens_train": scratch["tokens"],
            "tokens_total": scratch["tokens"],
            "flops_total": scratch["flops"] + scratch["flops_teacher"],
        }
        row |= {"tokens_parent": 0, "tokens_pruning": 0, "flops_pruning": 0, "tokens_declared": False}
    return [*rows, row]


def _behind(
    study: StudyConfig,
    pruning: Pruning,
    parent: Record,
    pruned: Record,
    records: Mapping[str, Record],
    consumed: Mapping[str, int],
) -> dict[str, Any]:
    """Tokens and FLOPs of the whole pruned arm: parent, pruning (with retrainings between links) and retraining."""
    record, spent = records.get(pruning.cell, {}), spent_on(study, pruning, records, consumed)
    tokens, known = consumed.get(pruning.name, 0), parent.get("tokens") is not None
    trained = (parent.get("tokens") or 0) + pruned["tokens"] + pruning.trained
    cells = [link.retraining_cell for link in pruning.links if link.retraining_cell]
    between = [records.get(cell, {}).get("flops") for cell in cells]
    spent = None if spent is None or None in between else spent + sum(flops for flops in between if flops)
    flops = [parent.get("flops"), spent, pruned["flops"] + pruned["flops_teacher"]]
    return {
        "tokens_train": pruned["tokens"],
        "tokens_total": trained + counted(tokens, trained) if known else None,
        "tokens_parent": parent.get("tokens"),
        "tokens_pruning": tokens + pruning.trained,
        "tokens_learned": pruning.learned,
        "tokens_declared": parent.get("declared"),
        "flops_pruning": spent,
        "flops_total": None if None in flops else sum(part for part in flops if part is not None),
        "validation_loss_unretrained": record.get("validation_loss"),
        "test_loss_unretrained": record.get("test_loss"),
    }


def spent_on(
    study: StudyConfig, pruning: Pruning, records: Mapping[str, Record], consumed: Mapping[str, int]
) -> int | None:
    """FLOPs of a pruning and its predecessors, including calibrations; None before they are finished."""
    spent: list[int | None] = []
    for link in pruning.links:
        own = consumed.get(link.name, 0) - (consumed.get(link.base.name, 0) if link.base else 0)
        # A sparse pruning reads its text itself, and one that learns masks trains: that is in their own FLOPs.
        statistics = own > 0 and link.method.pattern is None and not link.method.tokens
        spent.append(flops_of(records, study, link, statistics=statistics))
    return None if None in spent else sum(part for part in spent if part is not None)


def _row(study: StudyConfig, record: Record | None, arm: str, status: str, **known: Any) -> dict[str, Any]:
    record = record or {}
    seconds = record.get("seconds", {}).get("pretrain")
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"study": study.name, "cell": record.get("cell"), "arm": arm, "status": status, "seconds": seconds}
    row |= {key: record.get(key) for key in ("loss_initial", "validation_loss", "test_loss", "lr")}
    row |= {"params": record.get("parameters"), "params_nonzero": record.get("parameters_nonzero")}
    row |= {"flops_train": record.get("flops"), "flops_train_theoretical": record.get("flops_theoretical")}
    row["flops_teacher"] = record.get("flops_teacher")
    happened = record.get("anomalies", {})
    row |= {"loss_spikes": happened.get("spikes"), "losses_not_finite": happened.get("not_finite")}
    return row | known


def refuse_others(study: StudyConfig, pruning: Pruning, records: Mapping[str, Record]) -> None:
    """AccountError if a pruning, or one that it starts from, was made from other weights or statistics than the ledger
    records for the cells that it depends on. Cells without a line are not checked.

    Removing and remaking a cell does not change those that depend on it. The ledger has the fingerprint of every
    checkpoint and the hash of all statistics, so such a mixture is detected and gets no verdict.
    """
    for link in pruning.links:
        for own, what, made_of, cell, key in _rests_on(study, link, records):
            found = records.get(cell)
            if found is not None and found[key] != made_of:
                raise AccountError(
                    f"{own} was made of other {what} than {cell} has now ({made_of} against {found[key]}): "
                    f"remove {own} and what rests on it, with their lines, to have them made again"
                )


def refuse_other_teachers(made: grid.Comparison, records: Mapping[str, Record], parent: str) -> None:
    """AccountError if a distilled run learned from other weights than those of its ``parent``."""
    wanted = records[parent]["fingerprint"]
    cells = [cell for _, *cells in made.runs for cell in cells] if made.objective != "lm" else []
    for cell in cells:
        if cell is None or cell not in records:
            continue
        if (found := records[cell]["teacher"]) != wanted:
            raise AccountError(
                f"{cell} learned from the weights {found}, {parent} has {wanted} now: remove {cell}, and the cache "
                "that it read, to have them made again"
            )


def _rests_on(
    study: StudyConfig, link: Pruning, records: Mapping[str, Record]
) -> Iterator[tuple[str, str, str, str, str]]:
    """Tuples (cell, kind of input, the input's hash at that time, the cell that made it, its key in the ledger)."""
    between = link.retraining_cell
    if link.base is not None and between is not None and between in records:
        own = records[between]
        yield between, "weights", own["made_of"], link.base.cell, "fingerprint"
    if link.cell in records:
        own = records[link.cell]
        yield link.cell, "weights", own["made_of"], source_cell(study, link), "fingerprint"
        if own["statistics"] is not None:
            yield link.cell, "statistics", own["statistics"], calibration_cell(study, link), "statistics"
