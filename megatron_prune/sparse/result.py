"""The pruned checkpoint: blocks as the ranks wrote them, the rest as in the parent, masks, table, provenance.

One process, no process group. Only what was not pruned is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from megatron_prune import artifacts, screen
from megatron_prune.checkpoint.layout import ModelShape, layer_name, weights
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.masks import MASKS, open_masks
from megatron_prune.sparse.matrices import SUFFIXES, matrices
from megatron_prune.sparse.request import SparsifyRequest, SparsifyTask
from megatron_prune.sparse.resume import Scratch
from megatron_prune.training import lineage

TABLE = "pruning/sparsity.json"
# What the table's errors are relative to, by the statistic that the method reads.
_ERROR = {
    "hessian": "tr(dW H dW^T) / tr(W H W^T), H of the calibration inputs",
    "square_sums": "tr(dW H dW^T) / tr(W H W^T), H the diagonal of that of the calibration inputs",
    "none": "tr(dW dW^T) / tr(W W^T)",
}


def write(task: SparsifyTask, calibration: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write ``task.save`` from its finished scratch folder and remove that folder; returns the table.

    ``calibration`` describes the text that was read. Raises CheckpointError, and keeps the scratch folder, if the disk
    is full.
    """
    scratch, parent = Scratch(task.save), task.parent
    rows = scratch.done(task.layers)
    table = {
        "version": 1,
        "question": task.question,
        **task.request.describe(),
        "error": _ERROR[task.request.method.statistic],
        "matrices": [{"layer": row["layer"], **matrix} for row in rows for matrix in row["matrices"]],
    }
    pruned = {layer_name(layer, SUFFIXES[module]) for layer in task.layers for module in task.request.modules}
    with CheckpointWriter(
        task.save,
        args=parent.args,
        dtype=parent.spec(parent.names[0]).dtype,
        pruning=[*parent.pruning, _provenance(task, rows, calibration, open_masks(scratch.masks).hash)],
        huggingface=parent.huggingface,
        parts=[part for layer in task.layers for part in scratch.parts(layer)],
    ) as writer:
        writer.add_file(TABLE, artifacts.json_bytes(table))
        scratch.masks.rename(writer.beside(MASKS))
        others = [weight for weight in weights(parent.shape) if weight.name not in pruned]
        with screen.Bar(sum(parent.spec(weight.name).nbytes for weight in others), f"writing {task.save}", "B") as bar:
            for weight in others:
                blocks = bar.over(parent.row_blocks(weight.name), None)
                writer.add(weight.name, weight.shape, blocks, dtype=parent.spec(weight.name).dtype)
    scratch.remove()
    return table


def is_finished(task: SparsifyTask) -> bool:
    """True if ``task.save`` already holds the answer to the same question."""
    path = task.save / TABLE
    return path.is_file() and artifacts.read_json(path).get("question") == task.question


def _provenance(
    task: SparsifyTask, rows: Iterable[Mapping[str, Any]], calibration: Mapping[str, Any] | None, masks: str
) -> dict[str, Any]:
    """This pruning's entry in the chain of ``pruning.json``."""
    parent, request, windows = task.parent, task.request, task.windows
    shape = parent.shape
    removed = sum(matrix["removed"] for row in rows for matrix in row["matrices"])
    described = request.describe()
    asked = set(described["ratios"].values())
    return {
        "parent": {"path": str(parent.root), "iteration": parent.iteration, "fingerprint": parent.fingerprint()},
        "lineage": lineage.of(parent),
        "method": request.name,
        "settings": {key: described[key] for key in ("pattern", "ratios", "layers")},
        "pattern": described["pattern"],
        "seed": request.seed,
        "ratio": asked.pop() if len(asked) == 1 else None,
        "ratio_of": "linears",
        "removed": removed,
        "removed_linears": removed / shape.linear_parameters(),
        "removed_all": removed / shape.parameters(),
        "source": asdict(shape),
        "target": asdict(shape),
        "masks": masks,
        "calibration": None
        if calibration is None or windows is None
        else {
            "sequences": len(windows),
            "seq_length": windows.seq_length,
            "tokens": windows.predictions,
            "calibrations": [calibration],
        },
        "tokens": 0 if windows is None else windows.predictions,  # spent on pruning
        "flops": 0 if windows is None else flops(shape, request, len(windows), windows.seq_length),
        "versions": artifacts.versions(),
    }


def flops(shape: ModelShape, request: SparsifyRequest, sequences: int, seq_length: int) -> int:
    """Dense FLOPs of a pruning that reads ``sequences``: each block runs forward once or twice.

    A Hessian adds X·Xᵀ of every module's inputs, in³ to factorize it, and rows·in² to update each matrix.
    """
    chosen = request.chosen(shape)
    output = 2 * seq_length * shape.hidden_size * shape.padded_vocab_size  # not computed here
    block = (shape.forward_flops(seq_length) - output) // shape.num_layers
    found = (len(chosen) + max(chosen)) * sequences * block
    if request.method.statistic == "hessian":
        for module in request.modules:
            of_module = matrices(module, shape)
            squared = of_module[0].inputs ** 2
            updates = sum(matrix.rows for matrix in of_module)
            one = 2 * sequences * seq_length * squared + squared * (of_module[0].inputs + updates)
            found += len(chosen) * one
    return found
