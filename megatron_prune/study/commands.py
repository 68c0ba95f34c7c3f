"""A study's runs as command lines: lists of words, kept in each cell's cell.json, printable.

Everything after ``python -m megatron_prune`` is made here, so that a study's commands can be read before they run, and
run again by hand. A cell's directory is ``cells/<cell>/`` in the study's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.model_arguments import BY_LAYER
from megatron_prune.data import schedule
from megatron_prune.methods import options
from megatron_prune.study.grid import Teaching, TrainingCell
from megatron_prune.study.prunings import (
    Places,
    Pruning,
    calibration_cell,
    learning_batch,
    parent_cell,
    reads_gradients,
)
from megatron_prune.study.sample_ranges import SampleRange
from megatron_prune.study.schema import StudyConfig
from megatron_prune.study.sections import CORPORA, MethodSection

SAVES_WHEN_TOLD = "--exit-signal-handler"
DYNAMIC = ("dynamic-batch-every", "domain-validation", "reference-losses", "domain-samples")
LEARNING = (  # settings of `learn-masks` alone
    "mask-lr", "mask-ramp", "multiplier-lr", "lr", "weight-decay", *DYNAMIC, "global-batch-size",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One stage of a cell: its name and the words after ``python -m megatron_prune``."""

    stage: str
    argv: tuple[str, ...]
    nproc: int = 1

    @property
    def words(self) -> list[str]:
        """The full command line, for display."""
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


def parent_training(study: StudyConfig, places: Places, samples: SampleRange, seed: int = 0) -> Command:
    """Pretraining of a parent from random weights; ``seed`` is the replicate's, if each replicate has a parent."""
    pretrain = study.parent.pretrain
    assert pretrain is not None
    cell, start = parent_cell(study, seed), flags(study.parent.flags)
    return _pretrain(study, places, cell, samples, *study.parent_run(seed), start, permute=False)


def importing(study: StudyConfig, places: Places) -> Command:
    """Import of a Hugging Face parent as a Megatron checkpoint."""
    words = flags({"hf": study.parent.import_hf, "save": str(places.checkpoint("parent"))})
    return Command("import", ("convert", "import", *words))


def training(
    study: StudyConfig, places: Places, cell: TrainingCell, pruning: Pruning, shape: ModelShape | None = None
) -> Command:
    """Retraining of a pruned checkpoint, or training of its shape from random weights, optionally under its masks.

    With ``shape``, the flags say it, and no checkpoint is needed (``needs_no_pruning``).
    """
    if shape is not None:
        start = flags_of(study, shape)
    else:
        source = str(places.checkpoint(pruning.cell))
        start = ["--shape-from" if cell.kind == "scratch" else "--pretrained-checkpoint", source]
        start += ["--masks", str(places.masks(pruning))] if cell.masked else []
    start += batches(study, places, cell) + learns_from(study, places, cell)
    return _pretrain(study, places, cell.id, cell.samples, cell.seed, cell.lr, start, permute=True)


def flags_of(study: StudyConfig, shape: ModelShape) -> list[str]:
    """Flags of a shape of a study that trains its own parent."""
    return flags(study.parent.flags | shape.to_flags())


def needs_no_pruning(study: StudyConfig, cell: TrainingCell) -> bool:
    """True for a scratch run without masks whose model study.yaml describes, except for sizes that follow from the
    target: it may begin before its parent. Patterns by layer depend on which layers the pruning keeps."""
    said = {name.replace("-", "_") for name in (*study.parent.flags, *study.recipe.arguments)}
    return (
        cell.kind == "scratch" and not cell.masked and study.parent.pretrain is not None and said.isdisjoint(BY_LAYER)
    )


def batches(study: StudyConfig, places: Places, cell: TrainingCell) -> list[str]:
    """Flags of dynamic batch loading, for the runs that are compared."""
    dynamic = study.recipe.dynamic_batch
    if dynamic is None or cell.kind == "retrained":
        return []
    if cell.follows is not None:
        return flags({"batch-schedule": str(places.checkpoint(cell.follows) / schedule.FILE)})
    return flags(dynamic.flags)


