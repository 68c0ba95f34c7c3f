"""``python|torchrun … -m megatron_prune sparsify``: zero weights of a checkpoint, block after block, and say which.

    SAVE/release/…               the pruned checkpoint, of the same shape, dense in form
    SAVE/masks/                  which weights were removed (a kept weight may be zero)
    SAVE/pruning/sparsity.json   what went from each matrix, and the error that it makes

``magnitude`` and ``random`` look at the weights alone, which pass by in blocks of rows (``sparse/weights_only.py``):
no model is built, and no flag of one is needed. ``wanda`` and ``sparsegpt`` read calibration text in Megatron's model
(``sparse/driver.py``). What is finished of a run that was killed lies beside SAVE (``sparse/resume.py``): the same
command goes on from there, at any layout. ``prune --method wanda`` is the same verb.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prune import methods
from megatron_prune.artifacts import check_space
from megatron_prune.checkpoint.model_arguments import refuse_unrestored
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.errors import UsageError
from megatron_prune.sparse import request as requests
from megatron_prune.sparse.request import Request
from megatron_prune.sparse.resume import Scratch


def main(argv: list[str], verb: str = "sparsify") -> int:
    """Run the verb; returns the exit code."""
    from megatron_prune.cli import calibrate
    from megatron_prune.engine import fp8, runtime

    request: Request
    save: Path

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return calibrate.add_arguments(requests.add_arguments(parser))

    def complete(args: argparse.Namespace, argv: list[str]) -> None:
        nonlocal request, save
        request = requests.from_arguments(args)
        if args.save is None:
            raise UsageError("--save", got="nothing", expected="a directory for the pruned checkpoint")
        save = Path(args.save)
        if args.fp8_param_gather:
            raise UsageError(
                "--fp8-param-gather", got="on", expected="off with this verb", why="it would store the weights as FP8"
            )
        calibrate.complete(args, argv, reads_text=request.method.statistic != "none")

    argv = _with_model(argv)
    from_checkpoint = "--use-checkpoint-args" in argv
    args = runtime.start(verb, argv, add_arguments, complete=complete)
    from megatron_prune.calibration import run as calibration  # imports Megatron, which must be started first
    from megatron_prune.sparse import driver, result, weights_only
    from megatron_prune.sparse.request import Task

    calibration.refuse_virtual_stages(args)
    parent = open_checkpoint(runtime.loaded_directory(args))
    refuse_unrestored(parent.args, f"--load {args.load}", vars(args))
    request.check(parent.shape)
    reads_text = request.method.statistic != "none"
    windows = calibration.chosen_windows(args) if reads_text else None
    read = None if windows is None else calibration.provenance(args, windows)
    question = {
        "parent": parent.fingerprint(),
        "request": request.describe(),
        "calibration": None
        if windows is None or read is None
        else {"corpus": read["corpus"], "windows": read["windows"], "seq_length": windows.seq_length},
        "params_dtype": str(args.params_dtype).removeprefix("torch."),
        "fp8": fp8.describe(args) if reads_text else None,
    }
    task = Task(parent, request, windows, question, save)
    if result.is_finished(task):
        if args.rank == 0:
            Scratch(save).remove()
            print(f"{save}: this pruning is complete; nothing to do", flush=True)
        return 0
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise UsageError("--save", got=save, expected="a directory that is empty or does not exist")
    scratch = Scratch(save)
    scratch.refuse_another(question)
    if args.rank == 0:
        check_space(save, _bytes(parent) - scratch.size)
        task.check_held_masks()
    if reads_text:
        driver.run(args, task)
    else:
        if not from_checkpoint:
            runtime.refuse_unfit_checkpoint(args, args.load, "--load")
        weights_only.run(task, args.params_dtype, args.rank, args.world_size)
    if args.rank != 0:
        return 0
    show(result.write(task, read))
    print(f"wrote {save}", flush=True)
    return 0


def _with_model(argv: list[str]) -> list[str]:
    """The command line, with the checkpoint's word for the model where the method needs none and no flag says it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    first.add_argument("--load")
    first.add_argument("--num-layers")
    known = first.parse_known_args(argv)[0]
    streams = known.method in methods.sparse_names() and methods.get_sparse(known.method).statistic == "none"
    return [*argv, "--use-checkpoint-args"] if streams and known.load and not known.num_layers else argv


def _bytes(parent: Checkpoint) -> int:
    """What the result takes on disk, with masks as they are and as every block leaves them."""
    weights = sum(parent.spec(name).nbytes for name in parent.names)
    return weights + 2 * parent.shape.linear_parameters() // 8


def show(table: dict[str, Any]) -> None:
    """Print what went, summed over layers."""
    sums: dict[str, list[Any]] = defaultdict(lambda: [0, 0, []])
    for row in table["matrices"]:
        found = sums[row["matrix"]]
        found[0] += row["removed"]
        found[1] += row["rows"] * row["inputs"]
        found[2] += [row["error"]] if row["error"] is not None else []
    printed = Table(title=f"{table['method']}, {table['pattern']}")
    for column in ("matrix", "weights", "removed", "relative error (mean, most)"):
        printed.add_column(column, justify="left" if column == "matrix" else "right")
    for name, (removed, size, errors) in sums.items():
        error = f"{sum(errors) / len(errors):.4f}, {max(errors):.4f}" if errors else "–"
        printed.add_row(name, f"{size:,}", f"{removed / size:.2%}", error)
    Console(width=110, highlight=False).print(printed)
