"""A structured method, its settings and its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.convert.config import kind_of, unexportable, why_unexportable
from megatron_prune.data import multiple_choice
from megatron_prune.errors import UsageError
from megatron_prune.methods.base import Method, Retraining
from megatron_prune.methods.options import READ_GRADIENTS, WidthOptions
from megatron_prune.settings import Settings
from megatron_prune.structured import plan
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured import target as targets
from megatron_prune.structured.candidates import Question, uses_statistics
from megatron_prune.training.learned_file import LearnedMasks


@dataclass(frozen=True)
class Choice:
    """A method, its own settings and its target; not yet checked against a model."""

    name: str
    method: Method[Any]
    settings: Settings
    target: targets.Target
    seed: int | None
    exportable: bool = False  # only shapes that a Hugging Face model can have

    def make(
        self, question: Question, statistics: statistics_file.Statistics | LearnedMasks | None
    ) -> plan.PruningPlan:
        """The plan that answers ``question``. UsageError if the layers that it chooses exceed a limit."""
        ratio, ratio_of, limits = self.target.ratio, self.target.ratio_of, self.target.limits
        made = plan.make(question, ratio=ratio, ratio_of=ratio_of, statistics=statistics)
        if (refusal := limits.refusal(made.target)) is not None:  # layers may have come out with different shapes
            raise refusal
        return made if limits.table is None else replace(made, latency=limits.table.predict(made.target))

    def question(self, parent: Checkpoint) -> Question:
        """The question about ``parent``; UsageError or DataError if the target or task is impossible."""
        chosen, task = self, self.task
        self.target.limits.refuse_other_model(parent.args, parent.spec("embedding.word_embeddings.weight").dtype)
        if self.exportable:
            self.refuse_unexportable_biases(parent.args, kind_of(parent))
            self.refuse_unexportable_layers(parent.args, kind_of(parent))
            if isinstance(parent.shape, HeterogeneousShape) and (why := unexportable(parent, parent.shape)) is not None:
                raise UsageError(
                    "--exportable", got=f"{parent.root}, whose layers differ",
                    expected="a parent that a Hugging Face model can be", why=why,
                )  # fmt: skip
            target = replace(self.target, unexportable=lambda shape: unexportable(parent, shape))
            chosen = replace(self, target=target)
        shapes = chosen.shapes(parent.shape)
        budget = None
        if self.cuts_within_budget(parent.shape):
            budget = chosen.target.budget(parent.shape, shapes[0])
        return Question(self.name, self.settings, parent.shape, shapes, parent.fingerprint(), self.seed, task, budget)

    def check(self) -> None:
        """UsageError for settings that contradict each other, whatever the parent."""
        self.method.search(self.settings)
        self.method.task(self.settings)

    def shapes(self, source: ModelShape) -> tuple[ModelShape, ...]:
        """The shape that the target makes of ``source``, or the competing shapes.

        UsageError if the target cannot be met.
        """
        search = self.method.search(self.settings)
        if isinstance(source, HeterogeneousShape) and (search is not None or self.method.learned):
            raise targets.needs_layers_of_one_shape(self.name, "it compares shapes that all layers have alike")
        if self.method.adds_biases(self.settings):
            source = source.with_biases()
        if search is None:
            shape = self.target.choose(source, self.method, self.settings)
            if self.cuts_within_budget(source):
                self.method.check_budget(self.settings, source, shape, self.target.budget(source, shape))
            return (shape,)
        return tuple(self.target.compete(source, search))

    def refuse_unexportable_biases(self, args: Mapping[str, Any], kind: str | None) -> None:
        """UsageError if a model with Megatron's arguments ``args``, of the family ``kind``, can be exported, but not
        with the biases that the method adds."""
        if not self.method.adds_biases(self.settings) or why_unexportable(args, kind) is not None:
            return
        why = why_unexportable({**args, "add_bias_linear": True}, kind)
        if why is not None:
            raise UsageError(
                "--method", got=f"{self.name}, which adds biases",
                expected="a method that leaves a model which can be exported", why=why, do="give --no-compensate",
            )  # fmt: skip

    def refuse_unexportable_layers(self, args: Mapping[str, Any], kind: str | None) -> None:
        """UsageError if a model with Megatron's arguments ``args``, of the family ``kind``, can be exported, but not
        with layers that differ, as the method's may."""
        source = ModelShape.from_args(args)
        if not self.heterogeneous or source.num_layers == 1 or why_unexportable(args, kind) is not None:
            return
        why = why_unexportable({**args, **varied(source).to_args()}, kind)
        if why is not None:
            raise UsageError(
                "--method", got=f"{self.name}, whose layers may come out with different shapes",
                expected="a method that leaves a model which can be exported", why=why, do="give --allocation uniform",
            )  # fmt: skip

    @property
    def task(self) -> str | None:
        """Fingerprint of the task that decides; DataError if its file is not a task."""
        task = self.method.task(self.settings)
        return multiple_choice.read(task.path).fingerprint if task else None

    @property
    def retraining(self) -> Retraining | None:
        """The retraining of the best candidates before one is chosen."""
        search = self.method.search(self.settings)
        return search.retraining if search else None

    @property
    def heterogeneous(self) -> bool:
        """True if layers may come out with different shapes."""
        return self.method.heterogeneous(self.settings)

    def cuts_within_budget(self, source: ModelShape) -> bool:
        """True if what is left of ``source`` need not have the shape that the target says: layers may come out with
        different shapes, or differ already and are cut."""
        if self.heterogeneous or not isinstance(source, HeterogeneousShape):
            return self.heterogeneous
        return not self.target.sizes and "num_layers" not in self.method.free_dimensions(self.settings)

    @property
    def needs_statistics(self) -> bool:
        return uses_statistics(self.method, self.settings)

    @property
    def needs_gradients(self) -> bool:
        """True if its statistics need a backward pass."""
        return self.name in READ_GRADIENTS

    @property
    def needs_scores(self) -> bool:
        return self.method.needs_scores(self.settings)


def varied(source: ModelShape) -> ModelShape:
    """``source``, of several layers, with layers that differ: an example of what a cut may leave."""
    *others, last = source.by_layer()
    return source.with_layers([*others, replace(last, ffn_hidden_size=last.ffn_hidden_size + 1)])


def choose(
    name: str,
    asked: verbs.TargetSettings,
    own: Settings,
    *,
    tensor_parallel: int = 1,
    seed: int | None = None,
    exportable: bool = False,
) -> Choice:
    """The choice that the target ``asked`` and the method's ``own`` settings describe; UsageError if they conflict.

    ``seed`` is dropped if the method draws no random numbers.
    """
    method = methods.get(name)
    method.check(own)
    shapes = (own.target_shapes or ()) if isinstance(own, WidthOptions) else ()
    target = targets.from_settings(asked, shapes, tensor_parallel)
    if asked.was_given("ffn_exponent"):
        search = method.search(own)
        shrinks = () if target.sizes or shapes else search.axes if search else method.free_dimensions(own)
        if not {"hidden_size", "ffn_hidden_size"} <= set(shrinks):
            raise UsageError(
                "--ffn-exponent", got=f"{asked.ffn_exponent:g}",
                expected="--ratio or --target-params, of a method that shrinks hidden and FFN size",
            )  # fmt: skip
    return Choice(name, method, own, target, seed if method.draws(own) else None, exportable)
