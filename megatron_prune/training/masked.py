"""Chooses the masks of a training run and refuses what such a run may not do; ``zeros.py`` applies them.

``--masks DIR`` names the masks of a new run; ``--random-masks SEED`` draws masks with the same pattern and counts.
They are then stored in the run's save directory, where a resumed run finds them. A run that continues another masked
run's checkpoint (``--load``) takes that run's masks.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from megatron_prune import screen, storage
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.errors import MasksError, UsageError
from megatron_prune.masks import MASKS, MASKS_FILE, Masks, Pattern, find_masks, open_masks, require_masks
from megatron_prune.training.account import ACCOUNT, read_account


@dataclass(frozen=True)
class MaskChoice:
    """The masks of a run, and where its weights come from."""

    masks: Masks  # RandomMasks if ``drawn``
    own: bool  # they are in the run's save directory already
    start: str  # the name of the weights in errors

    @property
    def drawn(self) -> bool:
        """True if the masks are not on disk yet."""
        return isinstance(self.masks, RandomMasks)


def refuse_unfit_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that cannot keep zeros, or are not proven to. Call before Megatron validates."""
    if args.random_masks is not None and args.masks is None:
        raise UsageError("--random-masks", got=f"{args.random_masks} alone", expected="--masks with it",
                         why="random masks take their pattern and counts from it")  # fmt: skip
    if args.let_zeros_fill and args.masks is not None:
        raise UsageError("--let-zeros-fill", got="both", expected="either it or --masks", why="masks hold the zeros")
    if _where(args) is None:
        return
    graphs = f"{args.cuda_graph_impl} {args.cuda_graph_modules} {args.cuda_graph_scope_deprecated}"
    shards = args.tensor_parallel_num_weight_shards
    unreached, unproven = "masks do not reach the gradients that it makes", "it is not proven to keep zeros"
    for unfit, flag, given, allowed, why in (
        (args.optimizer not in ("adam", "sgd"), "--optimizer", args.optimizer, "adam or sgd", unproven),
        (args.use_torch_fsdp2, "--use-torch-fsdp2", "on", "off", unreached),
        (
            shards not in (None, args.tensor_model_parallel_size),
            "--tensor-parallel-num-weight-shards", shards, "no such flag", unreached,
        ),
        (args.fp4, "--fp4-format", args.fp4, "no FP4", unproven),
        (
            args.reuse_grad_buf_for_mxfp8_param_ag,
            "--reuse-grad-buf-for-mxfp8-param-ag", "on", "off", "its weights and gradients share memory",
        ),
        (
            "full_iteration" in graphs.replace("full_iteration_inference", ""),
            "--cuda-graph-impl", "full_iteration", "none, local or transformer_engine", unproven,
        ),
        (args.optimizer_cpu_offload, "--optimizer-cpu-offload", "on", "off", unproven),
    ):  # fmt: skip
        if unfit:
            raise UsageError(flag, got=given, expected=f"{allowed} in a run that holds masks", why=why)


def choose(args: argparse.Namespace) -> MaskChoice | None:
    """The masks of this run, the same on every rank; None for a dense run. Starts nothing.

    Raises UsageError for flags that contradict the run in ``--save``, or for a start that the masks do not fit;
    MasksError if the masks are missing, damaged or of another model.
    """
    folder = _where(args)
    own = _own(args) is not None
    save = storage.path(args.save) if args.save else None
    account = read_account(save / ACCOUNT) if save is not None and (save / ACCOUNT).exists() else None
    if account is not None and account["masks"] is None and folder is not None:
        raise UsageError(
            "--masks", got=folder, expected="no such flag, or another --save", why=f"{args.save} holds a dense run"
        )  # fmt: skip
    if account is not None and account["masks"] is not None and not own:
        raise MasksError(
            f"{args.save}: expected the masks that the run there was trained under, got no {MASKS}: restore them from "
            "a copy"
        )
    if folder is None:
        return None
    masks = open_masks(folder)
    masks.check_model(ModelShape.from_args(vars(args)), "the model to train")
    if account is not None and masks.hash != account["masks"]:
        raise MasksError(
            f"{folder}: expected the masks that the run there was trained under, got others: restore the original masks"
        )
    if args.masks is not None:
        given = open_masks(args.masks)
        given = given if args.random_masks is None else RandomMasks(given, args.random_masks)
        if own and not _equal(given, masks):
            raise UsageError(
                "--masks", got=args.masks, expected=f"the masks of the run in {args.save}, or another --save"
            )
        masks = masks if own else given
    flag, path = ("--load", args.load) if _holds_checkpoint(args.load) else (
        "--pretrained-checkpoint", args.pretrained_checkpoint
    )  # fmt: skip
    chosen = MaskChoice(masks, own, f"{flag} {path}" if path else "the new model")
    _refuse_unfit_start(args, chosen)
    return chosen


def _where(args: argparse.Namespace) -> Path | None:
    """The masks of the run in ``--save``, of ``--masks``, or of the masked run that it continues."""
    own = _own(args)
    if own is not None or args.masks:
        return own or storage.path(args.masks)
    inherited = find_masks(args.load) if args.load and not args.finetune else None
    return inherited if inherited is not None and _holds_checkpoint(args.load) else None


def _own(args: argparse.Namespace) -> Path | None:
    """The masks of the run in ``--save``. In a store, a run killed before it began may have left a partial copy."""
    found = find_masks(args.save) if args.save else None
    if found is None or not storage.is_stored(found) or (found / MASKS_FILE).exists():
        return found
    return found if (found.parent / ACCOUNT).exists() else None


def _holds_checkpoint(path: str | None) -> bool:
    return path is not None and storage.path(path).is_dir() and find_iteration(path) is not None


