"""A study's runs as command lines: lists of words, kept in each cell's cell.json, printable.

Every word after ``python -m megatron_prune`` is here, so that what a study runs can be read before
it runs, and run again by hand. Paths: a cell's directory is ``cells/<cell>/`` under the study's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune import candidates
from megatron_prune.masks import MASKS
from megatron_prune.study.budgets import SampleRange
from megatron_prune.study.config import Study
from megatron_prune.study.grid import Pruning, TrainingCell, calibration_cell
from megatron_prune.study.sections import Method

CORPORA = ("validation", "test")


@dataclass(frozen=True)
class Places:
    """Where a study's files lie."""

    root: Path  # runs/<study>

    def cell(self, name: str) -> Path:
        return self.root / "cells" / name

    def checkpoint(self, cell: str) -> Path:
        return self.cell(cell) / "checkpoint"

    def masks(self, pruning: Pruning) -> Path:
        """What a sparse pruning removed."""
        return self.checkpoint(pruning.cell) / MASKS

    def account(self, cell: str) -> Path:
        return self.checkpoint(cell) / "account.json"

    def losses(self, cell: str) -> Path:
        return self.checkpoint(cell) / "losses.csv"

    def scores(self, cell: str) -> Path:
        return self.cell(cell) / "scores.json"

    def statistics(self, cell: str) -> Path:
        return self.cell(cell) / "statistics.safetensors"

    def plan(self, pruning: Pruning) -> Path:
        return self.cell(pruning.cell) / "plan.json"

    def candidates(self, pruning: Pruning) -> Path:
        return self.cell(pruning.cell) / candidates.FILE

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def parent(self, study: Study) -> Path:
        """The parent's checkpoint: the study's own, or where study.yaml says that it lies."""
        return Path(study.parent.load) if study.parent.load else self.checkpoint("parent")


@dataclass(frozen=True)
class Command:
    """One stage of a cell: its name and the words after ``python -m megatron_prune``.

    The one that is no verb, ``import``, is the words after ``python tools/convert_checkpoint.py``.
    """

    stage: str
    argv: tuple[str, ...]
    nproc: int = 1

    @property
    def words(self) -> list[str]:
        """The whole command line, for people."""
        if self.stage == "import":
            return ["python", "tools/convert_checkpoint.py", *self.argv]
        if self.nproc == 1:
            return ["python", "-m", "megatron_prune", *self.argv]
        return ["torchrun", "--nproc-per-node", str(self.nproc), "-m", "megatron_prune", *self.argv]


def flags(mapping: Mapping[str, Any]) -> list[str]:
    """``{"bf16": True, "lr": 1e-3, "x": [1, 2], "off": False}`` → ``--bf16 --lr 0.001 --x 1 2``."""
    words: list[str] = []
    for name, value in mapping.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return words


def parent_training(study: Study, places: Places, samples: SampleRange) -> Command:
    """Pretraining of the parent from random weights."""
    pretrain = study.parent.pretrain
    assert pretrain is not None
    return _pretrain(study, places, "parent", samples, pretrain.seed, flags(pretrain.arguments), permute=False)


def importing(study: Study, places: Places) -> Command:
    """A Hugging Face parent as a Megatron checkpoint."""
    words = flags({"hf": study.parent.import_hf, "save": str(places.checkpoint("parent"))})
    return Command("import", ("import", *words))


def training(study: Study, places: Places, cell: TrainingCell) -> Command:
    """Retraining from a pruned checkpoint, or training of its shape from random weights; perhaps under its masks."""
    source = str(places.checkpoint(cell.source.cell))
    start = (
        ["--pretrained-checkpoint", source, "--use-checkpoint-args"]
        if cell.kind == "pruned"
        else ["--shape-from", source]
    )
    start += ["--masks", str(places.masks(cell.source))] if cell.masked else []
    return _pretrain(study, places, cell.id, cell.samples, cell.seed, start, permute=True)


def _pretrain(
    study: Study,
    places: Places,
    cell: str,
    samples: SampleRange,
    seed: int,
    start: list[str],
    *,
    permute: bool,
) -> Command:
    save = str(places.checkpoint(cell))
    words = ["pretrain", *start, *_layout(study), *_tokenizer(study)]
    words += flags({"load": save, "save": save})  # a run that was killed goes on from its own last save
    words += _recipe(study, places, samples, seed, permute=permute)
    return Command("pretrain", (*words, *flags(study.recipe.arguments)), study.launch.nproc)


