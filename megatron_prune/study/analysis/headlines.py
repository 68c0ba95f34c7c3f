"""The conclusion of a study: for each setting and granularity (depth, width, sparse) one sentence with its interval.

The comparisons of a granularity at their largest budget are combined: the mean of their gaps per seed, with a paired t
interval over seeds; a single comparison has its verdict's own numbers. With one seed the interval is over evaluation
documents. Sparse models against dense scratch and against scratch under the same masks are separate questions with
separate sentences. An arm is named only if the interval of the mean excludes zero, at least one of its verdicts,
corrected for the family, agrees, and none says the opposite. So no sentence claims more than the verdicts do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_prune.study.analysis import inference
from megatron_prune.study.analysis.inference import Difference, OverDocuments
from megatron_prune.study.analysis.verdicts import Verdict
from megatron_prune.study.grid import SUBJECT, against_words, setting_words
from megatron_prune.study.prunings import granularity
from megatron_prune.study.values import GRANULARITIES

SETTINGS = ("equal-training", "equal-total", "equal-flops")
ARMS = {"pruned": "Pruned", "scratch": "Scratch"}
Record = Mapping[str, Any]
Interval = Callable[[Sequence[str], Sequence[str]], OverDocuments | None]


@dataclass(frozen=True)
class Headline:
    """The combined result of the ``verdicts`` of one granularity in one setting at one budget.

    ``test``: scratch minus pruned, the mean over the comparisons; ``documents``: its bootstrap over evaluation
    documents. ``every``: the verdicts at all budgets.
    """

    granularity: str  # depth, width, sparse, or several of them joined by "and" (a chain)
    setting: str
    dense: bool  # sparse models against scratch without masks
    sparse: bool
    test: Difference
    documents: OverDocuments | None
    verdicts: tuple[Verdict, ...]
    every: tuple[Verdict, ...]

    @property
    def objective(self) -> str:
        return self.verdicts[0].objective

    @property
    def subject(self) -> str:
        """``Depth``; ``Sparse, against dense scratch``; ``Depth, both distilled``"""
        return subject(self.granularity, sparse=self.sparse, dense=self.dense, objective=self.objective)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval behind the sentence: over seeds, or over documents for one seed."""
        for found in (self.test, self.documents):
            if found is not None and found.low is not None and found.high is not None:
                return found.low, found.high
        return None

    @property
    def winner(self) -> str:
        """``pruned``, ``scratch`` or ``neither``."""
        if self.interval is None:
            return "neither"
        low, high = self.interval
        said = {verdict.winner for verdict in self.verdicts}
        for arm, other, leaves_zero_out in (("pruned", "scratch", low > 0), ("scratch", "pruned", high < 0)):
            if leaves_zero_out and arm in said and other not in said and not self._documents_hold_zero:
                return arm
        return "neither"

    @property
    def _documents_hold_zero(self) -> bool:
        return self.documents is not None and self.documents.holds_zero

    @property
    def claim(self) -> str:
        """The first words of the sentence."""
        if self.winner != "neither":
            return f"{ARMS[self.winner]} ends lower"
        if self.interval is None:
            return "No interval, so no verdict"
        return "Pruned and scratch cannot be told apart"

    @property
    def words(self) -> str:
        """The rest of the sentence."""
        over = f" on average over {len(self.verdicts)} comparisons" * (len(self.verdicts) > 1)
        if self.winner == "neither":
            size = f": scratch minus pruned is {self.test.mean:+.3f} nats{over}"
        else:
            size = f" by {abs(self.test.mean):.3f} nats{over}"
        return f"{size}{self._interval_words}{self._but}.{self._counted}"

    @property
    def _but(self) -> str:
        """Why an interval that excludes zero does not decide."""
        if self.winner != "neither" or self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return ""
        if self._documents_hold_zero:
            return ", but over evaluation documents the difference may be zero"
        said = {verdict.winner for verdict in self.verdicts} - {"neither"}
        family = max(verdict.family for verdict in self.verdicts)
        if said or not family:
            return ", but its comparisons do not agree"
        return f", but none is told apart after Holm's correction over {family} comparisons"

    @property
    def sentence(self) -> str:
        return f"{self.subject}, {setting_words(self.setting)}: {self.claim}{self.words}"

    @property
    def _interval_words(self) -> str:
        if self.interval is None:
            return ""
        low, high = self.interval
        ends = f"{low:+.3f} to {high:+.3f}"
        if self.winner != "neither":  # with the sign of the stated difference
            ends = f"{low:.3f} to {high:.3f}" if self.winner == "pruned" else f"{-high:.3f} to {-low:.3f}"
        seeds = self.test.low is not None
        of = f"{self.test.seeds} seeds" if seeds else f"{self.documents.documents if self.documents else 0} documents"
        return f" (95% interval {ends} over {of})"

    @property
    def _counted(self) -> str:
        """How many comparisons each arm wins, if the sentence does not say so already."""
        found = ""
        if len(self.verdicts) > 1 and (self.winner == "neither" or self._with(self.winner) < len(self.verdicts)):
            found += f" One by one: {self._who(self.verdicts)}."
        budgets = len({verdict.budget for verdict in self.every})
        if budgets > 1:
            found += f" Over all {budgets} budgets: {self._who(self.every)}."
        return found

    def _with(self, winner: str) -> int:
        return sum(verdict.winner == winner for verdict in self.verdicts)

    @staticmethod
    def _who(found: Sequence[Verdict]) -> str:
        names = (("pruned", "pruned ahead in"), ("scratch", "scratch ahead in"), ("neither", "undecided in"))
        counts = [(words, sum(verdict.winner == winner for verdict in found)) for winner, words in names]
        return ", ".join(f"{words} {count}" for words, count in counts if count) + f" of {len(found)}"

    def to_json(self) -> dict[str, Any]:
        return {
            **{key: getattr(self, key) for key in ("granularity", "setting", "dense", "objective", "winner")},
            "budget": self.verdicts[0].budget,
            "comparisons": [{key: getattr(verdict, key) for key in SUBJECT} for verdict in self.verdicts],
            "test": asdict(self.test),
            "documents": self.documents and asdict(self.documents),
            "words": self.sentence,
        }


