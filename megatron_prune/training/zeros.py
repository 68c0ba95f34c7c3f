"""Keeps the zeros of a masked run inside Megatron's loop, and verifies them throughout the run.

Uses only Megatron's extension points. When the model is built (``post_wrap_hooks``, before the optimizer makes its
fp32 masters) this rank's masks are read and applied to its weights. When a step's gradients are final
(``finalize_model_grads_func``: reduced over ranks and scaled, not yet unscaled, clipped or applied) they are masked
too. With zero weights, gradients and moments, the updates of Adam and SGD and both kinds of weight decay are exactly
zero, so the zeros stay, and removed weights do not count in the clip norm.

A mask takes one byte per weight, with all bits set for a kept weight: a bitwise *and* with a gradient turns any value
into +0, even NaN, at memory speed. (On a CPU ``masked_fill_`` takes thirty times as long.)

``audit`` counts nonzero values under the masks in weights, fp32 masters and moments: when a run starts, at every
evaluation interval, before every save and at the end. A violation stops the run on all ranks.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prune import screen, storage
from megatron_prune.artifacts import copy_directory, explain_full_disk
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import MasksError
from megatron_prune.masks import MASKS, MASKS_FILE, Masks, open_masks, require_masks
from megatron_prune.masks.with_weights import check_bits
from megatron_prune.training.masked import MaskChoice

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a gradient's element
_KEPT, _REMOVED = -1, 0  # all bits, none


@dataclass(frozen=True)
class Held:
    """This rank's part of one masked weight. ``bits`` is int8 in the parameter's shape: ``_KEPT`` or ``_REMOVED``."""

    name: str  # the weight's logical name
    parameter: Any
    bits: torch.Tensor

    @staticmethod
    def make(name: str, parameter: torch.nn.Parameter, kept: torch.Tensor) -> Held:
        """``kept`` is bool; ``bits`` reuses its memory."""
        return Held(name, parameter, kept.view(torch.int8).neg_())

    @torch.no_grad()
    def clear_weight(self) -> None:
        """Zero the removed weights, also in the values that the fp32 master of an FP8 weight is made from."""
        removed = self.bits == _REMOVED
        self.parameter.masked_fill_(removed, 0)
        initial = getattr(self.parameter, "get_high_precision_init_val", lambda: None)()  # Transformer Engine's
        if initial is not None:
            initial.masked_fill_(removed.to(initial.device), 0)

    def clear_gradient(self) -> None:
        """Zero the gradient of removed weights where the optimizer will read it."""
        gradient = getattr(self.parameter, "main_grad", None)
        gradient = self.parameter.grad if gradient is None else gradient
        if gradient is not None:
            gradient.view(_INTEGERS[gradient.itemsize]).bitwise_and_(self.bits)

    def violations(self, values: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The number of ``values``, the weight's elements from ``start`` on in row-major order, that should be zero
        and are not: int64 [], on their device."""
        bits = self.bits.view(-1)[start : start + values.numel()]
        return torch.count_nonzero((values.detach().reshape(-1) != 0).logical_and_(bits == _REMOVED))  # NaN != 0


def after_gradients(config: Any, act: Callable[[], None]) -> None:
    """Have Megatron call ``act`` in each step once gradients are reduced over ranks, before they are clipped."""
    from megatron.core.distributed import finalize_model_grads

    finalize = config.transformer.finalize_model_grads_func or finalize_model_grads

    @functools.wraps(finalize)
    def finalize_and_act(*positional: Any, **named: Any) -> None:
        finalize(*positional, **named)
        act()

    config.transformer.finalize_model_grads_func = finalize_and_act


