"""What a method's entry in study.yaml needs, read as the verb that will run it reads it: ``plan`` or ``sparsify``.

Whatever these verbs would refuse is refused here, before anything runs; so is a recipe that cannot hold zeros.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods import options
from megatron_prune.methods.base import Retraining
from megatron_prune.methods.sheared_llama import refuse_unfit
from megatron_prune.settings import add_flags
from megatron_prune.sparse import request
from megatron_prune.structured import choice as choices
from megatron_prune.study import commands
from megatron_prune.study.prunings import learning_batch
from megatron_prune.study.schema import StudyConfig
from megatron_prune.study.sections import MethodSection, check_domains


@dataclass(frozen=True)
class Needs:
    """Inputs of a method in addition to the parent."""

    statistics: bool = False  # from a calibration, for a structured method
    scores: bool = False  # of its candidates
    text: bool = False  # a sparse method reads calibration text itself
    random: bool = False  # a seed
    retraining: Retraining | None = None  # of its best candidates
    learning: int = 0  # tokens that its masks are learned on
    heterogeneous: bool = False  # its layers may differ, so that only its plan says the shape

    @property
    def tokens(self) -> bool:
        """True if the method uses calibration text."""
        return self.statistics or self.text


def needs_of(study: StudyConfig, method: MethodSection, ratio: float | None) -> Needs:
    """The needs of ``method``. UsageError names the invalid flag."""
    batch = study.recipe.global_batch_size * study.data.seq_length
    if method.pattern is None and method.name in methods.names() and methods.get(method.name).learned:
        return _learning(study, method, ratio, batch)
    if method.tokens is not None:
        raise UsageError(
            f"methods.{method.tag}.tokens",
            got=method.tokens,
            expected="no such key",
            why=f"{method.name} learns no masks",
        )
    if method.pattern is not None:
        asked = sparse(study, method, ratio)
        return Needs(text=asked.reads_text, random=asked.method.random)
    chosen = structured(study, method, ratio)
    retraining = chosen.retraining
    if retraining and retraining.tokens % batch:
        raise UsageError(
            f"methods.{method.tag}.settings.retrain-tokens",
            got=retraining.tokens,
            expected=f"a multiple of {batch}, the tokens of a global batch",
        )  # fmt: skip
    if retraining and study.launch.nproc > study.launch.ranks_per_node:
        raise UsageError(
            f"methods.{method.tag}.settings.retrain-candidates",
            got=f"launch.nproc {study.launch.nproc}",
            expected=f"at most {study.launch.ranks_per_node} processes, those of one node",
            why="one process of the first node starts all ranks that retrain candidates",
            do="use `retrain-candidates --commands`",
        )
    _ = chosen.task  # refuses a file that is not a task
    return Needs(
        statistics=chosen.needs_statistics, scores=chosen.needs_scores, retraining=retraining,
        random=chosen.method.draws(chosen.settings), heterogeneous=chosen.heterogeneous,
    )  # fmt: skip


def _learning(study: StudyConfig, method: MethodSection, ratio: float | None, batch: int) -> Needs:
    """What a method whose masks are learned asks for."""
    if method.tokens is None or method.tokens % batch:
        raise UsageError(
            f"methods.{method.tag}.tokens",
            got="nothing" if method.tokens is None else method.tokens,
            expected=f"the tokens that its masks are learned on, a multiple of the {batch} of a global batch",
        )
    structured(study, method, ratio)
    own_batches = {name: method.settings[name] for name in commands.DYNAMIC if name in method.settings}
    where = f"methods.{method.tag}.settings"
    verbs.BatchScheduleSettings.read(own_batches, where)
    if own_batches:
        names = ("domain-validation", "reference-losses")
        check_domains(study.data, where, **{name: own_batches.get(name) for name in names})
    for name in commands.LEARNING:
        if name in commands.DYNAMIC:
            continue
        value: Any = method.settings.get(name, 1)
        kind = int if name == "global-batch-size" else float
        try:
            kind(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"methods.{method.tag}.settings.{name}", got=value, expected="a number") from error
    own, replicas = learning_batch(study, method), study.recipe.micro_batch_size * study.launch.data_parallel
    if own < 1 or own % replicas or method.tokens % (own * study.data.seq_length):
        raise UsageError(
            f"methods.{method.tag}.settings.global-batch-size",
            got=own,
            expected=f"a multiple of micro_batch_size x data parallel size = {replicas}, and tokens in whole batches",
        )
    return Needs(learning=method.tokens)


def shapes_of(
    study: StudyConfig, method: MethodSection, ratio: float | None, source: ModelShape
) -> tuple[ModelShape, ...]:
    """The resulting shape, or the shapes between which the model's loss decides."""
    if method.pattern is None:
        found = structured(study, method, ratio)
        if method.tokens is not None and found.shapes(source) != _on_one_rank(found).shapes(source):
            raise UsageError(
                f"methods.{method.tag}",
                got=f"a shape that tensor_parallel {study.launch.tensor_parallel} changes",
                expected="one that it does not",
                why="masks are learned for a shape, whatever the layout",
                do=f"set settings.divisible-by to a multiple of {study.launch.tensor_parallel}, or give a target",
            )
        for target in found.shapes(source) if method.tokens is not None else ():
            refuse_unfit(source, target)
        return found.shapes(source)
    sparse(study, method, ratio).check(source)
    return (source,)


