"""``python -m megatron_prune apply``: a plan and its parent in, a smaller checkpoint out.

No model and no process group: every weight is streamed in blocks of rows from the reader, cut by
the table of layouts (``checkpoint/layout.py``), and handed to the writer, so memory is bounded by a
few blocks whatever the model's size. The writer makes the result appear whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_prune import artifacts, plan
from megatron_prune.checkpoint.layout import Kept, WeightLayout, axis_indices, layer_name, weights
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.errors import PlanError
from megatron_prune.masks import MASKS, write_single
from megatron_prune.masks.cut import check_cut, cut_masks
from megatron_prune.masks.verify import guarded, masks_of
from megatron_prune.training.account import trained_on

BLOCK_BYTES = 8 << 20  # of source rows at a time: blocks that malloc reuses cost no page faults
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="megatron_prune apply", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", required=True, metavar="CKPT", help="the parent that the plan was made for")
    parser.add_argument("--plan", required=True, metavar="PLAN.json")
    parser.add_argument("--save", required=True, metavar="CKPT", help="where the pruned checkpoint goes")
    options = parser.parse_args(argv)
    made = plan.read(options.plan)
    _keep_freed_memory()
    apply_plan(options.load, made, options.save)
    print(f"wrote {options.save}: {made.target.parameters():,} of {made.source.parameters():,} parameters")
    return 0


def _keep_freed_memory() -> None:
    """Let malloc hand freed blocks out again instead of returning them: their page faults took half the time."""
    with contextlib.suppress(AttributeError, OSError):  # glibc's alone
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 * BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 32 * BLOCK_BYTES)


def apply_plan(
    load: str | Path, made: plan.PruningPlan, save: str | Path, files: Mapping[str, bytes] | None = None
) -> None:
    """Write to ``save`` what ``made`` keeps of the checkpoint ``load``, as a release of iteration 0.

    ``files`` are small files to put beside the weights, by their path under ``save``.

    Masks beside the parent are cut along. Raises PlanError when the plan is for another parent; MasksError when the
    cut would tear the groups of N:M masks; CheckpointError from reading and writing.
    """
    parent = open_checkpoint(load)
    check_parent(parent, made)
    sources = [(target, *_source_of(target, made)) for target in weights(made.target)]
    masks = masks_of(parent)
    if masks is not None:
        check_cut(masks, sources)
    args = {**parent.args, **made.target.to_args()}
    if args.get("encoder_num_layers") is not None:  # Megatron's second name for the depth
        args["encoder_num_layers"] = made.target.num_layers
    with CheckpointWriter(
        save,
        args=args,
        dtype=parent.spec(parent.names[0]).dtype,
        pruning=[*parent.pruning, provenance(parent, made)],
        huggingface=parent.huggingface,
    ) as writer:
        for name, payload in (files or {}).items():
            writer.add_file(name, payload)
        if masks is not None:
            masks = write_single(writer.beside(MASKS), made.target, cut_masks(masks, sources))
        for target, source, kept in sources:
            blocks = cut(parent, source, kept)
            if masks is not None:
                blocks = guarded(masks, target.name, blocks)
            writer.add(target.name, target.shape, blocks, dtype=parent.spec(source).dtype)


def check_parent(parent: Checkpoint, made: plan.PruningPlan) -> None:
    """Refuse a plan that was made for another checkpoint."""
    if parent.shape != made.source:
        raise PlanError(f"the plan is for another parent: its source is {made.source}, {parent.root} is {parent.shape}")
    if parent.fingerprint() != made.parent:
        raise PlanError(
            f"the plan is for another parent: it names the weights {made.parent}, {parent.root} holds "
            f"{parent.fingerprint()}; plan for this checkpoint, or --load the one that the plan is for"
        )


def cut(parent: Checkpoint, name: str, kept: Kept) -> Iterator[torch.Tensor]:
    """What ``kept`` leaves of the weight ``name``, as blocks of rows in ascending order."""
    layout = parent.layout(name)
    rows, columns = (*(axis_indices(axis, parent.shape, kept) for axis in layout.axes), None)[:2]
    start = 0
    for block in parent.row_blocks(name, BLOCK_BYTES):
        stop = start + len(block)
        if rows is not None:
            inside = rows[torch.searchsorted(rows, start) : torch.searchsorted(rows, stop)] - start
            block = block.index_select(0, inside)
        if columns is not None:
            block = _take_columns(block, columns)
        if len(block):
            yield block
        start = stop


def _take_columns(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``block[:, columns]``: numpy's ``take`` moves the bits quickest, with indices that it need not refuse."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[block.itemsize]
    out = torch.empty(len(block), len(columns), dtype=block.dtype)
    numpy.take(block.view(bits).numpy(), columns.numpy(), axis=1, out=out.view(bits).numpy(), mode="wrap")
    return out


def _source_of(target: WeightLayout, made: plan.PruningPlan) -> tuple[str, Kept]:
    """The parent's weight that a weight of the target is cut from, and what is kept of it."""
    if target.layer is None:
        return target.suffix, Kept(hidden=made.kept_hidden)
    return layer_name(made.kept_layers[target.layer], target.suffix), made.kept(target.layer)


def provenance(parent: Checkpoint, made: plan.PruningPlan) -> dict[str, Any]:
    """This pruning's entry in the chain of ``pruning.json``."""
    spent = made.calibration or {}
    return {
        "parent": {
            "path": str(parent.root),
            "iteration": parent.iteration,
            "fingerprint": parent.fingerprint(),
        },
        "trained_on": trained_on(parent.root),
        "method": made.method,
        "settings": made.settings,
        "seed": made.seed,
        "ratio": made.ratio,
        "ratio_of": made.ratio_of,
        "removed_linears": made.removed_linears,
        "removed_all": made.removed_all,
        "source": asdict(made.source),
        "target": asdict(made.target),
        "plan": made.hash,
        "statistics": made.statistics,
        "calibration": made.calibration,
        # Spent on pruning. Candidates that are scored read the calibration's tokens again; retraining trains on more.
        "tokens": spent.get("tokens", 0) + spent.get("retraining", {}).get("tokens", 0),
        "flops": sum(part.get("flops", 0) for part in (spent, spent.get("scoring", {}), spent.get("retraining", {}))),
        "versions": artifacts.versions(),
    }