def subject(kind: str, *, sparse: bool, dense: bool, objective: str) -> str:
    """What a headline is about."""
    return kind.capitalize() + against_words(sparse=sparse, dense=dense) + ", both distilled" * (objective == "distill")


def group_comparisons(compared: Sequence[Any]) -> dict[tuple[str, str, bool, str], list[Any]]:
    """All comparisons of the study by the headline that they are for: setting, granularity, dense, objective."""
    groups: dict[tuple[str, str, bool, str], list[Any]] = {}
    for item in compared:
        made = item.comparison
        dense = made.pruning.sparse and made.against == "dense"
        groups.setdefault((made.setting, granularity(made.pruning), dense, made.objective), []).append(item)
    return _sorted(groups)


def conclude(
    found: Sequence[Verdict], compared: Sequence[Any], records: Mapping[str, Record], over_documents: Interval
) -> tuple[Headline, ...]:
    """The headlines, sorted by setting and granularity.

    ``compared``: ``results.Compared``, from which the verdicts were made; ``over_documents``: the bootstrap of the
    mean difference between runs, given the names of the pruned ones and of the scratch ones.
    """
    kinds = {tuple(item.group[key] for key in SUBJECT): granularity(item.comparison.pruning) for item in compared}
    groups: dict[tuple[str, str, bool, str], list[Verdict]] = {}
    for verdict in found:
        kind = kinds[tuple(getattr(verdict, key) for key in SUBJECT)]
        groups.setdefault((verdict.setting, kind, verdict.dense, verdict.objective), []).append(verdict)
    return tuple(_headline(key, own, compared, records, over_documents) for key, own in _sorted(groups).items())


def _sorted[T](groups: Mapping[tuple[str, str, bool, str], T]) -> dict[tuple[str, str, bool, str], T]:
    order = sorted(groups, key=lambda key: (SETTINGS.index(key[0]), key[3] != "lm", _place(key[1]), not key[2]))
    return {key: groups[key] for key in order}


def _place(kind: str) -> tuple[int, ...]:
    return tuple(GRANULARITIES.index(one) for one in kind.split(" and "))


def _headline(
    key: tuple[str, str, bool, str], every: Sequence[Verdict], compared: Sequence[Any], records: Mapping[str, Record],
    over_documents: Interval,
) -> Headline:  # fmt: skip
    setting, kind, dense, _ = key
    largest = max(verdict.budget for verdict in every)
    own = tuple(verdict for verdict in every if verdict.budget == largest)
    test, documents = own[0].test, own[0].documents
    if len(own) > 1:
        pairs = [_pairs(verdict, compared) for verdict in own]
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in pairs)))
        runs = [[by_seed[seed] for by_seed in pairs] for seed in seeds]  # [seeds][comparisons] of (pruned, scratch)
        if not runs:  # an unfinished study has comparisons of different seeds
            runs = [[pair for by_seed in pairs for pair in by_seed.values()]]
        pruned, scratch = ([_mean([records[pair[arm]]["test_loss"] for pair in row]) for row in runs] for arm in (0, 1))
        test = inference.paired(pruned, scratch)
        flat = [pair for row in runs for pair in row]
        documents = over_documents([pair[0] for pair in flat], [pair[1] for pair in flat])
    return Headline(kind, setting, dense, own[0].sparse, test, documents, own, tuple(every))


def _pairs(verdict: Verdict, compared: Sequence[Any]) -> dict[int, tuple[str, str]]:
    """The finished runs behind a verdict: (pruned, scratch) by seed."""
    return {
        item.comparison.seed: (item.comparison.pruned, item.comparison.scratch)
        for item in compared
        if item.status == "finished" and all(item.group[key] == getattr(verdict, key) for key in (*SUBJECT, "tokens"))
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