def learns_from(study: StudyConfig, places: Places, cell: TrainingCell) -> list[str]:
    """Flags of the objective, if it is not Megatron's own: how a run is distilled, and from what."""
    if cell.objective == "lm":
        return []
    if cell.taught is not None:
        source = {"teacher-cache": str(places.taught(cell.taught))}
    else:
        source = {"teacher": str(places.parent(study, cell.seed))}
    return flags(study.distillation.flags | source)


def teaching(study: StudyConfig, places: Places, made: Teaching) -> Command:
    """What the parent says on a range of the stream."""
    data, settings = study.data, study.distillation
    words = ["teach", *forward(study, places.parent(study, made.seed))]
    words += flags(
        {
            "data-path": data.blend,
            "stream-seed": data.stream_seed,
            "stream-epochs": data.epochs,
            "stream-range": str(made.samples),
            "seq-length": data.seq_length,
            "micro-batch-size": study.recipe.micro_batch_size,
            "top-k": settings.top_k,
            "dtype": settings.dtype,
            "output": str(places.taught(made.id)),
        }
    )
    return Command("teach", tuple(words), study.launch.nproc)


def _pretrain(
    study: StudyConfig,
    places: Places,
    cell: str,
    samples: SampleRange,
    seed: int,
    lr: float,
    start: list[str],
    *,
    permute: bool,
) -> Command:
    save = str(places.checkpoint(cell))
    words = ["pretrain", *start, *layout(study), *tokenizer(study)]
    words += flags({"load": save, "save": save})  # a killed run resumes from its own last save
    words += recipe(study, places, samples, seed, lr, permute=permute)
    words += flags(study.recipe.arguments) + _tracking(study, places, cell)
    if study.launch.launcher == "slurm" and SAVES_WHEN_TOLD not in words:  # its job signals it before the time limit
        words.append(SAVES_WHEN_TOLD)
    return Command("pretrain", tuple(words), study.launch.nproc)


def _tracking(study: StudyConfig, places: Places, cell: str) -> list[str]:
    """Flags of Megatron's own writers; ``environment`` sets W&B's group."""
    tracking = study.tracking
    project = tracking.wandb_project
    return flags(
        {
            "tensorboard-dir": str(places.root / "tensorboard" / cell) if tracking.tensorboard else None,
            "wandb-project": project,
            "wandb-entity": tracking.wandb_entity,
            "wandb-exp-name": cell if project else None,
            "wandb-save-dir": str(places.root) if project else None,  # W&B makes a folder `wandb` in it
        }
    )


def environment(study: StudyConfig, threads: int | None) -> dict[str, str]:
    """The environment variables of every job."""
    found = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return found | ({"WANDB_RUN_GROUP": study.name} if study.tracking.wandb_project else {})


def recipe(
    study: StudyConfig,
    places: Places,
    samples: SampleRange,
    seed: int,
    lr: float,
    *,
    permute: bool,
    batch: int | None = None,
) -> list[str]:
    """Flags that all training runs of the study share, except the recipe's own ``arguments``.

    ``batch``: samples of a global batch, where they are not the recipe's.
    """
    made = study.recipe
    return flags(
        {
            "save-interval": made.save_interval,
            "data-path": study.data.blend,
            "data-cache-path": str(places.cache),
            "stream-seed": study.data.stream_seed,
            "stream-epochs": study.data.epochs,
            "stream-range": str(samples),
            "stream-permutation-seed": seed if permute else None,
            "seq-length": study.data.seq_length,
            "global-batch-size": batch or made.global_batch_size,
            "micro-batch-size": made.micro_batch_size,
            "train-iters": samples.steps,
            "seed": seed,
            "lr": lr,
            "min-lr": float(f"{lr * made.min_lr_fraction:.12g}"),
            "lr-decay-style": "cosine",
            "lr-warmup-fraction": (made.warmup_fraction or None) if made.warmup_at_most is None else None,
            "lr-warmup-iters": made.warmup_iters(samples.steps) or None,
        }
    )


