"""Zero weights of a checkpoint, block by block, and record which.

    SAVE/release/…               the pruned checkpoint, with the same shape and stored dense
    SAVE/masks/                  which weights were removed (a kept weight may be zero)
    SAVE/pruning/sparsity.json   what was removed from each matrix, and the resulting error

``magnitude`` and ``random`` read the weights alone, streamed in blocks of rows (``sparse/weights_only.py``): no model
is built, and no model flags are needed. ``wanda`` and ``sparsegpt`` read calibration text in Megatron's model
(``sparse/driver.py``), and so does every method with ``--allocation owl`` or ``search``. The finished blocks of a
killed run are stored next to SAVE (``sparse/scratch.py``): the same command continues from there, at any layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune import screen, verbs
from megatron_prune.artifacts import check_space
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.model_arguments import refuse_unrestored
from megatron_prune.checkpoint.parallel import finite, shares
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.checkpoint.tracker import refuse_inside_checkpoint
from megatron_prune.checkpoint.writer import refuse_uncarried
from megatron_prune.claims import writing
from megatron_prune.engine import fp8, runtime
from megatron_prune.errors import UsageError
from megatron_prune.pruning import calibrate
from megatron_prune.sparse import request as requests
from megatron_prune.sparse.scratch import Scratch

if TYPE_CHECKING:
    from megatron_prune.sparse.request import SparsifyTask


def sparsify(own: verbs.SparsifySettings, words: Sequence[str], verb: str = "sparsify") -> dict[str, Any] | None:
    """Prune ``--load`` to ``--save``; ``words`` are Megatron's flags. Every rank calls it.

    Returns what was removed from each matrix, on rank 0; an empty table if an earlier run had finished.
    """
    request = requests.choose(own.method, own)
    save: Path

    def complete(args: argparse.Namespace, argv: list[str]) -> None:
        nonlocal request, save
        request = requests.choose(own.method, own, args.seed)
        if args.save is None:
            raise UsageError("--save", got="nothing", expected="a directory for the pruned checkpoint")
        save = Path(args.save)
        refuse_inside_checkpoint("--save", save)
        if args.fp8_param_gather:
            raise UsageError(
                "--fp8-param-gather", got="on", expected="off with this verb", why="it would store the weights as FP8"
            )
        calibrate.complete(args, argv, reads_text=request.reads_text)

    args = runtime.start(verb, words, own, complete=complete)
    from megatron_prune.calibration import run as calibration  # imports Megatron, which must be started first
    from megatron_prune.sparse.request import SparsifyTask

    calibration.refuse_virtual_stages(args)
    parent = open_checkpoint(runtime.loaded_directory(args))
    refuse_unrestored(parent.args, f"--load {args.load}", vars(args))
    request.check(parent.shape)
    reads_text = request.reads_text
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
    task = SparsifyTask(parent, request, windows, question, save)
    with writing(save, "pruning", args.rank):
        return _sparsify(own, args, task, read)


def _sparsify(
    own: verbs.SparsifySettings, args: argparse.Namespace, task: SparsifyTask, read: dict[str, Any] | None
) -> dict[str, Any] | None:
    from megatron_prune.sparse import driver, result, weights_only

    parent, save, question = task.parent, task.save, task.question
    if result.is_finished(task):
        if args.rank == 0:
            Scratch(save).remove()
        return {} if args.rank == 0 else None
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise UsageError("--save", got=save, expected="a directory that is empty or does not exist")
    scratch = Scratch(save)
    scratch.refuse_another(question)
    if args.rank == 0:
        check_space(save, _bytes(parent) - scratch.size)
        refuse_uncarried(parent)
    own_names = weights_of_rank(parent, args.rank, args.world_size)
    task.check_parent_masks(own_names, allow_missing=args.allow_missing_masks)
    if not own.allow_non_finite:
        check_finite(parent, own_names)
    if task.request.method.statistic != "none":
        driver.run(args, task)
    else:
        if task.request.reads_text:
            task = driver.allocate(args, task)
        elif ModelShape.from_args(vars(args)) != parent.shape:
            # The flags give another model: the error names the weight.
            runtime.refuse_unfit_checkpoint(args, args.load, "--load")
        weights_only.run(task, args.params_dtype, args.rank, args.world_size)
    return result.write(task, read) if args.rank == 0 else None


def weights_of_rank(parent: Checkpoint, rank: int, ranks: int) -> list[str]:
    """The weights that a rank checks before it meets the others. If one rank read hundreds of gigabytes alone, the
    others would time out waiting for it."""
    parts = shares({name: parent.spec(name).nbytes for name in parent.names}, ranks)
    return parts[rank] if rank < len(parts) else []


def check_finite(parent: Checkpoint, names: list[str]) -> None:
    """CheckpointError for NaN and infinities, found now and not after hours of pruning."""
    with screen.Bar(sum(parent.spec(name).nbytes for name in names), "checking that weights are finite", "B") as bar:
        for name in names:
            for block in finite(name, parent.row_blocks(name)):
                bar.advance(block.nbytes)


def _bytes(parent: Checkpoint) -> int:
    """Size of the result on disk, counting the masks and every block's scratch files."""
    weights = sum(parent.spec(name).nbytes for name in parent.names)
    return weights + 2 * parent.shape.linear_parameters() // 8
