"""What the compared runs learn from: the text (``lm``), or also the parent's probabilities (``distill``).

With both, every comparison is made twice, so that four arms answer what the pruned start gives, what the teacher gives,
and whether one needs the other. The teacher of a run is the parent of its seed, in the same job (``online``) or from a
cache that `teach` writes once per parent and range, and that all runs on samples inside it share.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from megatron_prune.errors import UsageError
from megatron_prune.study.values import STRICT, Positive, Share, Tokens, different, finds

ObjectiveName = Literal["lm", "distill"]
Warm = Annotated[float, Field(gt=0)]
Blocks = Annotated[str, Field(pattern=r"^[1-9][0-9]*:[1-9][0-9]*$")]  # STUDENT:TEACHER
Objectives = Annotated[list[ObjectiveName], Field(min_length=1), AfterValidator(different)]


@dataclass(frozen=True, config=STRICT)
class Distill:
    """Settings of ``distill``: the loss is (1 − alpha) · CE + alpha · temperature² · KL.

    ``alpha`` and ``temperature``: a number, or those of the first and the last step. ``kl``: ``forward`` is that of the
    teacher from the student. ``teacher``: ``online``, or ``cache``, which holds the ``top_k`` most probable words of
    every token, as ``dtype``, and the probability of all others. ``budgets``: only these are distilled (none: all); the
    others show how many tokens of plain training the teacher is worth. ``hidden_states``: blocks whose outputs are
    matched, in every student of the study, ``hidden_weight`` times their distance (``training/hidden_states.py``).
    """

    alpha: Share | Annotated[list[Share], Field(min_length=2, max_length=2)] = 1.0
    temperature: Warm | Annotated[list[Warm], Field(min_length=2, max_length=2)] = 1.0
    kl: Literal["forward", "reverse"] = "forward"
    teacher: Literal["online", "cache"] = "online"
    top_k: Positive | None = None
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    budgets: list[Tokens] = dataclasses.field(default_factory=list)
    hidden_states: list[Blocks] = dataclasses.field(default_factory=list)
    hidden_weight: Warm | None = None

    @finds
    def __post_init__(self) -> None:
        if len({pair.split(":")[0] for pair in self.hidden_states}) < len(self.hidden_states):
            raise UsageError("distill.hidden_states", got=" ".join(self.hidden_states),
                             expected="each block of the student once")  # fmt: skip
        if self.hidden_states and self.cached:
            raise UsageError("distill.hidden_states", got="it with teacher: cache", expected="teacher: online with it",
                             why="a cache holds probabilities alone")  # fmt: skip
        if self.hidden_weight is not None and not self.hidden_states:
            raise UsageError("distill.hidden_weight", got="it alone", expected="hidden_states with it")
        if self.cached and self.temperature not in (1.0, [1.0, 1.0]):
            raise UsageError("distill.temperature", got=_ends(self.temperature), expected="1 with teacher: cache",
                             why="a cache has only the sum of the other words, which cannot be softened one by one",
                             do="set teacher: online")  # fmt: skip
        if self.teacher == "cache" and self.top_k is None:
            raise UsageError("distill.top_k", got="nothing", expected="a number with teacher: cache")
        for key in ("top_k", "dtype"):
            if self.teacher == "online" and getattr(self, key) is not None:
                raise UsageError(
                    f"distill.{key}", got=getattr(self, key), expected="no such key without teacher: cache",
                    why="an online teacher gives the whole vocabulary",
                )  # fmt: skip

    @property
    def cached(self) -> bool:
        return self.teacher == "cache"

    def at(self, budget: int) -> bool:
        """Whether runs of a budget are distilled."""
        return not self.budgets or budget in self.budgets

    @property
    def flags(self) -> dict[str, Any]:
        """For ``pretrain``, except for the teacher."""
        found: dict[str, Any] = {
            "objective": "distill",
            "distill-alpha": _ends(self.alpha),
            "distill-temperature": _ends(self.temperature),
            "distill-kl": self.kl,
        }
        if self.hidden_states:
            found |= {"distill-hidden-states": self.hidden_states, "distill-hidden-weight": self.hidden_weight}
        return found

    def blocks(self) -> list[tuple[int, int]]:
        """Matched blocks of student and teacher, from 1."""
        pairs = (pair.split(":") for pair in self.hidden_states)
        return [(int(student), int(teacher)) for student, teacher in pairs]


def _ends(value: float | list[float]) -> str:
    """``0.5``; ``1:0.5``"""
    return ":".join(f"{end:g}" for end in (value if isinstance(value, list) else [value]))