def scored_corpora(study: StudyConfig) -> dict[str, str]:
    """The corpora that every model is scored on: their prefixes by label."""
    return {name: getattr(study.data, name) for name in CORPORA} | study.evaluation.corpora


def evaluation(study: StudyConfig, places: Places, cell: str, checkpoint: Path) -> Command:
    """Losses on fixed windows of all corpora, and tasks, with the model loaded once."""
    corpora, made = scored_corpora(study), study.evaluation
    words = ["evaluate", *forward(study, checkpoint)]
    words += flags(
        {
            "data-path": list(corpora.values()),
            "labels": list(corpora),
            "seq-length": study.evaluation_seq_length,
            "micro-batch-size": made.micro_batch_size or study.recipe.micro_batch_size,
            "windows": made.windows,
            "tasks": ",".join(made.lm_eval_tasks) or None,
            "tasks-path": made.tasks_path,
            "num-fewshot": made.few_shot,
            "limit": made.limit,
            "output": str(places.scores(cell)),
            "extend": True,  # corpora and tasks may be added to a study that has begun
        }
    )
    return Command("evaluate", tuple(words), study.launch.nproc)


def forward(study: StudyConfig, checkpoint: Path) -> list[str]:
    """Flags of every verb that only runs the model; the recipe's flags set its precision."""
    return ["--load", str(checkpoint), *layout(study), *tokenizer(study), *flags(study.recipe.arguments)]


def layout(study: StudyConfig) -> list[str]:
    return flags(
        {
            "tensor-model-parallel-size": study.launch.tensor_parallel,
            "pipeline-model-parallel-size": study.launch.pipeline_parallel,
        }
    )


def tokenizer(study: StudyConfig) -> list[str]:
    made = study.data.tokenizer
    return flags({"tokenizer-type": made.type, "tokenizer-model": made.model}) if made else []


# Commands of calibrations and prunings.


def calibration(study: StudyConfig, places: Places, pruning: Pruning) -> Command:
    """Statistics of the checkpoint that ``pruning`` starts from, for every structured method and ratio."""
    words = ["calibrate", *forward(study, places.source(study, pruning)), *_windows(study)]
    words += flags(
        {
            "seed": pruning.seed if study.calibration.sampling == "random" else None,
            "output": str(places.statistics(calibration_cell(study, pruning))),
            "gradients": reads_gradients(pruning),
        }
    )
    return Command("calibrate", tuple(words), study.launch.nproc)


def choice(study: StudyConfig, method: MethodSection, ratio: float | None) -> list[str]:
    """A method, its settings and its target as flags of ``plan``, or of ``sparsify`` if it is sparse."""
    given = asked(study, method, ratio)
    for flag in options.STRUCTURED.get(method.name, options.NoOptions).flags():
        if flag.is_on and (name := flag.name.replace("_", "-")) in given:
            given[flag.option.removeprefix("--")] = given.pop(name) is False
    return flags({"method": method.name, **given})


def asked(study: StudyConfig, method: MethodSection, ratio: float | None) -> dict[str, Any]:
    """A method's settings and its target by flag name, without the leading dashes."""
    if method.pattern is not None:
        return {"pattern": method.pattern, "ratio": None if method.own_ratio else ratio, **method.settings}
    return {
        "ratio": None if method.target else ratio,
        "ratio-of": None if method.target else study.ratio_of,
        **{f"target-{name.removeprefix('target-')}": value for name, value in method.target.items()},
        **{name: value for name, value in method.settings.items() if not method.tokens or name not in LEARNING},
    }


def learning_rate(study: StudyConfig, pruning: Pruning) -> float:
    """Of the weights while masks are learned: its settings', or the first of the recipe."""
    rate: Any = pruning.method.settings.get("lr", study.recipe.rates[0])
    return float(rate)


