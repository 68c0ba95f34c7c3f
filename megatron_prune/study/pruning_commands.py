"""The commands of calibrations and prunings: what reads a parent and writes a smaller checkpoint, or a sparse one."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.study.budgets import SampleRange
from megatron_prune.study.commands import Command, flags, forward, layout, recipe, tokenizer
from megatron_prune.study.config import Study
from megatron_prune.study.places import Places
from megatron_prune.study.prunings import Pruning, calibration_cell
from megatron_prune.study.sections import Method


def calibration(study: Study, places: Places, pruning: Pruning) -> Command:
    """Statistics on calibration windows of what ``pruning`` starts from, for every structured method and ratio."""
    words = ["calibrate", *forward(study, places.source(study, pruning)), *_windows(study)]
    words += flags(
        {
            "seed": pruning.seed if study.calibration.sampling == "random" else None,
            "output": str(places.statistics(calibration_cell(study, pruning))),
        }
    )
    return Command("calibrate", tuple(words), study.launch.nproc)


def choice(study: Study, method: Method, ratio: float | None) -> list[str]:
    """A method, its settings and its target as flags of ``plan``; of ``sparsify``, where it is sparse."""
    if method.pattern is not None:
        asked = {"method": method.name, "pattern": method.pattern, "ratio": None if method.own_ratio else ratio}
        return flags({**asked, **method.settings})
    return flags(
        {
            "method": method.name,
            "ratio": None if method.target else ratio,
            "ratio-of": None if method.target else study.ratio_of,
            **{f"target-{name.removeprefix('target-')}": value for name, value in method.target.items()},
            **method.settings,
        }
    )


def planning(
    study: Study, places: Places, pruning: Pruning, statistics: Path | None, *, random: bool, stage: str = "plan"
) -> Command:
    """The plan of one method at one ratio or target; ``random`` methods are given the seed."""
    words = flags(
        {
            "load": str(places.source(study, pruning)),
            "statistics": None if statistics is None else str(statistics),
            "seed": pruning.seed if random else None,
            "tensor-model-parallel-size": study.launch.tensor_parallel,
            "output": str(places.plan(pruning)),
        }
    )
    return Command(stage, ("plan", *words, *choice(study, pruning.method, pruning.ratio)))


def scoring(study: Study, places: Places, pruning: Pruning) -> Command:
    """Scores of a pruning's candidates, in statistics of its own: prunings run side by side."""
    words = ["calibrate", *forward(study, places.source(study, pruning))]
    words += flags(
        {
            "score": str(places.candidates(pruning)),
            "statistics": str(places.statistics(calibration_cell(study, pruning))),
            "output": str(places.statistics(pruning.cell)),
        }
    )
    return Command("score", tuple(words), study.launch.nproc)


def rescoring(study: Study, places: Places, pruning: Pruning, samples: SampleRange) -> Command:
    """The best candidates, each trained on ``samples`` as the pruned model will be, and scored again.

    Of several learning rates they take the first.
    """
    words = flags(
        {
            "load": str(places.source(study, pruning)),
            "candidates": str(places.candidates(pruning)),
            "statistics": str(places.statistics(pruning.cell)),
            "scratch": str(places.cell(pruning.cell) / "candidates"),
            "nproc": study.launch.nproc,
        }
    )
    words += [*layout(study), *tokenizer(study), *flags(study.recipe.arguments)]
    words += ["--pretrain", *recipe(study, places, samples, pruning.seed, study.recipe.rates[0], permute=True)]
    return Command("rescore", ("rescore", *words))


def application(study: Study, places: Places, pruning: Pruning) -> Command:
    """The pruned checkpoint of a plan."""
    words = flags(
        {
            "load": str(places.source(study, pruning)),
            "plan": str(places.plan(pruning)),
            "save": str(places.checkpoint(pruning.cell)),
        }
    )
    return Command("apply", ("apply", *words))


def sparsifying(study: Study, places: Places, pruning: Pruning, *, text: bool, random: bool) -> Command:
    """The checkpoint and the masks of a sparse method, which reads calibration ``text`` by itself or none."""
    drawn = random or (text and study.calibration.sampling == "random")
    words = ["sparsify", *forward(study, places.source(study, pruning)), *(_windows(study) if text else [])]
    words += flags({"seed": pruning.seed if drawn else None, "save": str(places.checkpoint(pruning.cell))})
    words += choice(study, pruning.method, pruning.ratio)
    return Command("sparsify", tuple(words), study.launch.nproc)


def _windows(study: Study) -> list[str]:
    """Which windows of the calibration text are read."""
    return flags(
        {
            "calibration-data-path": study.data.calibration,
            "calibration-sequences": study.calibration.sequences,
            "calibration-seq-length": study.calibration_seq_length,
            "calibration-sampling": study.calibration.sampling,
        }
    )
