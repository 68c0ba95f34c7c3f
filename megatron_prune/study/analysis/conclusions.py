"""From matched comparisons to conclusions: verdicts at every budget, trends over the budgets.

Verdicts (``judge``) are corrected over all planned comparisons of the study's family (``family``), finished or not, and
bootstrapped over evaluation documents if the corpus and its window losses exist (``DocumentWindows``). Trends
(``follow``) have the laws of both arms and the budget at which training from scratch catches up. Both use test losses.
Each budget is a separate run, never an intermediate checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from megatron_prune.data.indexed import document_tokens, fingerprint
from megatron_prune.errors import AccountError
from megatron_prune.study import custody
from megatron_prune.study.analysis import inference, scaling_laws, verdicts
from megatron_prune.study.analysis.inference import OverDocuments, Paired, Scatter
from megatron_prune.study.analysis.scaling_laws import FEWEST_BUDGETS, POOR, Arms, BreakEven, Fit
from megatron_prune.study.analysis.verdicts import Verdict
from megatron_prune.study.commands import scored_corpora
from megatron_prune.study.grid import GROUP, SUBJECT, Subject
from megatron_prune.study.prunings import Places
from megatron_prune.study.schema import StudyConfig

Record = Mapping[str, Any]
Groups = dict[tuple[Any, ...], list[Any]]


def judge(
    study: StudyConfig,
    places: Places,
    compared: Sequence[Any],
    records: Mapping[str, Record],
    before: Sequence[Record] = (),
    windows: DocumentWindows | None = None,
) -> list[Verdict]:
    """One verdict per group (``results.Compared.group``) with finished seeds, in the study's order.

    ``before``: groups finished in this folder under any study.yaml (``evidence.Evidence.compared``). Those in the
    family, now or then, count in the correction, shown or not.
    """
    windows = windows or DocumentWindows(study, places)
    groups = finished_groups(compared)
    for items in groups.values():
        _refuse_repeated_seeds(items)
    found = [
        verdicts.judge(
            **items[0].group,
            pruned=[records[item.comparison.pruned] for item in items],
            scratch=[records[item.comparison.scratch] for item in items],
            budget=items[0].comparison.budget,
            one_parent=not study.parent_per_seed,
            scatter=scatter,
            edges=items[0].comparison.edges,
            documents=windows.interval(
                [item.comparison.pruned for item in items], [item.comparison.scratch for item in items]
            ),
        )
        for items, scatter in zip(groups.values(), scatters(groups, records), strict=True)
    ]
    planned = in_family(study, compared, before)
    return verdicts.corrected(found, lambda verdict: study.family.holds(vars(verdict)), planned)


def in_family(study: StudyConfig, compared: Sequence[Any], before: Sequence[Record] = ()) -> int:
    """How many comparisons the study's family has, finished or not, those ``before`` included."""
    meant = {tuple(item.group.values()): item.group | {"budget": item.comparison.budget} for item in compared}
    family = {key for key, comparison in meant.items() if study.family.holds(comparison)}
    for group in before:
        if group["in_family"] or study.family.holds(group):
            family.add(tuple(group[part] for part in GROUP))
    return len(family)


def scatters(groups: Groups, records: Mapping[str, Record]) -> list[Scatter | None]:
    """The variance of test losses that each group of comparisons shares with others."""
    return inference.shared([_paired(items, records) for items in groups.values()])


def _paired(items: Sequence[Any], records: Mapping[str, Record]) -> Paired:
    """The paired test losses of one verdict, and its runs, which other verdicts may share."""
    items = sorted(items, key=lambda item: item.comparison.seed)
    pruned, scratch = (tuple(getattr(item.comparison, arm) for item in items) for arm in ("pruned", "scratch"))
    losses = [np.array([records[cell]["test_loss"] for cell in cells]) for cells in (pruned, scratch)]
    seeds = tuple(item.comparison.seed for item in items)
    made = items[0].comparison
    setting = (made.setting, made.against, made.objective)
    return Paired(setting, seeds, pruned, scratch, losses[1] - losses[0])


def _refuse_repeated_seeds(items: Sequence[Any]) -> None:
    """AccountError if a run occurs twice in a verdict, which would overstate its confidence."""
    seeds = [item.comparison.seed for item in items]
    for item in items:
        if seeds.count(item.comparison.seed) > 1:
            made = item.comparison
            raise AccountError(
                f"{made.setting}: expected one comparison of {made.pruned} and {made.scratch} under seed {made.seed}, "
                "got two"
            )


def follow(compared: Sequence[Any], records: Mapping[str, Record]) -> list[Trend]:
    """One trend per comparison with several budgets."""
    found = []
    for subject, items in _groups(compared, lambda item: tuple(item.group[key] for key in SUBJECT)).items():
        runs = [
            (
                item.comparison.seed,
                item.tokens,
                records[item.comparison.scratch]["tokens"],
                records[item.comparison.pruned]["test_loss"],
                records[item.comparison.scratch]["test_loss"],
            )
            for item in items
        ]
        trend = of(dict(zip(SUBJECT, subject, strict=True)), runs)
        found += [trend] if trend else []
    return found


