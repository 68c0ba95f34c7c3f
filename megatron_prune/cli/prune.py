"""``torchrun … -m megatron_prune prune``: calibrate, plan and apply in one command.

What the method needs is run, in order, in one load of the model (candidates that the model decides
between are scored right after the calibration), each stage leaving its file:

    SAVE/release/…                         the pruned checkpoint
    SAVE/pruning/plan.json                 what was kept, and why
    SAVE/pruning/statistics.safetensors    what the plan was made from (with its .json)

A sparse method goes the way of ``cli/sparsify.py``; ``random`` does where ``--pattern`` is given.

All flags are read, and the target is checked against the parent, before the model is loaded. Once
the statistics are gathered the other ranks leave and rank 0 goes on alone, outside any process
group, so that no collective waits (and times out) on the cutting of a large checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_prune import methods
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli import sparsify
from megatron_prune.data.multiple_choice import Requests
from megatron_prune.errors import UsageError
from megatron_prune.structured import choice as choices
from megatron_prune.structured import plan_table
from megatron_prune.structured.apply import apply_plan
from megatron_prune.structured.candidates import Question

FOLDER = "pruning"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    from megatron_prune.cli import calibrate
    from megatron_prune.engine import runtime

    name = choices.method_of(argv)
    if _is_sparse(name, argv):
        return sparsify.main(argv, "prune")
    method = methods.get(name)
    own: list[str] = []

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        own.extend(choices.add_choice_arguments(parser, method))
        return calibrate.add_arguments(parser)

    folder: Path
    choice: choices.Choice
    question: Question
    requests: Requests | None

    def complete(args: argparse.Namespace, argv: list[str]) -> None:
        nonlocal folder, choice, question, requests
        if args.save is None:
            raise UsageError("--save", got="nothing", expected="a directory for the pruned checkpoint")
        folder = Path(args.save)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError("--save", got=folder, expected="a directory that is empty or does not exist")
        seed = args.seed if method.random else None
        choice = choices.choice_from(name, method, own, args, args.tensor_model_parallel_size, seed)
        calibrate.complete(args, argv, reads_text=choice.needs_statistics)
        question = choice.question(open_checkpoint(runtime.loaded_directory(args)))
        if question.retraining:
            raise UsageError(
                "--retrain-candidates", got=question.retraining.candidates, expected="no such flag here",
                why="prune trains nothing",
                do="give it to plan, and run rescore after it",
            )  # fmt: skip
        requests = calibrate.task_requests(args, question) if question.task else None

    args = runtime.start("prune", argv, add_arguments, complete=complete)
    statistics = None
    if choice.needs_statistics:
        from megatron_prune.calibration import run  # imports Megatron, which must be started first

        statistics = run.gather(args, question if choice.needs_scores else None, requests)
    if args.rank != 0:
        return 0
    made = choice.make(question, statistics)
    plan_table.show(made)
    files = {f"{FOLDER}/plan.json": made.file()}
    if statistics is not None:
        names = ("statistics.safetensors", "statistics.json")
        files |= {f"{FOLDER}/{name}": payload for name, payload in zip(names, statistics.files(), strict=True)}
    apply_plan(runtime.loaded_directory(args), made, folder, files)
    print(f"wrote {folder}", flush=True)
    return 0


def _is_sparse(name: str, argv: list[str]) -> bool:
    """True for a sparse method; one that is structured too is meant to be sparse where a pattern says so."""
    if name not in methods.sparse_names():
        return False
    return name not in methods.names() or any(word.split("=")[0] == "--pattern" for word in argv)
