"""From the log-likelihoods of choices to accuracy, and how far rounding could move it.

``acc`` takes the choice of the highest log-likelihood, ``acc_norm`` divides each by the number of
characters of its choice first (lm-eval's definitions; of equal choices the first is taken). Where
one is NaN the answer is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_prune.data.multiple_choice import Task
from megatron_prune.ranking import NEAR

METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Accuracy:
    """How many of ``examples`` are answered right.

    Where right and wrong lie within 1e-5 relative, another layout's rounding may decide otherwise:
    ``low`` to ``high`` is what it can make of ``correct``.
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
            if bool(compared.isnan().any()):  # which argmax would prefer
                continue
            right = int(compared.argmax()) == example.gold
            gold = float(compared[example.gold])
            other = max(float(v) for i, v in enumerate(compared) if i != example.gold)
            near = abs(gold - other) <= NEAR * max(abs(gold), abs(other))
            for place, counted in enumerate((right, right and not near, right or near)):
                counts[metric][place] += counted
    return {metric: Accuracy(len(task.examples), *found) for metric, found in counts.items()}
