"""Which of Megatron's flags work with checkpoints in an object store (``msc://``), and which do not.

Megatron reads and writes them through the Multi-Storage Client under ``--enable-msc``. Some of what it does beside that
still takes a ``msc://`` path for a directory of this machine: that is refused here, before anything starts.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence

from megatron_prune import storage
from megatron_prune.checkpoint.foreign import refuse_remote
from megatron_prune.errors import UsageError

_CONVERTED = "--ckpt-convert-save"
_FLAGS = ("--load", "--save", "--pretrained-checkpoint", "--shape-from", "--masks", _CONVERTED)


def refuse_unusable(verb: str, argv: Sequence[str]) -> None:
    """Refuse (UsageError) a command line whose stores ``verb`` cannot use from here, before Megatron reads it."""
    refuse_malformed(argv)
    if "--enable-msc" in argv and importlib.util.find_spec("multistorageclient") is None:
        raise UsageError("--enable-msc", given="on", allowed="off: the client is not installed", why=storage.EXTRA)
    for flag, value in _checkpoints(argv):
        if flag == "--save" and verb != "pretrain":
            refuse_remote(flag, value)
        storage.refuse_unusable(flag, value)


def refuse_malformed(argv: Sequence[str]) -> None:
    """Refuse (UsageError) what no machine could run: other URLs, and ``msc://`` without ``--enable-msc``."""
    for flag, value in _checkpoints(argv):
        if flag == _CONVERTED:
            storage.refuse_stored(flag, value, "Megatron's converter writes to disks")
        storage.refuse_other_url(flag, value)
        if storage.is_stored(value) and "--enable-msc" not in argv:
            raise UsageError(
                flag, given=value, allowed="an object store only with --enable-msc",
                why="Megatron reads and writes them through its Multi-Storage Client, which that flag switches on",
            )  # fmt: skip


def _checkpoints(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(flag, value) of all that say where a checkpoint lies."""
    for position, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag in _FLAGS:
            yield flag, value or (argv[position + 1] if position + 1 < len(argv) else "")


def refuse_unfit(args: argparse.Namespace) -> None:
    """Refuse (UsageError) what Megatron would do to ``--save`` as if it were a directory."""
    if args.save is None or not storage.is_stored(args.save):
        return
    for unfit, flag, given, allowed, why in (
        (
            args.ckpt_format != "torch_dist", "--ckpt-format", args.ckpt_format, "torch_dist",
            "Megatron writes the others with torch.save, to disks",
        ),
        (
            args.save_retain_interval is not None, "--save-retain-interval", args.save_retain_interval, "nothing",
            "Megatron removes saves with shutil.rmtree, which leaves those in a store: let the store expire them",
        ),
        (args.log_progress, "--log-progress", "on", "off", "Megatron appends to a file there"),
        (
            args.non_persistent_ckpt_type == "global" and args.non_persistent_global_ckpt_dir is None,
            "--non-persistent-ckpt-type", "global", "local, or with a --non-persistent-global-ckpt-dir on a disk",
            "Megatron removes the older of them with shutil.rmtree",
        ),
        (
            args.wandb_project and not args.wandb_save_dir,
            "--wandb-save-dir", "nothing", "a directory", "by default it is in --save",
        ),
    ):  # fmt: skip
        if unfit:
            raise UsageError(flag, given=given, allowed=f"{allowed}, where --save is in an object store", why=why)
