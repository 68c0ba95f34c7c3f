"""The checkpoint that ``sparsify`` writes from its scratch folder, and the table of what it removed.

The checkpoint takes over the weight files as they are (``CheckpointWriter`` adopts them), and gets the rest from the
parent: only what was not pruned is copied. One process writes it, without a process group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

from megatron_prune import artifacts, screen
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.masks import MASKS, missing_masks, open_masks
from megatron_prune.masks.required import MISSING
from megatron_prune.methods.allocation import GlobalRanking, OutlierWeighing
from megatron_prune.methods.evolution import Found
from megatron_prune.methods.level_search import Levels
from megatron_prune.sparse.matrices import matrices
from megatron_prune.sparse.request import SparsifyRequest, SparsifyTask
from megatron_prune.sparse.scratch import Scratch
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
    task = allocated(task, scratch)
    allocation: dict[str, Any] = {}
    if task.request.allocation is not None:
        allocation["layer_ratios"] = _layer_ratios(task, scratch)
    searched = scratch.levels()
    if searched is not None:
        allocation["search"] = {"step": float(task.request.grid(parent.shape).step), **searched.to_json()}
    table = {
        "version": 1,
        "question": task.question,
        **task.request.describe(),
        "error": _ERROR[task.request.method.statistic],
        **allocation,
        "matrices": [{"layer": row["layer"], **matrix} for row in rows for matrix in row["matrices"]],
    }
    with CheckpointWriter(
        task.save,
        args=parent.args,
        dtype=parent.spec(parent.names[0]).dtype,
        pruning=[*parent.pruning, _provenance(task, rows, calibration, open_masks(scratch.masks).hash, searched)],
        huggingface=parent.huggingface,
        parts=[part for layer in task.layers for part in scratch.parts(layer)],
    ) as writer:
        writer.add_file(TABLE, artifacts.json_bytes(table))
        scratch.masks.rename(writer.beside(MASKS))
        pruned = task.patterns
        others = [weight for weight in weights(parent.shape) if weight.name not in pruned]
        with screen.Bar(sum(parent.spec(weight.name).nbytes for weight in others), f"writing {task.save}", "B") as bar:
            for weight in others:
                blocks = bar.over(parent.row_blocks(weight.name), None)
                writer.add(weight.name, weight.shape, blocks, dtype=parent.spec(weight.name).dtype)
    scratch.remove()
    return table


def allocated(task: SparsifyTask, scratch: Scratch) -> SparsifyTask:
    """``task`` with every layer's ratio, where something counted or a search decides it; that is in ``scratch``."""
    request, shape = task.request, task.parent.shape
    if request.allocation is None:
        return task
    if isinstance(request.allocation, OutlierWeighing):
        sizes = [request.weights_of(shape, layer) for layer in task.layers]
        shifts = request.allocation.shifts(list(_outliers(task, scratch).values()), sizes)
    elif isinstance(request.allocation, GlobalRanking):
        counted = scratch.counts(task.layers)
        assert counted is not None
        ratio, most = request.ratio, request.most(shape, request.allocation)
        shifts = request.allocation.shifts(ratio, [row["scores"] for row in counted], most)
    else:
        found = scratch.levels()
        assert found is not None
        shifts = [level * request.grid(shape).step for level in found.allocation]
    return replace(task, request=request.allocated(shape, shifts))


def _outliers(task: SparsifyTask, scratch: Scratch) -> dict[int, Fraction]:
    """The share of outliers in each layer that is pruned, where they decide its ratio."""
    if not isinstance(task.request.allocation, OutlierWeighing):
        return {}
    counted = scratch.counts(task.layers)
    assert counted is not None
    return {row["layer"]: Fraction(row["outliers"], row["weights"]) for row in counted}


def _layer_ratios(task: SparsifyTask, scratch: Scratch) -> list[dict[str, Any]]:
    """What decided each layer's ratios, and these."""
    outliers, request = _outliers(task, scratch), task.request
    return [
        {
            "layer": layer,
            **({"outliers": float(outliers[layer])} if layer in outliers else {}),
            "ratios": {
                module: float(request.sparsity(layer, module).ratio)
                for module in request.modules_of(task.parent.shape, layer)
            },
        }
        for layer in task.layers
    ]


def is_finished(task: SparsifyTask) -> bool:
    """True if ``task.save`` already holds the answer to the same question."""
    path = task.save / TABLE
    return path.is_file() and artifacts.read_json(path).get("question") == task.question


def _provenance(
    task: SparsifyTask,
    rows: Iterable[Mapping[str, Any]],
    calibration: Mapping[str, Any] | None,
    masks: str,
    searched: Found[Levels] | None,
) -> dict[str, Any]:
    """This pruning's entry in the chain of ``pruning.json``."""
    parent, request, windows = task.parent, task.request, task.windows
    shape = parent.shape
    removed = sum(matrix["removed"] for row in rows for matrix in row["matrices"])
    described, missing = request.describe(), missing_masks(parent)
    asked = set(described["ratios"].values())
    return {
        "parent": {"path": str(parent.root), "iteration": parent.iteration, "fingerprint": parent.fingerprint()},
        "lineage": lineage.of(parent),
        "method": request.name,
        "settings": {key: described[key] for key in ("pattern", "ratios", "allocation", "layers")},
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
        **({} if missing is None else {MISSING: missing}),
        "calibration": None
        if calibration is None or windows is None
        else {
            "sequences": len(windows),
            "seq_length": windows.seq_length,
            "tokens": windows.predictions,
            "calibrations": [calibration],
        },
        "tokens": 0 if windows is None else windows.predictions,  # spent on pruning
        "flops": 0 if windows is None else flops(shape, request, len(windows), windows.seq_length, searched),
        "versions": artifacts.versions(),
    }


def flops(
    shape: ModelShape, request: SparsifyRequest, sequences: int, seq_length: int, searched: Found[Levels] | None = None
) -> int:
    """Dense FLOPs of a pruning that reads ``sequences``: each block runs forward once or twice.

    Counting outliers or scores runs each block once more; a method that reads no inputs does no more than that. A
    search runs the whole model as often as it has ``searched``, after such a pass. A Hessian adds X·Xᵀ of every
    module's inputs, in³ to factorize it, and rows·in² to update each matrix.
    """
    chosen = request.chosen(shape)
    blocks = [shape.layer_flops(layer, seq_length) for layer in range(shape.num_layers)]
    before, last = sum(blocks[: max(chosen)]), blocks[max(chosen)]
    passes = 0 if request.method.statistic == "none" else sum(blocks[layer] for layer in chosen) + before
    passes += 0 if request.allocation is None else before + last
    found = passes * sequences
    found += 0 if searched is None else searched.passes * shape.forward_flops(seq_length)
    if request.method.statistic == "hessian":
        for layer in chosen:
            for module in request.modules_of(shape, layer):
                of_module = matrices(module, shape.of_layer(layer))
                squared = of_module[0].inputs ** 2
                updates = sum(matrix.rows for matrix in of_module)
                found += 2 * sequences * seq_length * squared + squared * (of_module[0].inputs + updates)
    return found
