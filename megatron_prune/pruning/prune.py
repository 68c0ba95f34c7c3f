"""Calibrate, plan and apply in one command; for a sparse method, sparsify.

The steps that the method needs run in order, in one load of the model (candidates are scored right after the
calibration). Each step leaves its file:

    SAVE/release/…                         the pruned checkpoint
    SAVE/pruning/plan.json                 what was kept, and why
    SAVE/pruning/statistics.safetensors    what the plan was made from (with its .json)

A sparse method runs ``sparsify.py``, and so does ``random`` with ``--pattern``. A method whose masks are learned first
trains them on ``--mask-tokens`` (``learn_masks.py``) in the folder SAVE.learning, from which a killed command resumes;
``SAVE/pruning`` then holds ``learned_masks.safetensors`` in place of statistics.

All flags are read, and the target is checked against the parent, before the model is loaded. After the statistics are
gathered, the other ranks exit and rank 0 continues alone, without a process group, so that no collective waits (and
times out) while a large checkpoint is cut.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune import methods, verbs
from megatron_prune.artifacts import refuse_unwritable
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import refuse_inside_checkpoint
from megatron_prune.checkpoint.writer import refuse_uncarried
from megatron_prune.data.multiple_choice import Requests
from megatron_prune.engine import runtime
from megatron_prune.errors import RunError, UsageError
from megatron_prune.methods import options
from megatron_prune.pruning import calibrate
from megatron_prune.pruning.learn_masks import learn_masks
from megatron_prune.pruning.sparsify import sparsify
from megatron_prune.settings import Settings, either, nearest, value_of
from megatron_prune.sparse import request as requests
from megatron_prune.sparse.request import SparsifyRequest
from megatron_prune.structured import choice as choices
from megatron_prune.structured.apply import apply_plan
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.choice import Choice
from megatron_prune.structured.plan import PruningPlan
from megatron_prune.training import learned_file

FOLDER = "pruning"
# Flags of sparse methods and of those that cut units.
SHARED = ("allocation", "least_kept", "owl_threshold", "owl_bound", "search_generations")
LEARNING = ".learning"  # after the name of --save: the folder of a training under masks
# Of a training under masks, where the command does not say otherwise: the paper's, but for the batch.
TRAINING = {
    "--lr": "1e-4",
    "--lr-decay-style": "cosine",
    "--lr-warmup-fraction": "0.1",
    "--weight-decay": "0",
    "--adam-beta2": "0.95",
    "--micro-batch-size": "1",
    "--global-batch-size": "8",
}


@dataclass(frozen=True)
class PruneOutcome:
    """The result of ``prune``: a structured method's plan, or a sparse method's table of removed weights per matrix."""

    save: Path
    plan: PruningPlan | None = None
    sparsity: dict[str, Any] | None = None  # empty if an earlier run had finished


def is_sparse(asked: verbs.PruneSettings) -> bool:
    """True for a sparse method; a method of both kinds counts as sparse if a pattern is given."""
    return asked.method in options.SPARSE and (asked.method not in options.STRUCTURED or asked.was_given("pattern"))


def prune(asked: verbs.PruneSettings, own: Settings, words: Sequence[str]) -> PruneOutcome | None:
    """Prune ``--load`` to ``--save``. ``own`` are the settings of a structured method, ``words`` Megatron's flags.

    Every rank calls it; rank 0 gets the result. UsageError for settings that the method does not take.
    """
    # Refuse contradictory settings before importing Megatron, which takes seconds.
    if isinstance(choose(asked, own), SparsifyRequest):
        table = sparsify(_only(verbs.SparsifySettings, asked), words, "prune")
        return None if table is None else PruneOutcome(Path(value_of(words, "--save") or ""), sparsity=table)
    return (_learned if methods.get(asked.method).learned else _structured)(asked, own, words)


def choose(
    asked: verbs.PruneSettings, own: Settings, *, tensor_parallel: int = 1, seed: int | None = None
) -> Choice | SparsifyRequest:
    """The request to a structured or a sparse method. UsageError for an unknown method, settings that it does not
    take, or a target that contradicts itself."""
    if asked.method not in (known := sorted({*options.STRUCTURED, *options.SPARSE})):
        hint = nearest(asked.method, known)
        raise UsageError(
            "--method", expected=f"one of {', '.join(known)}", got=asked.method, do=f"did you mean {hint}?" * bool(hint)
        )
    if is_sparse(asked):
        _refuse_given(asked, verbs.ExportableSettings, "a structured --method", asked.method)
        _refuse_given(own, type(own), "no --pattern", asked.method)
        return requests.choose(asked.method, asked, seed)
    both = {flag.name: flag for flag in own.flags() if flag.name in SHARED}
    if not both and asked.was_given("allocation"):
        some = [name for name, flags in options.STRUCTURED.items() if issubclass(flags, options.UnitOptions)]
        raise UsageError(
            "--allocation", got=f"{asked.allocation} with --method {asked.method}",
            expected=f"a --method that lets layers differ ({either([*sorted(options.SPARSE), *sorted(some)])})",
        )  # fmt: skip
    _refuse_given(asked, verbs.SparsitySettings, "a sparse --method", asked.method, but=both)
    if isinstance(own, options.UnitOptions):
        both["allocation"].convert(own.allocation)  # the verb's flag takes those of sparse methods too
    if methods.get(asked.method).learned:
        if asked.exportable:
            raise UsageError("--exportable", got=f"--method {asked.method}", expected="a --method that is calibrated")
        _refuse_given(asked, verbs.CalibrationTextSettings, "a --method that is calibrated", asked.method)
        if getattr(own, "mask_tokens", None) is None:
            raise UsageError(
                "--mask-tokens",
                got="nothing",
                expected=f"the tokens that --method {asked.method} learns its masks on",
            )
        return choices.choose(asked.method, asked, options.NoOptions())  # no layout decides the shape
    chosen = choices.choose(asked.method, asked, own, tensor_parallel=tensor_parallel, seed=seed)
    chosen.check()
    return chosen


def _structured(asked: verbs.PruneSettings, own: Settings, words: Sequence[str]) -> PruneOutcome | None:
    folder: Path
    choice: choices.Choice
    question: Question
    of_task: Requests | None

    def complete(args: argparse.Namespace, argv: list[str]) -> None:
        nonlocal folder, choice, question, of_task
        folder = _new(args.save)
        layout = args.tensor_model_parallel_size
        choice = choices.choose(
            asked.method, asked, own, tensor_parallel=layout, seed=args.seed, exportable=asked.exportable
        )
        calibrate.complete(args, argv, reads_text=choice.needs_statistics, gradients=choice.needs_gradients)
        question = choice.question(open_checkpoint(runtime.loaded_directory(args)))
        of_task = calibrate.task_requests(args, question) if question.task else None

    args = runtime.start("prune", words, asked, complete=complete)
    if args.rank == 0:
        refuse_uncarried(open_checkpoint(runtime.loaded_directory(args)))
    statistics = None
    if choice.needs_statistics:
        from megatron_prune.calibration import run  # imports Megatron, which must be started first

        asked_too = question if choice.needs_scores else None
        statistics = run.gather(args, asked_too, of_task, gradients=choice.needs_gradients)
    if args.rank != 0:
        return None
    made = choice.make(question, statistics)
    files = {f"{FOLDER}/plan.json": made.file()}
    if statistics is not None:
        names = ("statistics.safetensors", "statistics.json")
        files |= {f"{FOLDER}/{name}": payload for name, payload in zip(names, statistics.files(), strict=True)}
    apply_plan(
        runtime.loaded_directory(args),
        made,
        folder,
        files,
        allow_non_finite=asked.allow_non_finite,
        allow_missing_masks=args.allow_missing_masks,
    )
    return PruneOutcome(folder, plan=made)


def _learned(asked: verbs.PruneSettings, own: Settings, words: Sequence[str]) -> PruneOutcome | None:
    """Train the masks in a folder next to ``--save``, then cut what was trained by them."""
    folder, load = _new(value_of(words, "--save")), value_of(words, "--load")
    if load is None:
        raise UsageError("--load", got="nothing", expected="the checkpoint to prune")
    if (step := value_of(words, "--ckpt-step")) is not None:  # it would choose a save of the training under masks
        raise UsageError("--ckpt-step", got=step, expected=f"no such flag with --method {asked.method}")
    work = folder.with_name(folder.name + LEARNING)
    with contextlib.suppress(SystemExit):  # Megatron's own, at --exit-interval or a signal
        learn_masks(_only(verbs.LearnMasksSettings, asked, own), _training(words, load, work))
    if os.environ["RANK"] != "0":
        return None
    if not (work / learned_file.FILE).exists():
        raise RunError(f"{work}: the masks are not learned yet; run the same command again to resume")
    choice = choices.choose(asked.method, asked, options.NoOptions())
    made = choice.make(choice.question(open_checkpoint(work)), learned_file.read(work / learned_file.FILE))
    files = {f"{FOLDER}/plan.json": made.file()}
    names = (learned_file.FILE, Path(learned_file.FILE).with_suffix(".json").name)
    files |= {f"{FOLDER}/{name}": (work / name).read_bytes() for name in names}
    apply_plan(work, made, folder, files)
    shutil.rmtree(work)
    return PruneOutcome(folder, plan=made)


def _training(words: Sequence[str], load: str, work: Path) -> list[str]:
    """Megatron's flags of the training under masks: those of ``prune``, from and to other folders, and defaults."""
    rate = value_of(words, "--lr") or TRAINING["--lr"]
    lowest = f"{float(rate) / 10:.12g}"
    found = list(words)
    for flag in ("--load", "--save"):
        while (at := next((n for n, word in enumerate(found) if word.partition("=")[0] == flag), None)) is not None:
            del found[at : at + 1 + (found[at] == flag)]
    for flag, value in {**TRAINING, "--min-lr": lowest}.items():
        if value_of(words, flag) is None:
            found += [flag, value]
    own = [] if "--use-checkpoint-args" in words else ["--use-checkpoint-args"]
    return [*found, *own, "--pretrained-checkpoint", load, "--load", str(work), "--save", str(work)]


def _new(save: str | None) -> Path:
    """The directory that is to be written; UsageError if there is none, or something in it."""
    if save is None:
        raise UsageError("--save", got="nothing", expected="a directory for the pruned checkpoint")
    folder = Path(save)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("--save", got=folder, expected="a directory that is empty or does not exist")
    refuse_inside_checkpoint("--save", folder)
    refuse_unwritable("--save", folder, kind="directory")
    return folder


def _refuse_given(asked: Settings, settings: type[Settings], only: str, method: str, but: Collection[str] = ()) -> None:
    """UsageError if one of ``settings`` was given that ``method`` does not take; all take the amount to remove, and
    this one those in ``but``."""
    for flag in settings.flags():
        if flag not in verbs.AmountSettings.flags() and flag.name not in but and asked.was_given(flag.name):
            raise UsageError(flag.option, got=f"--method {method}", expected=f"{only} with it")


def _only[S: Settings](cls: type[S], *asked: Settings) -> S:
    """The settings of ``asked`` that ``cls`` has."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls.read({name: getattr(one, name) for one in asked for name in names if one.was_given(name)})