def _recipe(study: Study, places: Places, samples: SampleRange, seed: int, *, permute: bool) -> list[str]:
    """What every training run of the study has in common, but for the recipe's own ``arguments``."""
    recipe = study.recipe
    return flags(
        {
            "save-interval": recipe.save_interval,
            "data-path": study.data.blend,
            "data-cache-path": str(places.cache),
            "stream-seed": study.data.stream_seed,
            "stream-epochs": study.data.epochs,
            "stream-range": str(samples),
            "stream-permutation-seed": seed if permute else None,
            "seq-length": study.data.seq_length,
            "global-batch-size": recipe.global_batch_size,
            "micro-batch-size": recipe.micro_batch_size,
            "train-iters": samples.steps,
            "seed": seed,
            "lr": recipe.lr,
            "min-lr": float(f"{recipe.lr * recipe.min_lr_fraction:.12g}"),
            "lr-decay-style": "cosine",
            "lr-warmup-fraction": recipe.warmup_fraction or None,
        }
    )


def evaluation(study: Study, places: Places, cell: str, checkpoint: Path) -> Command:
    """Validation and test loss on fixed windows, in one load of the model."""
    words = ["evaluate", *_forward(study, checkpoint)]
    words += flags(
        {
            "data-path": [getattr(study.data, name) for name in CORPORA],
            "labels": list(CORPORA),
            "seq-length": study.evaluation_seq_length,
            "micro-batch-size": study.evaluation.micro_batch_size or study.recipe.micro_batch_size,
            "windows": study.evaluation.windows,
            "output": str(places.scores(cell)),
        }
    )
    return Command("evaluate", tuple(words), study.launch.nproc)


def calibration(study: Study, places: Places, seed: int) -> Command:
    """Statistics of the parent on calibration windows, for every structured method and ratio."""
    words = ["calibrate", *_forward(study, places.parent(study)), *_windows(study)]
    words += flags(
        {
            "seed": seed if study.calibration.sampling == "random" else None,
            "output": str(places.statistics(calibration_cell(study, seed))),
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
            "load": str(places.parent(study)),
            "statistics": None if statistics is None else str(statistics),
            "seed": pruning.seed if random else None,
            "tensor-model-parallel-size": study.launch.tensor_parallel,
            "output": str(places.plan(pruning)),
        }
    )
    return Command(stage, ("plan", *words, *choice(study, pruning.method, pruning.ratio)))


def scoring(study: Study, places: Places, pruning: Pruning) -> Command:
    """Scores of a pruning's candidates, in statistics of its own: prunings run side by side."""
    words = ["calibrate", *_forward(study, places.parent(study))]
    words += flags(
        {
            "score": str(places.candidates(pruning)),
            "statistics": str(places.statistics(calibration_cell(study, pruning.seed))),
            "output": str(places.statistics(pruning.cell)),
        }
    )
    return Command("score", tuple(words), study.launch.nproc)


def rescoring(study: Study, places: Places, pruning: Pruning, samples: SampleRange) -> Command:
    """The best candidates, each trained on ``samples`` as the pruned model will be, and scored again."""
    words = flags(
        {
            "load": str(places.parent(study)),
            "candidates": str(places.candidates(pruning)),
            "statistics": str(places.statistics(pruning.cell)),
            "scratch": str(places.cell(pruning.cell) / "candidates"),
            "nproc": study.launch.nproc,
        }
    )
    words += [*_layout(study), *_tokenizer(study), *flags(study.recipe.arguments)]
    words += ["--pretrain", *_recipe(study, places, samples, pruning.seed, permute=True)]
    return Command("rescore", ("rescore", *words))


def application(study: Study, places: Places, pruning: Pruning) -> Command:
    """The pruned checkpoint of a plan."""
    words = flags(
        {
            "load": str(places.parent(study)),
            "plan": str(places.plan(pruning)),
            "save": str(places.checkpoint(pruning.cell)),
        }
    )
    return Command("apply", ("apply", *words))


def sparsifying(study: Study, places: Places, pruning: Pruning, *, text: bool, random: bool) -> Command:
    """The checkpoint and the masks of a sparse method, which reads calibration ``text`` by itself or none."""
    drawn = random or (text and study.calibration.sampling == "random")
    words = ["sparsify", *_forward(study, places.parent(study)), *(_windows(study) if text else [])]
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


def _forward(study: Study, checkpoint: Path) -> list[str]:
    """What every verb that only runs the model needs; the recipe's flags say its precision."""
    return [
        "--load",
        str(checkpoint),
        "--use-checkpoint-args",
        *_layout(study),
        *_tokenizer(study),
        *flags(study.recipe.arguments),
    ]


def _layout(study: Study) -> list[str]:
    return flags(
        {
            "tensor-model-parallel-size": study.launch.tensor_parallel,
            "pipeline-model-parallel-size": study.launch.pipeline_parallel,
        }
    )


def _tokenizer(study: Study) -> list[str]:
    tokenizer = study.data.tokenizer
    return flags({"tokenizer-type": tokenizer.type, "tokenizer-model": tokenizer.model}) if tokenizer else []
