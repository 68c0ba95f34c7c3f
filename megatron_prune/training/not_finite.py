"""Training that has diverged: NaN or infinite weights are never saved, and the run ends with ``EXIT_NOT_FINITE``.

Megatron validates every micro-batch's loss and gradients (``--check-for-nan-in-loss-and-grad``, on by default), runs a
step that failed once more, and exits. It does not look at the first step of an attempt, nor at the last update, nor at
the weights that it saves. This module does, and says in one line what Megatron logs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.tracker import find_iteration
from megatron_prune.errors import NotFiniteError

_FOUND = ("found NaN in", "found Inf in")  # Megatron's words, and those of engine/forward.py
_REMEDY = (
    "start the same command again to rule out a fault of the machine; if it ends alike, lower --lr, clip gradients "
    "(--clip-grad) or start from other weights"
)


def guard_save(save_checkpoint: Any, is_loss_finite: Callable[[], bool], save: Path | None) -> Any:
    """Megatron's ``save_checkpoint``, which then saves no weights that are not finite."""

    @functools.wraps(save_checkpoint)
    def guarded(iteration: int, model: Any, *rest: Any, **named: Any) -> Any:
        refuse_not_finite(model, is_loss_finite(), iteration, save)
        return save_checkpoint(iteration, model, *rest, **named)

    return guarded


def refuse_not_finite(model: Sequence[torch.nn.Module], is_loss_finite: bool, step: int, save: Path | None) -> None:
    """NotFiniteError on every rank if a rank's weights, or the loss that a rank has logged, are not finite.
    Collective."""
    wrong = torch.tensor([not is_loss_finite, not _are_finite(model)], dtype=torch.int32)
    wrong = wrong.to(torch.cuda.current_device())
    torch.distributed.all_reduce(wrong, op=torch.distributed.ReduceOp.MAX)
    of_loss, of_weights = wrong.tolist()
    if of_loss or of_weights:
        from megatron.training.async_utils import maybe_finalize_async_save

        maybe_finalize_async_save(blocking=True)  # a good save may still be under way
        what = "weights are" if of_weights else "the loss is"
        raise NotFiniteError(f"{what} not finite after step {step}: {_describe_kept(save)}; {_REMEDY}")


@contextlib.contextmanager
def explain_failed_validation(save: Path | None, last_step: Callable[[], int]) -> Iterator[None]:
    """Turn the ways in which Megatron ends a run whose loss or gradients are not finite into a NotFiniteError."""
    from megatron.core import rerun_state_machine

    codes = (
        rerun_state_machine.EXIT_CODE_RESUME_TO_DISAMBIGUATE,
        rerun_state_machine.EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    )
    try:
        yield
    except (SystemExit, RuntimeError) as error:
        if isinstance(error, SystemExit) and error.code not in codes:
            raise
        if isinstance(error, RuntimeError) and not any(found in str(error) for found in _FOUND):
            raise
        raise NotFiniteError(
            f"the loss or a gradient is not finite after step {last_step()}: {_describe_kept(save)}; {_REMEDY}"
        ) from error


def _are_finite(model: Sequence[torch.nn.Module]) -> bool:
    with torch.no_grad():
        # A sum is not finite if one of its numbers is not: one pass, and no copy.
        sums = [p.sum(dtype=torch.float32) for chunk in model for p in chunk.parameters() if p.numel()]
        if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
            return True
        return all(bool(torch.isfinite(p).all()) for chunk in model for p in chunk.parameters())


def _describe_kept(save: Path | None) -> str:
    found = None if save is None else find_iteration(save)
    return "nothing was saved" if found is None else f"{save} keeps the weights of step {found.iteration}"
