"""What the functions return: frozen, read from the files that were written, with a readable ``repr``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_prune import artifacts
from megatron_prune.errors import MegatronPruneError

if TYPE_CHECKING:
    from megatron_prune.checkpoint.layout import ModelShape
    from megatron_prune.structured.plan import PruningPlan


class _Shown:
    """An object that prints as a title and one line per property."""

    def _title(self) -> str:
        raise NotImplementedError

    def _lines(self) -> Iterator[tuple[str, str]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        lines = list(self._lines())
        width = max((len(name) for name, _ in lines), default=0)
        return "\n".join([self._title(), *(f"  {name:<{width}}  {text}" for name, text in lines)])


@dataclass(frozen=True, repr=False)
class Model(_Shown):
    """A model on disk: a Megatron checkpoint, or a Hugging Face directory."""

    path: Path
    kind: str  # "Megatron checkpoint" or "Hugging Face directory"
    shape: ModelShape
    pruning: tuple[Mapping[str, Any], ...] = ()  # every pruning in its history, oldest first

    @classmethod
    def of_checkpoint(cls, path: str | Path) -> Self:
        """The checkpoint in ``path``."""
        from megatron_prune.checkpoint.reader import open_checkpoint

        found = open_checkpoint(path)
        return cls(Path(path), "Megatron checkpoint", found.shape, tuple(found.pruning))

    @property
    def parameters(self) -> int:
        """Their number, including the pruned weights of a sparse model."""
        return self.shape.parameters()

    def _title(self) -> str:
        return f"{self.kind} {self.path}"

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "parameters", f"{self.parameters:,}"
        yield "shape", shape_words(self.shape)
        for done in self.pruning:
            how = f" {done['pattern']}" if done.get("pattern") else ""
            yield (
                "pruned",
                f"{done['method']}{how}, {done['removed_linears']:.2%} of the blocks' linear weights removed",
            )


def shape_words(shape: ModelShape) -> str:
    """A model's size in words."""
    heads, groups, ffn = map(shape.range_of, ("num_attention_heads", "num_query_groups", "ffn_hidden_size"))
    return f"{shape.num_layers} layers, hidden size {shape.hidden_size}, FFN {ffn}, {heads} heads in {groups} groups"


@dataclass(frozen=True, repr=False)
class Calibration(_Shown):
    """Statistics of a parent's activations, in ``path`` and the ``.json`` next to it."""

    path: Path
    sequences: int
    seq_length: int
    loss: float  # of the parent, on the calibration text
    candidates: int  # with a score

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The statistics in ``path``, a ``.safetensors`` file."""
        from megatron_prune.structured import statistics

        found = statistics.read(path)
        return cls(Path(path), found.sequences, found.seq_length, found.loss, len(found.scores))

    def _title(self) -> str:
        return f"statistics {self.path}"

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "read", f"{self.sequences} sequences of {self.seq_length} tokens"
        yield "loss", f"{self.loss:.4f} (the parent's)"
        if self.candidates:
            yield "candidates", f"{self.candidates} have a score"


@dataclass(frozen=True, repr=False)
class Plan(_Shown):
    """What is kept of a parent: ``content`` lists layers, channels and heads. ``path`` is its plan.json."""

    path: Path
    content: PruningPlan

    def _title(self) -> str:
        return f"plan {self.path}: {self.content.method}"

    def _lines(self) -> Iterator[tuple[str, str]]:
        made = self.content
        yield "from", shape_words(made.source)
        yield "to", shape_words(made.target)
        yield "removed", f"{made.removed_linears:.2%} of the blocks' linear weights, {made.removed_all:.2%} of all"
        yield "near-ties", str(len(made.near_ties)) if made.near_ties else "none"


@dataclass(frozen=True)
class Loss:
    """The mean loss per token of a model on fixed windows of a text."""

    loss: float
    predictions: int
    windows: int
    seq_length: int
    window_losses: tuple[float, ...] = field(repr=False)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @classmethod
    def of(cls, scores: Mapping[str, Any]) -> Self:
        """Read a corpus of ``scores.json``."""
        plain = ("loss", "predictions", "windows", "seq_length")
        return cls(**{key: scores[key] for key in plain}, window_losses=tuple(scores["window_losses"]))


@dataclass(frozen=True, repr=False)
class Evaluation(_Shown):
    """Results of ``evaluate`` by corpus and task; ``path`` is their ``scores.json``, if it was kept."""

    path: Path | None
    checkpoint: Path
    corpora: Mapping[str, Loss]
    tasks: Mapping[str, Any]
    parameters: int
    parameters_nonzero: int

    @classmethod
    def read(cls, path: str | Path, *, kept: bool = True) -> Self:
        """The scores in ``path``."""
        return cls.of(artifacts.read_json(path), Path(path) if kept else None)

    @classmethod
    def of(cls, found: Mapping[str, Any], path: Path | None) -> Self:
        """The content of ``scores.json``."""
        return cls(
            path=path,
            checkpoint=Path(found["checkpoint"]["path"]),
            corpora={label: Loss.of(scores) for label, scores in found["corpora"].items()},
            tasks=found.get("tasks", {}),
            parameters=found["parameters"],
            parameters_nonzero=found["parameters_nonzero"],
        )

    @property
    def loss(self) -> float:
        """Loss on the only corpus. MegatronPruneError if there are several or none."""
        return self._only.loss

    @property
    def perplexity(self) -> float:
        """Perplexity on the only corpus. MegatronPruneError if there are several or none."""
        return self._only.perplexity

    @property
    def _only(self) -> Loss:
        if len(self.corpora) != 1:
            raise MegatronPruneError(f"expected one corpus, got {len(self.corpora)}; choose one with corpora['…']")
        return next(iter(self.corpora.values()))

    def _title(self) -> str:
        return f"evaluation of {self.checkpoint}" + (f", in {self.path}" if self.path else "")

    def _lines(self) -> Iterator[tuple[str, str]]:
        for label, found in self.corpora.items():
            yield label, f"loss {found.loss:.4f}, perplexity {found.perplexity:.3f} on {found.predictions:,} tokens"
        for task in self.tasks:
            yield task, str(self.tasks[task])
        yield "parameters", f"{self.parameters:,}, of which {self.parameters_nonzero:,} are not zero"


@dataclass(frozen=True, repr=False)
class Pruned(_Shown):
    """A Hugging Face directory that ``prune`` made from another; its ``megatron_prune.json`` holds these fields."""

    path: Path
    source: str
    method: str
    text: str
    before: Loss
    after: Loss
    parameters_before: int
    parameters: int
    removed_linears: float
    removed_all: float
    retrained_tokens: int
    work: Path | None = None  # checkpoints, corpora and logs, if kept
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)  # the whole file

    def _title(self) -> str:
        return f"{self.path}: {self.source} pruned by {self.method}"

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "removed", f"{self.removed_linears:.2%} of the blocks' linear weights, {self.removed_all:.2%} of all"
        same = " (zeros among them)" if self.parameters == self.parameters_before else ""
        yield "parameters", f"{self.parameters_before:,} before, {self.parameters:,} after{same}"
        if self.retrained_tokens:
            yield "retrained", f"on {self.retrained_tokens:,} tokens"
        yield "perplexity", f"{self.before.perplexity:.3f} before, {self.after.perplexity:.3f} after"
        yield "measured on", f"{self.after.predictions:,} held-out tokens of {self.text}"
        if self.work is not None:
            yield "kept", f"{self.work}"