class Zeros:
    """The zeros of one run: call ``attach`` before Megatron's ``pretrain``, and ``audit`` to verify."""

    def __init__(self, args: argparse.Namespace, chosen: MaskChoice):
        self.args, self.chosen = args, chosen
        self.hash = chosen.masks.hash  # known for drawn masks once they are written
        self.held: list[Held] = []
        self._optimizer: Any = None

    @property
    def removed(self) -> int:
        """Number of weights that the masks remove from the whole model."""
        return self.chosen.masks.removed

    def attach(self, config: Any, training: Any) -> None:
        """Hook into Megatron: its model config, and the set-up and saving that its module ``training`` calls."""
        after_gradients(config, self._clear_gradients)
        config.post_wrap_hooks.append(self._take_model)
        training.setup_model_and_optimizer = self._then_audit(training.setup_model_and_optimizer)
        training.save_checkpoint = self._audit_before_save(training.save_checkpoint)
        training.training_log = self._audit_at_interval(training.training_log)

    def _clear_gradients(self) -> None:
        for held in self.held:
            held.clear_gradient()

    def _take_model(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """A post-wrap hook: read this rank's masks and zero the initial weights under them."""
        from megatron_prune.masks import megatron

        if not self.chosen.drawn:
            _check_bits(self.chosen.masks)
        self.held = [Held.make(*each) for each in megatron.local(chunks, self.chosen.masks)]
        for held in self.held:
            held.clear_weight()
        self._say(chunks)
        return chunks

    def _say(self, chunks: list[torch.nn.Module]) -> None:
        if torch.distributed.get_rank() == 0:
            parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
            size = sum(held.bits.nbytes for held in self.held)
            screen.say(
                f"holding {self.removed:,} zeros in {len(self.chosen.masks.entries)} weights, with "
                f"{size / parameters:.2f} bytes a parameter of this rank; masks {self.hash}"
            )

    def _put_beside_run(self, chunks: list[torch.nn.Module]) -> None:
        """Store the masks as the run's own, in its save directory. Collective."""
        from megatron_prune.masks import megatron

        masks, folder = self.chosen.masks, storage.path(self.args.save) / MASKS
        if self.chosen.drawn:
            kept = {held.parameter: held.bits != _REMOVED for held in self.held}
            megatron.save(folder, chunks, kept, {name: entry.pattern for name, entry in masks.entries.items()})
            self.hash = open_masks(folder).hash
            return
        if torch.distributed.get_rank() == 0:
            with explain_full_disk(folder):
                copy_directory(masks.folder, folder, last=MASKS_FILE)
        torch.distributed.barrier()

    def _then_audit(self, setup: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's set-up, which loads the checkpoint last, followed by an audit; then the run has begun."""

        @functools.wraps(setup)
        def set_up(*positional: Any, **named: Any) -> Any:
            found = setup(*positional, **named)
            self._optimizer = found[1]
            self.audit(self.chosen.start)
            if self.args.save and not self.chosen.own:
                self._put_beside_run(found[0])
            return found

        return set_up

    def _audit_before_save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        return self._audit_at(save, lambda step: True, "before the save at step")

    def _audit_at_interval(self, training_log: Callable[..., Any]) -> Callable[..., Any]:
        """Every ``--eval-interval`` steps, even if ``--eval-iters`` is 0 and Megatron does not evaluate."""
        interval = self.args.eval_interval
        return self._audit_at(training_log, lambda step: interval and step % interval == 0, "at step")

    def _audit_at(self, call: Callable[..., Any], due: Callable[[int], bool], when: str) -> Callable[..., Any]:
        """``call`` preceded by an audit at the steps that are ``due``; it has an argument ``iteration``."""
        signature = inspect.signature(call)

        @functools.wraps(call)
        def audited(*positional: Any, **named: Any) -> Any:
            step = signature.bind(*positional, **named).arguments["iteration"]
            if due(step):
                self.audit(f"{when} {step}")
            return call(*positional, **named)

        return audited

    def audit(self, when: str) -> None:
        """Raise MasksError on every rank, naming the first tensor with a nonzero removed weight. Collective."""
        audit(self.chosen.masks, self.held, self._optimizer, when)


def audit(masks: Masks, held: list[Held], optimizer: Any, when: str) -> None:
    """See ``Zeros.audit``; ``optimizer`` may be None."""
    order = {name: number for number, name in enumerate(masks.entries)}
    places, counts = [], []
    for each in held:
        for number, (what, values, start) in enumerate(_tensors(each.parameter, optimizer)):
            places.append((order[each.name], number, what, each.name))
            counts.append(each.violations(values, start))
    numbers = torch.stack(counts).tolist() if counts else []
    wrong = [(*place, count) for place, count in zip(places, numbers, strict=True) if count]
    found = _from_all_ranks(min(wrong) if wrong else None)
    if found:
        *_, what, name, count = min(found)
        raise MasksError(
            f"{when}: {what} {name} (layer {name.split('.')[2]}): {count} of its elements are not zero, although its "
            "mask removes them: resume from an earlier checkpoint"
        )


def check_loaded(model: list[torch.nn.Module], root: Path, *, allow_missing: bool = False) -> str | None:
    """Check that the weights loaded from ``root`` are zero under the masks stored there, if there are any.

    Returns the hash of the masks. Collective; raises MasksError on every rank, also if the masks that the checkpoint
    was made with are missing, unless ``allow_missing``.
    """
    from megatron_prune.masks import megatron

    folder = require_masks(open_checkpoint(root), allow_missing=allow_missing)
    if folder is None:
        return None
    masks = open_masks(folder)
    _check_bits(masks)
    audit(masks, [Held.make(*each) for each in megatron.local(model, masks)], None, str(root))
    return masks.hash


def _tensors(parameter: Any, optimizer: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(kind of tensor, values, index of the weight's element that they begin with) of all that this rank has."""
    from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

    yield "the weight", dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter, 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part is None or getattr(part, "is_stub_optimizer", False):
            continue
        main, start, state = (
            _sliced(part, parameter) if hasattr(part, "model_param_group_index_map") else _whole(part, parameter)
        )
        if main is not None and main is not parameter:
            yield "the fp32 master of", main, start
        for key, values in state.items():
            if isinstance(values, torch.Tensor) and values.numel() == main.numel():
                yield f"the optimizer's {key} of", values, start


def _sliced(part: Any, parameter: Any) -> tuple[Any, int, dict[str, Any]]:
    """For Megatron's distributed optimizer: its slice of the flat weight, the slice's start, and its moments."""
    if parameter not in part.model_param_group_index_map:
        return None, 0, {}
    group, order = part.model_param_group_index_map[parameter]
    main = part.optimizer.param_groups[group]["params"][order]
    start = part._get_model_param_range_map(parameter)["param"].start
    if main not in part.optimizer.state:  # before the first step; reading it would create it
        return main, start, {}
    state = dict(part._get_main_param_and_optimizer_states(parameter))  # unscaled, if moments are FP8
    return state.pop("param"), start, state


def _whole(part: Any, parameter: Any) -> tuple[Any, int, dict[str, Any]]:
    """For Megatron's other optimizers: the master (in fp32 the weight itself) and its moments."""
    main = getattr(parameter, "main_param", parameter)
    return main, 0, part.optimizer.state.get(main, {})


def _check_bits(masks: Masks) -> None:
    """Raise MasksError on every rank if the bits on disk differ from those that were hashed. Collective."""
    names = list(masks.entries)[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    wrong = None
    try:
        for name in names:
            check_bits(masks, name)
    except MasksError as error:
        wrong = str(error)
    found = _from_all_ranks(wrong)
    if found:
        raise MasksError(found[0])


def _from_all_ranks(value: Any) -> list[Any]:
    """The values from all ranks that are not None, the same on every rank."""
    said: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, value)
    return [each for each in said if each is not None]
