"""What a method's entry in study.yaml asks for, read as the verb that will run it reads it: ``plan`` or ``sparsify``.

What these verbs would refuse is refused here, before anything runs; so is a recipe that cannot hold zeros.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods.base import Retraining
from megatron_prune.settings import add_flags
from megatron_prune.sparse import request
from megatron_prune.structured import choice as choices
from megatron_prune.study import commands
from megatron_prune.study.schema import StudyConfig
from megatron_prune.study.sections import MethodSection


@dataclass(frozen=True)
class Needs:
    """What a method needs in addition to the parent."""

    statistics: bool = False  # a structured method reads those of a calibration
    scores: bool = False  # of its candidates
    text: bool = False  # a sparse method reads calibration text itself
    random: bool = False  # a seed
    retraining: Retraining | None = None  # of its best candidates

    @property
    def tokens(self) -> bool:
        """True where calibration text is behind it."""
        return self.statistics or self.text


def needs_of(study: StudyConfig, method: MethodSection, ratio: float | None) -> Needs:
    """What ``method`` asks for. UsageError names the flag that is wrong."""
    if method.pattern is not None:
        asked = sparse(study, method, ratio)
        return Needs(text=asked.method.statistic != "none", random=asked.method.random)
    chosen = structured(study, method, ratio)
    retraining, batch = chosen.retraining, study.recipe.global_batch_size * study.data.seq_length
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
    _ = chosen.task  # a file that is no task is refused here
    return Needs(chosen.needs_statistics, chosen.needs_scores, random=chosen.method.random, retraining=retraining)


def shapes_of(
    study: StudyConfig, method: MethodSection, ratio: float | None, source: ModelShape
) -> tuple[ModelShape, ...]:
    """The shape that comes out, or those between which the model's loss decides."""
    if method.pattern is None:
        return structured(study, method, ratio).shapes(source)
    sparse(study, method, ratio).check(source)
    return (source,)


def structured(study: StudyConfig, method: MethodSection, ratio: float | None) -> choices.Choice:
    """The method's entry as ``plan`` will have it."""
    if method.name in methods.sparse_names() and method.name not in methods.names():
        raise UsageError(
            f"methods.{method.tag}.pattern",
            got="nothing",
            expected="unstructured or N:M",
            why=f"{method.name} is sparse",
        )
    values = commands.asked(study, method, ratio)
    where = f"methods.{method.tag}.settings"
    return choices.read(method.name, values, where=where, tensor_parallel=study.launch.tensor_parallel)


def sparse(study: StudyConfig, method: MethodSection, ratio: float | None) -> request.SparsifyRequest:
    """The method's entry as ``sparsify`` will have it."""
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
    """UsageError where ``retraining``, a run under masks, could not hold them, or has flags that there are not."""
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
    """Megatron's training modules make the root logger print everything when they are imported."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of leaving."""

    def __init__(self, prog: str, allowed: str):
        super().__init__(prog=prog, add_help=False, allow_abbrev=False)
        self.allowed = allowed

    def error(self, message: str) -> Any:
        raise UsageError(self.prog, got=message, expected=self.allowed)