def _equal(given: Masks, own: Masks) -> bool:
    """True if ``own`` equals ``given``; for drawn masks, one row of each is drawn again to compare."""
    if not isinstance(given, RandomMasks):
        return given.hash == own.hash
    described = [{n: (e.shape, e.pattern, e.removed) for n, e in masks.entries.items()} for masks in (given, own)]
    row = slice(0, 1)
    return described[0] == described[1] and all(
        torch.equal(given.read(name, row), own.read(name, row)) for name in own.entries
    )


def _refuse_unfit_start(args: argparse.Namespace, chosen: MaskChoice) -> None:
    loads = _holds_checkpoint(args.load)
    if chosen.drawn and (loads or args.pretrained_checkpoint is not None):
        raise UsageError(
            "--random-masks", got=args.random_masks, expected="a new model, without --pretrained-checkpoint and --load",
            why="it would remove weights that have been trained",
        )  # fmt: skip
    if not loads or args.finetune or args.no_load_optim or open_checkpoint(args.load).release:
        return
    beside = find_masks(args.load)
    if beside is None or open_masks(beside).hash != chosen.masks.hash:
        raise UsageError(
            "--load", got=f"{args.load}, which was not trained under these masks",
            expected="a run under the same masks",
            why="its optimizer state would move the zeros",
            do="give it as --pretrained-checkpoint, or add --finetune or --no-load-optim",
        )  # fmt: skip


def refuse_zeros_that_fill(args: argparse.Namespace) -> None:
    """Refuse a dense run that starts from a sparse checkpoint: UsageError unless ``--let-zeros-fill`` allows it,
    MasksError if its masks are lost, unless ``--allow-missing-masks`` does."""
    start = args.load if _holds_checkpoint(args.load) else args.pretrained_checkpoint
    if start is None or args.let_zeros_fill:
        return
    found = require_masks(open_checkpoint(start), allow_missing=args.allow_missing_masks)
    if found is not None:
        raise UsageError(
            "--masks", got="nothing", expected=f"{found}, which holds the zeros of {start}",
            why="without masks the zeros would become weights again, and the model would be dense",
            do="add --let-zeros-fill if that is meant",
        )  # fmt: skip


def say_that_masks_know_the_start(args: argparse.Namespace, chosen: MaskChoice) -> None:
    """Print a note if this run begins with the same initial weights as the model that the masks were made from.

    Masks made from a trained model fit its initial weights. In the quickstart such a run was 0.2 nats below others at
    its first step, and 0.3 after a hundred.
    """
    if args.shape_from is None or chosen.own or chosen.drawn or _holds_checkpoint(args.load):
        return
    if open_checkpoint(args.shape_from).args.get("seed") == args.seed:
        screen.say(
            f"--seed {args.seed} was also the seed of the model that the masks were made from, so this run begins with "
            "the same weights, which the masks fit; give another --seed for a run from scratch"
        )


_AT_A_TIME = 1 << 22  # numbers drawn; 64 MB with their order
_PER_COUNT = 4  # numbers per Philox counter value


class RandomMasks(Masks):
    """Masks drawn at random with the pattern and counts of ``masks``, for ``--random-masks SEED``.

    An unstructured mask keeps as many weights in every row as the given one, anywhere in the row; an N:M mask keeps as
    many in every group of M inputs. A row's draw depends only on the seed, the weight's name and the row's number, so
    every layout draws the same masks, and each rank draws only its own rows.
    """

    def __init__(self, masks: Masks, seed: int) -> None:
        super().__init__(masks.folder, masks.model, masks.entries, label=masks.label)
        self._seed = seed

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """A rectangle of a mask: bool [rows, columns] on the CPU, True is kept. Draws whole rows."""
        out, inputs = self.entries[name].shape
        first, last, _ = rows.indices(out)
        group = Pattern.parse(self.entries[name].pattern).m or inputs
        step = max(1, _AT_A_TIME // inputs)
        parts = [torch.empty(0, len(range(*columns.indices(inputs))), dtype=torch.bool)]
        for start in range(first, last, step):
            stop = min(start + step, last)
            given = super().read(name, slice(start, stop))
            drawn = permuted(given.numpy(), self._numbers(name, start, stop), group)
            parts.append(torch.from_numpy(drawn)[:, columns])
        return torch.cat(parts)

    def _numbers(self, name: str, start: int, stop: int) -> numpy.ndarray:
        """Random uint64 [stop - start, inputs] for these rows, independent of which rows are drawn together."""
        counts = -(-self.entries[name].shape[1] // _PER_COUNT)  # of Philox's counter in a row
        key = hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:16]
        philox = numpy.random.Philox(key=int.from_bytes(key, "little"), counter=start * counts)
        numbers = philox.random_raw((stop - start) * counts * _PER_COUNT)
        return numbers.reshape(stop - start, -1)[:, : self.entries[name].shape[1]]


def permuted(kept: numpy.ndarray, numbers: numpy.ndarray, group: int) -> numpy.ndarray:
    """Bool [rows, inputs] with as many True in every ``group`` consecutive inputs as ``kept`` has, at the
    largest of ``numbers`` [rows, inputs]."""
    rows, inputs = kept.shape
    removed = group - kept.reshape(rows, inputs // group, group).sum(-1, keepdims=True)
    order = numbers.reshape(rows, inputs // group, group).argsort(-1)
    drawn = numpy.empty(order.shape, dtype=bool)  # [rows, inputs / group, group]
    numpy.put_along_axis(drawn, order, numpy.arange(group) >= removed, -1)
    return drawn.reshape(rows, inputs)