def finished_groups(compared: Sequence[Any]) -> Groups:
    """Finished comparisons by what their seeds share (``results.Compared.group``), in the study's order."""
    return _groups(compared, lambda item: tuple(item.group.values()))


def _groups(compared: Sequence[Any], key: Callable[[Any], tuple[Any, ...]]) -> Groups:
    """Finished comparisons by ``key``, in the study's order."""
    groups: Groups = {}
    for item in compared:
        if item.status == "finished":
            groups.setdefault(key(item), []).append(item)
    return groups


class DocumentWindows:
    """The losses of every window of a corpus, read once per run, and the document of each window.

    Losses on another text than the current one have no documents.
    """

    def __init__(self, study: StudyConfig, places: Places, label: str = "test"):
        self.places, self.label = places, label
        prefix = scored_corpora(study)[label]
        self.documents = of_windows(prefix, study.evaluation.windows, study.evaluation_seq_length)
        self.text = None if self.documents is None else fingerprint(prefix)
        self._read: dict[str, np.ndarray | None] = {}

    def interval(self, pruned: Sequence[str], scratch: Sequence[str]) -> OverDocuments | None:
        if self.documents is None:
            return None
        losses = [[self.of(cell) for cell in cells] for cells in (pruned, scratch)]
        if any(run is None for arm in losses for run in arm):
            return None
        return inference.over_documents(np.array(losses[0]), np.array(losses[1]), self.documents)

    def of(self, cell: str) -> np.ndarray | None:
        """The losses of a run [windows]; None if they are not there, or those of another text."""
        if cell not in self._read:
            path = self.places.scores(cell)
            own = custody.read_scores(path)["corpora"].get(self.label, {}) if path.is_file() else {}
            there = own.get("fingerprint") == self.text and "window_losses" in own
            found = np.array(own["window_losses"]) if there else None
            fits = found is not None and self.documents is not None and found.shape == self.documents.shape
            self._read[cell] = found if fits else None
        return self._read[cell]


@dataclass(frozen=True)
class Trend(Subject):
    """One method at one ratio in one setting against one kind of scratch, over budgets and seeds."""

    arms: Arms
    break_even: BreakEven
    pruned: Fit | None
    scratch: Fit | None

    @property
    def laws(self) -> str:
        """Both laws as text, or why there are none."""
        if self.pruned is None or self.scratch is None:
            return f"No fit: {len(self.arms.tokens)} budgets, at least {FEWEST_BUDGETS} are needed."
        off = [
            f"{name} (p = {fit.lack_of_fit:.2g})"
            for name, fit in (("pruned", self.pruned), ("scratch", self.scratch))
            if not fit.good
        ]
        text = f"Pruned {self.pruned.law.words}, scratch {self.scratch.law.words}"
        if off:
            return f"{text}; not used: off by more than runs scatter (F test below {POOR}): {', '.join(off)}."
        return f"{text}; off by {self.pruned.rms:.3f} and {self.scratch.rms:.3f} nats (root mean square)."

    def to_json(self) -> dict[str, Any]:
        """Everything except single losses, which are in the rows."""
        return {
            **{key: getattr(self, key) for key in SUBJECT},
            "budgets": list(self.arms.tokens),
            "scratch_tokens": list(self.arms.scratch_tokens),
            "seeds": list(self.arms.seeds),
            "break_even": asdict(self.break_even) | {"words": self.break_even.words},
            "pruned": _fit(self.pruned),
            "scratch": _fit(self.scratch),
            "laws": self.laws,
        }


def _fit(found: Fit | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found) | {"used": found.good}


def of(subject: Mapping[str, Any], runs: Sequence[tuple[int, int, int, float, float]]) -> Trend | None:
    """The trend of one comparison, from (seed, retraining tokens, scratch tokens, pruned test loss, scratch test loss).

    None for one budget.
    """
    arms = scaling_laws.arms(runs)
    if arms is None:
        return None
    found, pruned, scratch = scaling_laws.find(arms)
    return Trend(**subject, arms=arms, break_even=found, pruned=pruned, scratch=scratch)


def of_windows(prefix: str | Path, windows: int, seq_length: int) -> np.ndarray | None:
    """The document of each of the first ``windows`` windows, int64 [windows]; None if the corpus does not exist.

    Windows are cut from the concatenated documents. A window with parts of several counts for the document of which it
    predicts most tokens. Window *k* predicts tokens k·S+1 … (k+1)·S (``data.windows``). Only the ``.idx`` is read.
    """
    index = Path(f"{prefix}.idx")
    if not index.is_file():
        return None
    ends = np.cumsum(document_tokens(index))
    predicted = np.arange(1, windows * seq_length + 1).reshape(windows, seq_length)
    most: np.ndarray = stats.mode(np.searchsorted(ends, predicted, side="right"), axis=1).mode
    return most
