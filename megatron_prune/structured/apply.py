"""Apply a plan to its parent: write the smaller checkpoint.

No model and no process group: every weight is streamed in blocks of rows from the reader, cut according to the table
of layouts (``checkpoint/layout.py``) and passed to the writer, so memory is bounded by a few blocks per process,
whatever the model's size. The writer makes the result appear complete or not at all.

``rewrite`` is the cut that removes nothing: it converts any readable checkpoint to this package's format.

Learned factors of a plan go into the weights, so that the smaller model computes what the masked one did in evaluation.
What a factor multiplies in the model (``training/gates.py``) is the input or the output of a matrix, or a norm's gain:

* hidden channels: the embedding's columns, norms' gains, the rows of ``linear_proj`` and ``linear_fc2`` and their
  biases. The final norm's gain too, but where the embedding is the output layer: there its columns have the factor;
* layers: the rows of ``linear_proj`` and ``linear_fc2`` and their biases;
* heads: the columns of ``linear_proj``; FFN channels: those of ``linear_fc2``. (The published code multiplies the value
  and up projections, which is the same function where a head has a value of its own and the MLP is gated.)

A plan with compensation adds to the biases of ``linear_proj`` and ``linear_fc2``. Where the parent has no biases, the
smaller model has zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_prune import artifacts, verbs
from megatron_prune.checkpoint.kept import Kept, axis_indices
from megatron_prune.checkpoint.layer_shapes import ENCODED, PATH
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape, WeightLayout, layer_name, weights
from megatron_prune.checkpoint.model_arguments import BY_LAYER, by_layer, refuse_unrestored, stored_argument
from megatron_prune.checkpoint.parallel import Blocks, keep_freed_memory
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter, refuse_uncarried
from megatron_prune.errors import PlanError
from megatron_prune.masks import MASKS, Masks, missing_masks, open_masks, write_single
from megatron_prune.masks.required import MISSING
from megatron_prune.masks.with_weights import Source, check_cut, cut_masks, guarded, masks_of
from megatron_prune.structured import plan
from megatron_prune.structured.compensation import RemovedInputs, removed_inputs
from megatron_prune.structured.plan import PruningPlan
from megatron_prune.training import lineage
from megatron_prune.training.account import ACCOUNT


@dataclass(frozen=True)
class Fold:
    """Factors of a weight's rows and columns, fp32; ``offset`` is added to a gain before it multiplies."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    offset: int = 0

    def multiply(self, blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """``blocks`` of consecutive rows times the factors, in fp32, in their own type."""
        first = 0
        for block in blocks:
            wide = block.float() + self.offset
            if self.rows is not None:
                rows = self.rows[first : first + len(block)]
                wide = wide * (rows[:, None] if block.ndim == 2 else rows)
            if self.columns is not None:
                wide = wide * self.columns
            first += len(block)
            yield (wide - self.offset).to(block.dtype)


@dataclass(frozen=True)
class Changes:
    """What is done to what is kept, by the smaller model's weights."""

    factors: Mapping[str, Fold] = field(default_factory=dict)
    removed: Mapping[str, RemovedInputs] = field(default_factory=dict)


def factors_of(made: PruningPlan, arguments: Mapping[str, Any]) -> dict[str, Fold]:
    """What multiplies which weight of the smaller model; nothing where the plan has no factors."""
    if made.gates is None:
        return {}
    gates, size = made.gates, made.target.kv_channels
    hidden = None if gates.hidden is None else torch.tensor(gates.hidden)
    offset = int(bool(stored_argument(arguments, "layernorm_zero_centered_gamma")))
    found: dict[str, Fold] = {}
    for weight in weights(made.target):
        layer = weight.layer
        if weight.suffix.startswith("embedding."):
            found[weight.name] = Fold(columns=hidden)
        elif weight.suffix == "decoder.final_layernorm.weight":
            found[weight.name] = Fold(rows=None if made.target.tied else hidden, offset=offset)
        elif weight.suffix.endswith("layer_norm_weight"):
            found[weight.name] = Fold(rows=hidden, offset=offset)
        elif layer is not None and "linear_proj" in weight.suffix or "linear_fc2" in weight.suffix:
            assert layer is not None
            written = None if gates.layers is None else torch.full((made.target.hidden_size,), gates.layers[layer])
            if hidden is not None:
                written = hidden if written is None else written * hidden
            read = None
            if weight.suffix.endswith("weight") and "linear_proj" in weight.suffix and gates.heads is not None:
                read = torch.tensor(gates.heads[layer]).repeat_interleave(size)
            if weight.suffix.endswith("weight") and "linear_fc2" in weight.suffix and gates.ffn is not None:
                read = torch.tensor(gates.ffn[layer])
            found[weight.name] = Fold(rows=written, columns=read)
    return {name: fold for name, fold in found.items() if fold.rows is not None or fold.columns is not None}


BLOCK_BYTES = 8 << 20  # of source rows at a time: small enough that malloc reuses blocks without page faults


def apply(asked: verbs.ApplySettings) -> plan.PruningPlan:
    """Write the pruned checkpoint that ``asked`` describes; returns the applied plan."""
    made = plan.read(asked.plan)
    keep_freed_memory()
    if asked.verify_integrity:
        open_checkpoint(asked.load).verify(hashes=True)
    apply_plan(
        asked.load,
        made,
        asked.save,
        workers=asked.workers,
        allow_non_finite=asked.allow_non_finite,
        allow_missing_masks=asked.allow_missing_masks,
    )
    return made


def apply_plan(
    load: str | Path,
    made: plan.PruningPlan,
    save: str | Path,
    files: Mapping[str, bytes] | None = None,
    *,
    workers: int = 1,
    allow_non_finite: bool = False,
    allow_missing_masks: bool = False,
) -> None:
    """Write to ``save`` what the plan ``made`` keeps of the checkpoint ``load``, as a release of iteration 0.

    ``files`` are small files to store next to the weights, by their path under ``save``. ``workers`` processes share
    the work. Masks next to the parent are cut too. Raises PlanError if the plan is for another parent, MasksError if
    the cut would split the groups of N:M masks or masks are missing (unless ``allow_missing_masks``),
    CheckpointError from reading and writing, and for weights that are not
    finite, unless ``allow_non_finite``.
    """
    parent = open_checkpoint(load)
    refuse_unrestored(parent.args, str(load))
    check_parent(parent, made)
    sources = [(target, *_source_of(target, made)) for target in weights(made.target)]
    chain = [*parent.pruning, provenance(parent, made)]
    masks = masks_of(parent, allow_missing=allow_missing_masks)
    changes = Changes(factors_of(made, parent.args), removed_inputs(made))
    _write(
        parent,
        made.target,
        made.kept_layers,
        sources,
        save,
        chain,
        files or {},
        workers,
        changes,
        allow_non_finite,
        masks,
    )


def rewrite(
    load: str | Path,
    save: str | Path,
    *,
    workers: int = 1,
    allow_non_finite: bool = False,
    allow_missing_masks: bool = False,
) -> Checkpoint:
    """Write the weights of any readable checkpoint ``load``, its masks, account and provenance, to ``save``, as a
    release of iteration 0 in `torch_dist` format, without optimizer state.

    Raises MasksError for masks that do not fit or are missing (unless ``allow_missing_masks``);
    CheckpointError from reading and writing, and for weights that are not
    finite, unless ``allow_non_finite``.
    """
    parent = open_checkpoint(load)
    refuse_unrestored(parent.args, str(load))
    all_of_it = [(layout, layout.name, Kept()) for layout in weights(parent.shape)]
    account = parent.root / ACCOUNT
    files = {ACCOUNT: account.read_bytes()} if account.exists() else {}
    layers = range(parent.shape.num_layers)
    masks = masks_of(parent, allow_missing=allow_missing_masks)
    _write(
        parent,
        parent.shape,
        layers,
        all_of_it,
        save,
        parent.pruning,
        files,
        workers,
        Changes(),
        allow_non_finite,
        masks,
    )
    return open_checkpoint(save)


def _write(
    parent: Checkpoint,
    target: ModelShape,
    kept_layers: Sequence[int],
    sources: Sequence[Source],
    save: str | Path,
    pruning: Sequence[Mapping[str, Any]],
    files: Mapping[str, bytes],
    workers: int,
    changes: Changes,
    allow_non_finite: bool,
    masks: Masks | None,
) -> None:
    refuse_uncarried(parent)
    if masks is not None:
        check_cut(masks, sources)
    args = {**parent.args, **target.to_args(), **patterns_of(parent, kept_layers)}
    if parent.args.get(ENCODED) and not isinstance(target, HeterogeneousShape):
        args |= dict.fromkeys((PATH, ENCODED))
    if args.get("encoder_num_layers") is not None:  # Megatron's second name for the depth
        args["encoder_num_layers"] = target.num_layers
    with CheckpointWriter(
        save,
        args=args,
        dtype=parent.spec(parent.names[0]).dtype,
        pruning=pruning,
        huggingface=parent.huggingface,
    ) as writer:
        for name, payload in files.items():
            writer.add_file(name, payload)
        folder = None
        if masks is not None:
            folder = write_single(writer.beside(MASKS), target, cut_masks(masks, sources)).folder
        pieces = Pieces(parent.directory, {one[0].name: one for one in sources}, folder, changes)
        writer.add_all(pieces.allowing(allow_non_finite), workers)


def patterns_of(parent: Checkpoint, kept_layers: Sequence[int]) -> dict[str, list[int]]:
    """Arguments that say for each layer whether it has RoPE or an attention window, for the kept layers."""
    whole = {name: by_layer(name, parent.args.get(name), parent.shape.num_layers) for name in BY_LAYER}
    return {name: [pattern[layer] for layer in kept_layers] for name, pattern in whole.items() if pattern is not None}


@dataclass
class Pieces(Blocks):
    """The kept blocks of every weight of the checkpoint ``load``, by the name of the smaller weight. ``masks`` is the
    folder of the smaller model's masks, which must fit; ``changes`` are made to what is kept."""

    load: Path
    sources: Mapping[str, Source]
    masks: Path | None
    changes: Changes

    @cached_property
    def _parent(self) -> Checkpoint:
        return open_checkpoint(self.load)

    @cached_property
    def _masks(self) -> Masks | None:
        return None if self.masks is None else open_masks(self.masks)

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        layout, source, kept = self.sources[name]
        if source in self._parent.names:
            blocks = cut(self._parent, source, kept)
        else:  # a bias that the parent does not have
            blocks = iter([torch.zeros(layout.shape, dtype=self.dtype(name))])
        if name in self.changes.factors:
            blocks = self.changes.factors[name].multiply(blocks)
        if name in self.changes.removed:
            more = self.changes.removed[name].output(self._parent, BLOCK_BYTES)
            blocks = iter([(torch.cat(list(blocks)).double() + more).to(self.dtype(name))])
        return blocks if self._masks is None else guarded(self._masks, name, blocks)

    def dtype(self, name: str) -> torch.dtype:
        source = self.sources[name][1]
        known = source if source in self._parent.names else source.removesuffix("bias") + "weight"
        return self._parent.spec(known).dtype


def check_parent(parent: Checkpoint, made: plan.PruningPlan) -> None:
    """Refuse a plan that was made for another checkpoint."""
    if parent.shape != made.source:
        raise PlanError(
            f"the plan is for another parent: expected {made.source}, got {parent.shape} in {parent.root}; plan for "
            "this checkpoint, or --load the one that the plan is for"
        )
    if parent.fingerprint() != made.parent:
        raise PlanError(
            f"the plan is for another parent: expected the weights {made.parent}, got {parent.fingerprint()} in "
            f"{parent.root}; plan for this checkpoint, or --load the one that the plan is for"
        )


def cut(parent: Checkpoint, name: str, kept: Kept) -> Iterator[torch.Tensor]:
    """The kept part ``kept`` of the weight ``name``, as blocks of rows in ascending order."""
    layout = parent.layout(name)
    shape = parent.shape.of_layer(layout.layer)
    rows, columns = (*(axis_indices(axis, shape, kept) for axis in layout.axes), None)[:2]
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
    """``block[:, columns]``: numpy's ``take`` copies fastest, with indices that it need not check."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[block.itemsize]
    out = torch.empty(len(block), len(columns), dtype=block.dtype)
    numpy.take(block.view(bits).numpy(), columns.numpy(), axis=1, out=out.view(bits).numpy(), mode="wrap")
    return out


def _source_of(target: WeightLayout, made: plan.PruningPlan) -> tuple[str, Kept]:
    """The parent's weight that a target weight is cut from, and what is kept of it."""
    if target.layer is None:
        return target.suffix, Kept(hidden=made.kept_hidden)
    return layer_name(made.kept_layers[target.layer], target.suffix), made.kept(target.layer)


def provenance(parent: Checkpoint, made: plan.PruningPlan) -> dict[str, Any]:
    """This pruning's entry in the chain of ``pruning.json``."""
    spent = made.calibration or {}
    missing = missing_masks(parent)
    stages, begun, learned = lineage.of(parent), parent.fingerprint(), None
    if made.gates is not None:  # the training that learned the masks is the pruning's own
        if not stages or stages[-1]["kind"] != "trained":
            raise PlanError(
                f"{parent.root}: expected a checkpoint that learn-masks trained, got one without its account"
            )
        stages, learned = stages[:-1], stages[-1]
        begun = learned["start"]
    return {
        "parent": {
            "path": str(parent.root),
            "iteration": parent.iteration,
            "fingerprint": begun,
        },
        "lineage": stages,
        **({} if learned is None else {"learned": learned}),
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
        **({} if missing is None else {MISSING: missing}),
        "statistics": made.statistics,
        "calibration": made.calibration,
        # Tokens spent on pruning. Scoring candidates reads the calibration's tokens again; retraining adds more.
        "tokens": spent.get("tokens", 0) + spent.get("retraining", {}).get("tokens", 0),
        "flops": sum(part.get("flops", 0) for part in (spent, spent.get("scoring", {}), spent.get("retraining", {}))),
        "versions": artifacts.versions(),
    }
