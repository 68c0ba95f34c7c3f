"""Limits that a shape must keep to besides its parameters: ``--at-most memory=6G@8192 cache=64k latency=12ms``.

``cache`` and ``memory`` count values of 16 bits, whatever the checkpoint's precision: ``cache`` is the bytes of a
token's keys and values, ``memory`` the bytes of all weights and of the keys and values of so many tokens (of all
sequences together), which is what generation holds.

``latency`` is the time of one step that generates a token, ``prefill`` that of reading the prompts. Both are predicted
from the table of ``--latency-table`` (``evaluation/latency.py``), for its device, its batch and its prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.convert.families.model_family import told_apart
from megatron_prune.errors import UsageError
from megatron_prune.evaluation import latency as latencies
from megatron_prune.evaluation.efficiency import cost
from megatron_prune.settings import count

FLAG = "--at-most"
ITEMSIZE = 2
_WORD = re.compile(
    r"memory=(?P<memory>[^@]+)@(?P<tokens>[^@]+)|cache=(?P<cache>[^@]+)"
    r"|latency=(?P<latency>[^@]+)|prefill=(?P<prefill>[^@]+)"
)
_TIMES = ("latency", "prefill")
_UNITS = {"s": 0, "ms": -3, "us": -6}  # powers of ten


@dataclass(frozen=True)
class Limits:
    """Bytes, and seconds; None: no limit. ``tokens`` are those of the cache in ``memory``. ``table`` predicts the
    seconds."""

    memory: int | None = None
    tokens: int = 0
    cache: int | None = None
    latency: float | None = None
    prefill: float | None = None
    table: latencies.LatencyTable | None = None

    @classmethod
    def parse(cls, words: Sequence[str], table: str | None = None) -> Limits:
        """The limits that ``--at-most`` gives, with the file ``table``; UsageError if they are malformed."""
        found: dict[str, int | float] = {}
        for word in words:
            parts = _WORD.fullmatch(word)
            given: dict[str, int | float]
            try:
                given = {
                    name: (seconds if name in _TIMES else count)(text)
                    for name, text in (parts.groupdict() if parts else {}).items()
                    if text
                }
            except ValueError:
                given = {}
            if not given or given.keys() & found.keys():
                raise UsageError(
                    FLAG, got=" ".join(words), expected="memory=BYTES@TOKENS, cache=BYTES, latency=TIME, prefill=TIME "
                    "or several, such as memory=6G@8192 cache=64k latency=12ms prefill=0.3s",
                )  # fmt: skip
            found |= given
        timed = [name for name in _TIMES if name in found]
        if timed and table is None:
            raise UsageError(
                latencies.FLAG, got="nothing", expected=f"a table that predicts {timed[0]}",
                do="measure one with `megatron-prune latency-table CKPT --output FILE`",
            )  # fmt: skip
        if table is not None and not timed:
            raise UsageError(
                FLAG, got=" ".join(words) or "nothing", expected=f"latency= or prefill= with {latencies.FLAG}"
            )
        return cls(**found, table=None if table is None else latencies.read(table))  # type: ignore[arg-type]

    def refuse_other_model(self, args: Mapping[str, Any], dtype: torch.dtype) -> None:
        """UsageError if the table is of models with other Megatron arguments or another type of weights."""
        if self.table is not None:
            self.table.refuse_other_model(told_apart(args), str(dtype).removeprefix("torch."))

    def refusal(self, shape: ModelShape) -> UsageError | None:
        """Why ``shape`` does not keep to them; None if it does. Raises UsageError if the table cannot tell."""
        if self == Limits():
            return None
        of = cost(shape, ITEMSIZE)
        memory = of.weight_bytes + self.tokens * of.cache_bytes
        if self.cache is not None and of.cache_bytes > self.cache:
            return _exceeded(f"a shape with {of.cache_bytes} bytes of keys and values per token", f"cache={self.cache}")
        if self.memory is not None and memory > self.memory:
            return _exceeded(f"a shape that takes {memory} bytes", f"memory={self.memory}@{self.tokens}")
        if self.table is None:
            return None
        predicted = self.table.predict(shape)
        if self.latency is not None and predicted.decode > self.latency:
            return _exceeded(
                f"a shape with a predicted latency of {in_words(predicted.decode)}", f"latency={in_words(self.latency)}"
            )
        if self.prefill is not None and predicted.prefill > self.prefill:
            return _exceeded(
                f"a shape with a predicted prefill of {in_words(predicted.prefill)}",
                f"prefill={in_words(self.prefill)}",
            )
        return None


def seconds(text: str) -> float:
    """``12ms``, ``0.3s``, ``800us`` in seconds. ValueError for anything else, and for 0."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|ms|us)", text)
    value = float(Decimal(found[1]).scaleb(_UNITS[found[2]])) if found else 0.0
    if not value > 0:
        raise ValueError("a time such as 12ms, 0.3s or 800us")
    return value


def in_words(time: float) -> str:
    """Seconds in milliseconds: ``12.5ms``."""
    return f"{1e3 * time:.6g}ms"


def _exceeded(got: str, limit: str) -> UsageError:
    return UsageError(
        FLAG, got=got, expected=f"a shape within {limit}", do="remove more, or let --search choose among more sizes"
    )
