"""Whether a training run continues, begins, or begins again: what ``--save`` holds decides.

A ``--save`` that holds a checkpoint of a run of ours is continued, with ``--load`` or without. How a run began
(``--finetune``, ``--load`` of another folder, ``--no-load-optim``, ``--no-load-rng``) happens once and is not repeated.
``training/account.py`` then checks that it is the same run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from megatron_prune import screen, storage
from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.tracker import find_iteration, root_of
from megatron_prune.engine.from_checkpoint import has_checkpoint
from megatron_prune.errors import UsageError

ACCOUNT = "account.json"
START_OVER = "--start-over"
# Flags of a start. They have done their work when a run continues from its own save.
_START_EVENTS = ("finetune", "no_load_optim", "no_load_rng")


def resolve_start(args: argparse.Namespace) -> None:
    """Set ``args.load`` to ``--save`` if that holds the run to continue. Every rank calls it; writes nothing.

    Raises UsageError for a ``--save`` that is another flag's input or holds a checkpoint of no run.
    """
    if args.save is None:
        if args.start_over is not None:
            raise UsageError(START_OVER, got="it alone", expected="--save with the run that is moved")
        return
    save = storage.path(args.save)
    for name in ("pretrained_checkpoint", "teacher"):
        value = getattr(args, name, None)
        if value is not None and _is_same_place(value, save):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError("--save", got=args.save, expected="another directory",
                             why=f"it holds the checkpoint of {flag}, which the run would write over")  # fmt: skip
    loads_save = args.load is not None and _is_same_place(args.load, save)
    if args.start_over is not None and _needs_move(args, save):
        args.load = None if loads_save else args.load
        return
    if not has_checkpoint(args.save):
        return
    if not (save / ACCOUNT).exists():
        _check_foreign(args, save, loads_save)
        return
    if args.rank == 0:
        _check_same_start(args, save, None if loads_save else args.load)
    if args.load is not None and not loads_save:
        args.ckpt_step = None  # of the other folder
    args.load = args.save
    _drop_start_events(args, save)


def move_old_run(args: argparse.Namespace) -> None:
    """Move what ``--save`` holds to ``--start-over``, unless that is done: rank 0 does it, the others wait for it."""
    if args.start_over is None:
        return
    save, aside = storage.path(args.save), storage.path(args.start_over)
    if args.rank == 0 and _needs_move(args, save):
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            save.rename(aside)
        except OSError as error:
            raise UsageError(START_OVER, got=args.start_over, expected=f"a path to which {save} can be renamed",
                             why=error.strerror or str(error)) from error  # fmt: skip
        screen.say(f"moved {save} to {aside}; the run begins again")
    while not aside.exists():  # the launcher ends this rank if rank 0 fails
        time.sleep(0.2)


def _needs_move(args: argparse.Namespace, save: Path) -> bool:
    """True until the old run has been moved; UsageError for places where it cannot be."""
    aside = storage.path(args.start_over)
    for place in (args.save, args.start_over):
        storage.refuse_stored(START_OVER, place, "object stores cannot rename folders: choose another --save")
    if save.absolute() in (aside.absolute(), *aside.absolute().parents):
        raise UsageError(START_OVER, got=args.start_over, expected=f"a path outside {args.save}")
    if aside.exists():
        if not (aside / ACCOUNT).exists() and not has_checkpoint(str(aside)):
            raise UsageError(START_OVER, got=args.start_over, expected="a path that does not exist yet")
        return False
    if not save.is_dir() or not any(save.iterdir()):
        raise UsageError(START_OVER, got=args.start_over, expected="no such flag",
                         why=f"{args.save} holds no run to move there")  # fmt: skip
    return True


def _check_foreign(args: argparse.Namespace, save: Path, loads_save: bool) -> None:
    """UsageError unless a checkpoint without an account is one of plain Megatron that ``--load`` continues."""
    found = find_iteration(save)
    assert found is not None
    if loads_save and not found.release and not args.finetune:
        return
    do = f"give another --save, or move what is there with {START_OVER} DIR"
    if loads_save:
        why = "the run would write over the checkpoint that it begins with"
        do = "give another --save; the checkpoint to begin with can also be --pretrained-checkpoint"
    else:
        why = f"it holds a checkpoint and no {ACCOUNT}, so it is not known to be of this run"
        do += "" if found.release else "; to continue a run of plain Megatron, give it as --load too"
    raise UsageError("--save", got=args.save, expected="a new directory", why=why, do=do)


def _check_same_start(args: argparse.Namespace, save: Path, load: str | None) -> None:
    """UsageError if the run in ``save`` did not begin with the checkpoint that the command line names.

    Which weights they are decides, not where they are. A ``--load`` may have gone on since, at its old path.
    """
    held = _read_account(save)
    initial = held.get("initial") or {}
    for flag, path in (("--load", load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if path is None or not has_checkpoint(path):
            continue
        began_here = _is_same_place(str(initial.get("path") or "/"), storage.path(path))
        if flag == "--load" and (began_here or args.pretrained_checkpoint is not None):
            continue
        if open_checkpoint(path).fingerprint() != initial.get("fingerprint"):
            began = f"the weights of {initial['path']}" if initial else "random weights"
            raise UsageError(
                flag, got=path, expected=f"the checkpoint that the run in {args.save} began with",
                why=f"that run began with {began}", do=f"give another --save, or {START_OVER} DIR",
            )  # fmt: skip


def _read_account(save: Path) -> dict[str, Any]:
    found = read_json(save / ACCOUNT)
    return found if isinstance(found, dict) else {}


def _drop_start_events(args: argparse.Namespace, save: Path) -> None:
    """Switch off the flags that the run began with; UsageError for one that it did not begin with."""
    began = _read_account(save).get("arguments") or {}
    for name in _START_EVENTS:
        if not getattr(args, name):
            continue
        if not began.get(name):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                flag, got="it", expected="no such flag", why=f"{args.save} holds a run that began without it",
                do="give another --save to begin a new run",
            )  # fmt: skip
        setattr(args, name, False)


def _is_same_place(path: str, save: Path) -> bool:
    """True if the checkpoint ``path`` is in ``save``: links are followed, and ``iter_…`` folders are part of a run."""
    root, folder = root_of(path), storage.path(save)
    if storage.is_stored(path) or storage.is_stored(save):
        return str(root).rstrip("/") == str(folder).rstrip("/")
    return root_of(Path(root).resolve()) == root_of(folder.resolve())
