"""Keep the highest scores, in the same way for every method.

Kept indices are ascending. Among equal scores the lower index stays. A cut between scores whose order float
rounding could swap is reported as a near-tie (docs/pages/concepts.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.data.multiple_choice import Task
from megatron_prune.methods.base import NearTie
from megatron_prune.methods.options import METRICS

NEAR = 1e-5  # relative


def keep_highest(
    scores: torch.Tensor,
    count: int,
    unit: str,
    *,
    layer: int | None = None,
    group: int | None = None,
    first: int = 0,
    within: float = 0,
) -> tuple[tuple[int, ...], list[NearTie]]:
    """Indices of the ``count`` highest of ``scores`` [n], ascending, and the near-tie at the cut, if any.

    ``first`` is added to every returned index (for example the number of a group's first head). Scores are near that
    differ by ``NEAR`` relative, or by ``within``.
    """
    order = torch.sort(scores, descending=True, stable=True).indices  # stable: the lower index stays
    kept = tuple(sorted(first + i for i in order[:count].tolist()))
    if not 0 < count < len(scores):
        return kept, []
    last, out = int(order[count - 1]), int(order[count])
    low, high = float(scores[out]), float(scores[last])
    if high - low > max(within, NEAR * max(abs(high), abs(low))):
        return kept, []
    below, above = max(within, NEAR * abs(low)), max(within, NEAR * abs(high))
    band = (scores >= low - below) & (scores <= high + above)
    others = tuple(first + i for i in band.nonzero().flatten().tolist() if i not in (last, out))
    return kept, [NearTie(unit, first + last, first + out, high, low, others, layer, group)]


def keep_heads(
    scores: torch.Tensor, source: ModelShape | LayerShape, target: ModelShape | LayerShape, layer: int
) -> tuple[tuple[int, ...], list[NearTie]]:
    """Heads of one layer that survive, by their ``scores`` [H].

    Whole groups are removed first if the target has fewer (a group's score is the sum of its heads').
    Then every remaining group keeps the same number of heads, ranked inside the group.
    """
    by_group = scores.view(source.num_query_groups, source.heads_per_group)  # [G, H/G]
    groups, near = keep_highest(by_group.sum(1), target.num_query_groups, "group", layer=layer)
    heads: list[int] = []
    for group in groups:
        kept, ties = keep_highest(
            by_group[group],
            target.heads_per_group,
            "head",
            layer=layer,
            group=group,
            first=group * source.heads_per_group,
        )
        heads += kept
        near += ties
    return tuple(heads), near


def lowest_loss(losses: Sequence[float]) -> tuple[int, list[NearTie]]:
    """Index of the candidate with the lowest of these finite losses (the first among equals), and the candidates
    within rounding of it."""
    (best,), ties = lowest_losses(losses, 1, "candidate")
    return best, ties


def lowest_losses(losses: Sequence[float], count: int, unit: str) -> tuple[tuple[int, ...], list[NearTie]]:
    """``keep_highest`` for losses, where lower is better."""
    kept, ties = keep_highest(-torch.tensor(losses, dtype=torch.float64), count, unit)
    return kept, [replace(t, kept_score=-t.kept_score, removed_score=-t.removed_score) for t in ties]


def highest_accuracy(found: Sequence[Accuracy], losses: Sequence[float]) -> tuple[int, list[NearTie]]:
    """Index of the most accurate candidate; ties go to the lower loss, then to the first.

    A near-tie names candidates that could win if answers and losses within rounding came out differently.
    """
    ranked = sorted(range(len(found)), key=lambda i: (-found[i].correct, losses[i], i))
    best = ranked[0]
    within = losses[best] + NEAR * abs(losses[best])
    rivals = [
        i
        for i in ranked[1:]
        if found[i].high > found[best].low or (found[i].high == found[best].low and losses[i] <= within)
    ]
    if not rivals:
        return best, []
    first, *others = rivals
    return best, [NearTie("candidate", best, first, found[best].share, found[first].share, tuple(sorted(others)))]


# Accuracy from the log-likelihoods of choices, and how far rounding could change it. ``acc`` takes the choice with
# the highest log-likelihood, ``acc_norm`` divides each by its choice's number of characters first (lm-eval's
# definitions; among equal choices the first wins). An example with a NaN counts as wrong.


@dataclass(frozen=True)
class Accuracy:
    """How many of ``examples`` are answered correctly.

    If right and wrong choices are within 1e-5 relative, rounding under another layout may decide differently:
    ``correct`` can then be anything from ``low`` to ``high``.
    """

    examples: int
    correct: int
    low: int
    high: int

    @property
    def share(self) -> float:
        return self.correct / self.examples


def accuracies(task: Task, likelihoods: torch.Tensor) -> dict[str, Accuracy]:
    """Both metrics, from ``likelihoods`` float64 [choices of all examples, in order]."""
    counts = {metric: [0, 0, 0] for metric in METRICS}  # correct, low, high
    first = 0
    for example in task.examples:
        values = likelihoods[first : first + len(example.choices)]  # [choices]
        first += len(example.choices)
        characters = torch.tensor([len(choice) for choice in example.choices], dtype=torch.float64)
        for metric, compared in zip(METRICS, (values, values / characters), strict=True):
            if bool(compared.isnan().any()):  # argmax would choose it
                continue
            right = int(compared.argmax()) == example.gold
            gold = float(compared[example.gold])
            other = max(float(v) for i, v in enumerate(compared) if i != example.gold)
            near = abs(gold - other) <= NEAR * max(abs(gold), abs(other))
            for place, counted in enumerate((right, right and not near, right or near)):
                counts[metric][place] += counted
    return {metric: Accuracy(len(task.examples), *found) for metric, found in counts.items()}