def structured(study: StudyConfig, method: MethodSection, ratio: float | None) -> choices.Choice:
    """The method's entry as ``plan`` reads it."""
    if method.name in methods.sparse_names() and method.name not in methods.names():
        raise UsageError(
            f"methods.{method.tag}.pattern",
            got="nothing",
            expected="unstructured or N:M",
            why=f"{method.name} is sparse",
        )
    values = commands.asked(study, method, ratio)
    methods.get(method.name)  # refuse unknown names
    where = f"methods.{method.tag}.settings"
    target, own = options.read(verbs.TargetSettings, method.name, values, where)
    return choices.choose(method.name, target, own, tensor_parallel=study.launch.tensor_parallel)


def _on_one_rank(choice: choices.Choice) -> choices.Choice:
    """The same choice for one tensor-parallel rank."""
    return replace(choice, target=replace(choice.target, tensor_parallel=1))


def sparse(study: StudyConfig, method: MethodSection, ratio: float | None) -> request.SparsifyRequest:
    """The method's entry as ``sparsify`` reads it."""
    if method.name in methods.names() and method.name not in methods.sparse_names():
        raise UsageError(
            f"methods.{method.tag}.pattern",
            got=method.pattern,
            expected="no such key",
            why=f"{method.name} removes whole dimensions",
        )
    values = commands.asked(study, method, ratio)
    return request.choose(method.name, verbs.SparsitySettings.read(values, f"methods.{method.tag}.settings"), seed=0)


def refuse_recipe_without_zeros(retraining: commands.Command) -> None:
    """UsageError if ``retraining``, a run under masks, could not hold them or has unknown flags."""
    with _own_logging():
        from megatron.training.arguments import add_megatron_arguments

        from megatron_prune.training import masked

    parser = _Parser("recipe.arguments", "Megatron's flags")
    add_megatron_arguments(parser)
    add_flags(parser, verbs.PretrainSettings)
    parser.set_defaults(**verbs.PretrainSettings().to_json())
    masked.refuse_unfit_arguments(parser.parse_args(retraining.argv[1:]))


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """Restore the root logger, which Megatron's training modules set to print everything on import."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting."""

    def __init__(self, prog: str, allowed: str):
        super().__init__(prog=prog, add_help=False, allow_abbrev=False)
        self.allowed = allowed

    def error(self, message: str) -> Any:
        raise UsageError(self.prog, got=message, expected=self.allowed)
