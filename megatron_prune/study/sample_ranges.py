"""From tokens to sample ranges: which samples of one stream each run of a study takes.

The parent takes ``[0, P)``, retraining ``[P, P+R)``, scratch at equal training the same ``[P, P+R)``, and scratch at
equal total ``[0, P+R+C)``, where C is what pruning itself consumed. A chain that retrains between its links on T
samples takes ``[P, P+T)`` for that and ``[P+T, P+T+R)`` for the last retraining; T counts in the totals. All of these
are whole global batches. A parent from elsewhere has no samples on this stream: its P is 0, and its declared or
recorded tokens count only in the totals. At equal FLOPs, scratch takes samples from 0 on until it has executed as many
FLOPs as the whole pruned arm.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.errors import DataError

NEGLIGIBLE = 0.001  # of the pruned arm's other tokens; below it calibration is reported but not matched


@dataclass(frozen=True)
class SampleRange:
    """Samples ``[start, end)`` of the stream, ``steps`` global batches."""

    start: int
    end: int
    steps: int

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    @property
    def samples(self) -> tuple[int, int]:
        return self.start, self.end


@dataclass(frozen=True)
class Batch:
    """A global batch of ``samples`` sequences of ``seq_length`` tokens; converts tokens to steps."""

    samples: int
    seq_length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_length

    def steps(self, tokens: int, what: str) -> int:
        """The nearest number of whole batches for ``tokens``; DataError if it is zero."""
        steps = (2 * tokens + self.tokens) // (2 * self.tokens)  # round half up, in integers
        if steps == 0:
            raise DataError(
                f"{what}: expected at least half a global batch of {self.samples} x {self.seq_length} = "
                f"{self.tokens:,} tokens, got {tokens:,}; give more tokens or a smaller batch"
            )
        return steps

    def steps_up(self, tokens: int) -> int:
        """Number of whole batches that hold ``tokens``."""
        return -(-tokens // self.tokens)

    def range(self, start: int, steps: int) -> SampleRange:
        return SampleRange(start, start + steps * self.samples, steps)


@dataclass(frozen=True)
class Lay:
    """The positions of a study's runs on the stream.

    ``parent_end``: end of the parent's samples on the stream (0 for a parent from elsewhere); ``parent_tokens``: tokens
    of all its stages, measured or declared; None if unknown. ``parent_flops``: the FLOPs executed; None also while its
    shape is not known. ``declared`` and ``declared_flops``: the part that no account covers.
    """

    batch: Batch
    parent_end: int
    parent_tokens: int | None
    parent_flops: int | None = None
    declared: int = 0
    declared_flops: int | None = 0

    def retrain(self, tokens: int, before: int = 0) -> SampleRange:
        """The range of a retraining, after the parent's samples and ``before`` tokens of retraining between links."""
        start = self.parent_end + before // self.batch.seq_length
        return self.batch.range(start, self.batch.steps(tokens, "budgets"))

    def pruned_total(self, retrain_tokens: int, consumed: int) -> int | None:
        """Tokens behind the pruned arm: parent, all retraining, and what pruning consumed if not negligible."""
        if self.parent_tokens is None:
            return None
        trained = self.parent_tokens + retrain_tokens
        return trained + counted(consumed, trained)

    def scratch_total(self, retrain_tokens: int, consumed: int) -> SampleRange:
        """The range of a scratch run with as many tokens as the whole pruned arm, rounded up.

        ``retrain_tokens``: of all retraining, including between links.
        """
        total = self.pruned_total(retrain_tokens, consumed)
        if total is None:
            raise DataError(
                "parent.declared_tokens: expected the parent's tokens, which nothing else says, got nothing; give it "
                "in study.yaml"
            )
        return self.batch.range(0, self.batch.steps_up(total))

    def scratch_flops(self, retrain: SampleRange, spent: int, sequence: int, between: int = 0) -> SampleRange | None:
        """The range of a scratch run with as many FLOPs as the whole pruned arm, rounded up to a batch.

        ``spent``: FLOPs of the pruning; ``sequence``: of training on one sequence, that of its teacher included, equal
        for both arms; ``between``: of retraining between links.
        """
        if self.parent_flops is None:
            return None
        trained = self.parent_flops + between + (retrain.end - retrain.start) * sequence
        total = trained + counted(spent, trained)
        return self.batch.range(0, -(-total // (sequence * self.batch.samples)))


def counted(consumed: int, trained: int) -> int:
    """Tokens or FLOPs of pruning as counted in a total: all of them, or 0 if below 0.1% of the rest."""
    return consumed if consumed >= NEGLIGIBLE * trained else 0