def learning(study: StudyConfig, places: Places, pruning: Pruning, samples: SampleRange) -> Command:
    """The training that learns masks."""
    settings, save = pruning.method.settings, str(places.learned(pruning))
    source = str(places.source(study, pruning))
    words = ["learn-masks", "--pretrained-checkpoint", source, "--use-checkpoint-args", *layout(study)]
    words += [*tokenizer(study), *flags({"load": save, "save": save})]
    rate, batch = learning_rate(study, pruning), learning_batch(study, pruning.method)
    words += recipe(study, places, samples, pruning.seed, rate, permute=True, batch=batch)
    own = {name: settings[name] for name in LEARNING[:-1] if name in settings and name != "lr"}
    words += flags({**study.recipe.arguments, **own, **asked(study, pruning.method, pruning.ratio)})
    if study.launch.launcher == "slurm" and SAVES_WHEN_TOLD not in words:
        words.append(SAVES_WHEN_TOLD)
    return Command("learn-masks", tuple(words), study.launch.nproc)


def _cut_from(study: StudyConfig, places: Places, pruning: Pruning) -> str:
    """The checkpoint that a plan is for: what a pruning starts from, or what was trained under its masks."""
    return str(places.learned(pruning) if pruning.method.tokens else places.source(study, pruning))


def planning(
    study: StudyConfig, places: Places, pruning: Pruning, statistics: Path | None, *, random: bool, stage: str = "plan"
) -> Command:
    """The plan of one method at one ratio or target; ``random`` methods get the seed."""
    words = flags(
        {
            "load": _cut_from(study, places, pruning),
            "statistics": None if statistics is None else str(statistics),
            "seed": pruning.seed if random else None,
            "tensor-model-parallel-size": None if pruning.method.tokens else study.launch.tensor_parallel,
            "output": str(places.plan(pruning)),
        }
    )
    return Command(stage, ("plan", *words, *choice(study, pruning.method, pruning.ratio)))


def scoring(study: StudyConfig, places: Places, pruning: Pruning) -> Command:
    """Scores of a pruning's candidates, in a separate statistics file, since prunings run in parallel."""
    words = ["calibrate", *forward(study, places.source(study, pruning))]
    words += flags(
        {
            "score": str(places.candidates(pruning)),
            "statistics": str(places.statistics(calibration_cell(study, pruning))),
            "output": str(places.statistics(pruning.cell)),
        }
    )
    return Command("score", tuple(words), study.launch.nproc)


def rescoring(study: StudyConfig, places: Places, pruning: Pruning, samples: SampleRange) -> Command:
    """Train the best candidates on ``samples`` like the pruned model, at the first learning rate; score again."""
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
    return Command("retrain-candidates", ("retrain-candidates", *words))


def application(study: StudyConfig, places: Places, pruning: Pruning) -> Command:
    """The pruned checkpoint of a plan."""
    words = flags(
        {
            "load": _cut_from(study, places, pruning),
            "plan": str(places.plan(pruning)),
            "save": str(places.checkpoint(pruning.cell)),
        }
    )
    return Command("apply", ("apply", *words))


def sparsifying(study: StudyConfig, places: Places, pruning: Pruning, *, text: bool, random: bool) -> Command:
    """The checkpoint and masks of a sparse method; ``text``: it reads calibration text."""
    drawn = random or (text and study.calibration.sampling == "random")
    words = ["sparsify", *forward(study, places.source(study, pruning)), *(_windows(study) if text else [])]
    words += flags({"seed": pruning.seed if drawn else None, "save": str(places.checkpoint(pruning.cell))})
    words += choice(study, pruning.method, pruning.ratio)
    return Command("sparsify", tuple(words), study.launch.nproc)


def _windows(study: StudyConfig) -> list[str]:
    """Flags that select windows of the calibration text."""
    return flags(
        {
            "calibration-data-path": study.data.calibration,
            "calibration-sequences": study.calibration.sequences,
            "calibration-seq-length": study.calibration_seq_length,
            "calibration-sampling": study.calibration.sampling,
        }
    )
