"""Which arm ended lower, by how much, and with which confidence: as numbers and as a sentence.

Losses are mean nats per predicted token on fixed windows. The test corpus decides; validation is also shown. A sentence
claims no more than its interval, and one seed has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_prune.study.analysis import inference
from megatron_prune.study.analysis.inference import CONFIDENCE, POWER, Difference, OverDocuments, Scatter
from megatron_prune.study.grid import Edge, Subject, setting_words
from megatron_prune.study.sections import CORPORA

WINNERS = {"pruned": "the pruned model", "scratch": "training from scratch"}


@dataclass(frozen=True)
class Verdict(Subject):
    """Scratch minus pruned for one method, ratio, setting, kind of scratch and budget, over all finished seeds.

    ``family``: number of comparisons under Holm's correction, 0 if this is not one of them; ``without``: those of them
    without a p value; ``corrected``: its corrected p value; ``level``: Holm's level for comparisons that are not told
    apart. ``documents``: the bootstrap over evaluation documents of the test text.
    """

    tokens: int
    validation: Difference
    test: Difference
    pruned: Mapping[str, float]  # mean losses by corpus
    scratch: Mapping[str, float]
    budget: int = 0  # as in study.yaml; ``tokens`` are whole batches
    one_parent: bool = True  # for all seeds
    family: int = 0
    without: int = 0
    corrected: float | None = None
    level: float = 1 - CONFIDENCE
    edges: tuple[Edge, ...] = ()  # arms whose learning rate is at an end of those tried
    documents: OverDocuments | None = None

    @property
    def detectable(self) -> float | None:
        """The gap in nats that such a study would detect with 80% power; None for one seed."""
        return inference.detectable(self.test, self.level)

    @property
    def winner(self) -> str:
        """``pruned``, ``scratch`` or ``neither``: by every interval, and in a family by the corrected p value too."""
        return "neither" if self._undone_by_family or self._undone_by_documents else self.test.winner

    @property
    def shown_winner(self) -> str:
        """The same, but ``neither`` if there is no interval, so that nothing uncertain is marked as certain."""
        intervals = [self.test.low, self.documents and self.documents.low]
        return self.winner if any(low is not None for low in intervals) else "neither"

    @property
    def _undone_by_family(self) -> bool:
        return self.corrected is not None and self.corrected >= 1 - CONFIDENCE

    @property
    def _undone_by_documents(self) -> bool:
        return self.documents is not None and self.documents.holds_zero

    @property
    def subject(self) -> str:
        """The subject: ``shortgpt, 50% removed, equal training tokens, 409,600 of retraining``."""
        dense = ", against dense scratch" if self.dense else ""
        return f"{self.label}, {setting_words(self.setting)}, {self.tokens:,} of retraining{dense}"

    @property
    def words(self) -> str:
        """The verdict as a sentence with its confidence."""
        losses = f"test loss {self.pruned['test']:.3f} against {self.scratch['test']:.3f}"
        if self.winner == "neither":
            found = f"pruned and scratch cannot be told apart, {losses}"
            if self.test.winner != "neither" and self._undone_by_family:
                found += f" (their interval could, were it not one of {self.family} comparisons)"
            if self.detectable is not None:
                found += f"; a gap of {self.detectable:.3f} nats would have been in {POWER:.0%} of such studies"
            return f"{found}. {self._certainty}"
        return f"{WINNERS[self.winner]} ends lower by {abs(self.test.mean):.3f} nats, {losses}. {self._certainty}"

    @property
    def _certainty(self) -> str:
        parts = ["One seed: no interval."] if self.test.low is None or self.test.high is None else [self._over_seeds]
        if self.documents:
            parts.append(self.documents.words)
        return " ".join([*parts, *(edge.words for edge in self.edges)])

    @property
    def _over_seeds(self) -> str:
        freedom = self.test.freedom
        pooled = f", scatter shared with {self.test.pooled} comparisons" * (self.test.pooled > 1)
        given = ", conditional on this parent" * self.one_parent
        found = (
            f"Scratch minus pruned {self.test.mean:+.3f}, "
            f"95% interval {self.test.low:+.3f} to {self.test.high:+.3f} "
            f"(paired t over {self.test.seeds} seeds, {freedom:.3g} degree{'s' * (freedom != 1)} of freedom"
            f"{pooled}{given})"
        )
        if self.corrected is not None:
            found += f"; p {p_value(self.corrected)} by Holm over {self.family} comparisons"
            found += f", of which {self.without} count with p = 1: not finished or not run" if self.without else ""
        elif self.test.p is not None:
            found += f"; p {p_value(self.test.p)}, outside the study's family"
        return f"{found}."


def p_value(p: float) -> str:
    """``= 0.032``; ``< 0.0001``"""
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"


def judge(
    *,
    tokens: int,
    pruned: Sequence[Mapping[str, Any]],
    scratch: Sequence[Mapping[str, Any]],
    budget: int = 0,
    one_parent: bool = True,
    documents: OverDocuments | None = None,
    scatter: Scatter | None = None,
    edges: tuple[Edge, ...] = (),
    **subject: Any,
) -> Verdict:
    """The verdict from paired records, one per seed, with ``validation_loss`` and ``test_loss``.

    ``scatter``: variance of test losses shared with other comparisons. ``subject``: the fields of ``Subject``.
    """
    losses = {
        arm: {name: [record[f"{name}_loss"] for record in records] for name in CORPORA}
        for arm, records in (("pruned", pruned), ("scratch", scratch))
    }
    means = {arm: {name: sum(v) / len(v) for name, v in by.items()} for arm, by in losses.items()}
    return Verdict(
        **subject,
        tokens=tokens,
        validation=inference.paired(losses["pruned"]["validation"], losses["scratch"]["validation"]),
        test=inference.paired(losses["pruned"]["test"], losses["scratch"]["test"], scatter),
        pruned=means["pruned"],
        scratch=means["scratch"],
        budget=budget,
        one_parent=one_parent,
        documents=documents,
        edges=edges,
    )


def corrected(found: Sequence[Verdict], in_family: Callable[[Verdict], bool], planned: int) -> list[Verdict]:
    """The verdicts, those of the family with Holm's correction over all its ``planned`` comparisons.

    Those without a p value (yet) count with p = 1, so that early results are corrected for the comparisons still
    planned. One seed has no p value to correct.
    """
    family = [number for number, verdict in enumerate(found) if verdict.test.p is not None and in_family(verdict)]
    known = [found[number].test.p or 0.0 for number in family]
    values = inference.holm(known + [1.0] * (planned - len(known)))
    judged = list(found)
    # Holm tests comparisons that are not told apart against the family without those that are.
    level = (1 - CONFIDENCE) / max(1, planned - sum(p < 1 - CONFIDENCE for p in values))
    for number, p in zip(family, values, strict=False):
        without = planned - len(known)
        judged[number] = replace(judged[number], family=planned, without=without, corrected=p, level=level)
    return judged
