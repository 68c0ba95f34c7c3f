"""The settings of ``prune --hf``, read as the verbs behind it will read them, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from megatron_prune import verbs
from megatron_prune.methods import options
from megatron_prune.settings import Settings

if TYPE_CHECKING:
    from megatron_prune.sparse.request import SparsifyRequest
    from megatron_prune.structured.choice import Choice

# What ``prune --hf`` shares with ``prune`` of a checkpoint. It splits its text itself.
_SHARED = [
    flag.name
    for flag in verbs.PruneSettings.flags()
    if flag.name
    in {one.name for one in verbs.PruneHFSettings.flags()} - {one.name for one in verbs.CalibrationTextSettings.flags()}
]


@dataclass(frozen=True)
class Asked:
    """``settings``: those of the command; ``own``: those of its structured method."""

    settings: verbs.PruneHFSettings
    own: Settings

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Read keywords. UsageError for an unknown one or an invalid value."""
        method = str(values.get("method"))
        settings, own = options.read(verbs.PruneHFSettings, method, values, known=options.ONE_LINE)
        return cls(settings, own)

    @property
    def pruning(self) -> dict[str, Any]:
        """The method, its amount and its own flags as given, as JSON. They determine the result."""
        found = {name: getattr(self._verb, name) for name in _SHARED if self._verb.was_given(name)}
        found |= {flag.name: getattr(self.own, flag.name) for flag in self.own.flags() if self.own.was_given(flag.name)}
        found |= {} if self.settings.seed is None else {"seed": self.settings.seed}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def check(self, args: Mapping[str, Any], kind: str) -> None:
        """UsageError for a method or a target that does not fit a model with Megatron's arguments ``args``, or that
        leaves none of a family that it could be exported as; it is imported from the family ``kind``."""
        from megatron_prune.checkpoint.layout import ModelShape
        from megatron_prune.sparse.request import SparsifyRequest

        chosen = self.choose()
        if isinstance(chosen, SparsifyRequest):
            chosen.check(ModelShape.from_args(args))
        else:
            chosen.shapes(ModelShape.from_args(args))
            chosen.refuse_unexportable_biases(args, kind)
            chosen.refuse_unexportable_layers(args, kind)

    @property
    def learning(self) -> options.OneLineLearningOptions | None:
        """How masks are learned, for a method that learns them."""
        return self.own if isinstance(self.own, options.OneLineLearningOptions) else None

    def choose(self) -> Choice | SparsifyRequest:
        """The request to the structured or sparse method."""
        from megatron_prune.pruning.prune import choose

        layout = self.settings.tensor_model_parallel_size
        return choose(self._verb, self.own, tensor_parallel=layout, seed=self.settings.seed or 0)

    def reads_text(self) -> bool:
        """Whether this pruning needs calibration text."""
        from megatron_prune.sparse.request import SparsifyRequest

        chosen = self.choose()
        if isinstance(chosen, SparsifyRequest):
            return chosen.reads_text
        return chosen.needs_statistics and not chosen.method.learned

    @property
    def _verb(self) -> verbs.PruneSettings:
        """The subset that ``prune`` of a checkpoint takes."""
        asked = self.settings
        return verbs.PruneSettings.read({name: getattr(asked, name) for name in _SHARED if asked.was_given(name)})
