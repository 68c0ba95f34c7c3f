"""Limits that a shape must keep to besides its parameters: ``--at-most memory=6G@8192 cache=64k``.

Both count values of 16 bits, whatever the checkpoint's precision: ``cache`` is the bytes of a token's keys and values,
``memory`` the bytes of all weights and of the keys and values of so many tokens (of all sequences together), which is
what generation holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.evaluation.efficiency import cost
from megatron_prune.settings import count

FLAG = "--at-most"
ITEMSIZE = 2


@dataclass(frozen=True)
class Limits:
    """Bytes; None: no limit. ``tokens`` are those of the cache in ``memory``."""

    memory: int | None = None
    tokens: int = 0
    cache: int | None = None

    @classmethod
    def parse(cls, words: Sequence[str]) -> Limits:
        """The limits that ``--at-most`` gives; UsageError if they are malformed."""
        found: dict[str, int] = {}
        for word in words:
            parts = re.fullmatch(r"(?:memory=(?P<memory>[^@]+)@(?P<tokens>[^@]+)|cache=(?P<cache>[^@]+))", word)
            try:
                given = {name: count(text) for name, text in (parts.groupdict() if parts else {}).items() if text}
            except ValueError:
                given = {}
            if not given or given.keys() & found.keys():
                raise UsageError(
                    FLAG, got=" ".join(words), expected="memory=BYTES@TOKENS, cache=BYTES or both, such as "
                    "memory=6G@8192 cache=64k",
                )  # fmt: skip
            found |= given
        return cls(**found)

    def refusal(self, shape: ModelShape) -> UsageError | None:
        """Why ``shape`` does not keep to them; None if it does."""
        if self == Limits():
            return None
        of = cost(shape, ITEMSIZE)
        memory = of.weight_bytes + self.tokens * of.cache_bytes
        if self.cache is not None and of.cache_bytes > self.cache:
            return _exceeded(f"a shape with {of.cache_bytes} bytes of keys and values per token", f"cache={self.cache}")
        if self.memory is not None and memory > self.memory:
            return _exceeded(f"a shape that takes {memory} bytes", f"memory={self.memory}@{self.tokens}")
        return None


def _exceeded(got: str, limit: str) -> UsageError:
    return UsageError(
        FLAG, got=got, expected=f"a shape within {limit}", do="remove more, or let --search choose among more sizes"
    )
