"""Run a verb that builds Megatron's model from Python, without changing this process.

Megatron keeps its arguments, process groups and random states in globals set once per process. A function that
runs a model therefore starts the verb as a separate job (``engine/launch.py``: forked ranks on CPUs, torchrun on
GPUs), waits, and reads the job's files. It can be called repeatedly, in any order, from a notebook or a test. Inside
a distributed launch (``torchrun script.py``) every rank calls the function, and the verb runs in place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prune import screen
from megatron_prune.errors import EXIT_REFUSED, MegatronPruneError, RunError, UsageError

_SAID = re.compile(r"^megatron[_-]prune (?P<verb>[\w-]+): (?P<text>.*)$", re.MULTILINE)


def run(
    argv: Sequence[object],
    *,
    nproc: int = 1,
    devices: Sequence[int] | None = None,
    log: str | Path | None = None,
) -> None:
    """Run the verb ``argv[0]`` with its arguments, in ``nproc`` processes on ``devices`` (GPUs of this machine).

    The ranks' output is appended to ``log``, or goes to a temporary file that is removed on success. Raises
    MegatronPruneError with the verb's own message if the verb refused, RunError if it failed otherwise.
    """
    words = [str(word) for word in argv]
    from megatron_prune.engine.launch import launch

    environment = {} if devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
    kept = log is not None
    if log is None:
        handle, log = tempfile.mkstemp(prefix=f"megatron-prune-{words[0]}-", suffix=".log")
        os.close(handle)
    begun = Path(log).stat().st_size if Path(log).exists() else 0
    code = launch(words, nproc=nproc, log=log, env=environment)
    if code:
        raise _failure(words[0], code, Path(log), begun)
    if not kept:
        Path(log).unlink()


def is_launched() -> bool:
    """True in a rank of a distributed launch, as torchrun and srun start them."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return "RANK" in os.environ and (several or "TORCHELASTIC_RUN_ID" in os.environ)


def refuse_if_launched(what: str) -> None:
    """UsageError in a rank of a distributed launch, since ``what`` starts jobs itself."""
    if is_launched():
        raise UsageError(
            what, got=f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')} of a distributed launch",
            expected="one process: it starts the ranks itself, as many as --nproc says",
        )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Megatron's warnings that this process is not a rank and has no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    with warnings.catch_warnings():
        screen.show_missing(False)
        try:
            yield
        finally:
            logger.setLevel(level)


def flags(values: Mapping[str, Any]) -> list[str]:
    """``{"bf16": True, "seq_length": 8, "labels": ["a", "b"], "x": None}`` → ``--bf16 --seq-length 8 --labels a b``."""
    words: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False or (isinstance(value, list | tuple) and not value):
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def _failure(verb: str, code: int, log: Path, begun: int) -> MegatronPruneError:
    """The error of a failed job: the verb's own message, or the end of the log."""
    with open(log, "rb") as handle:
        handle.seek(begun)
        text = handle.read().decode(errors="replace")
    said = [found for found in _SAID.finditer(text) if found["verb"] == verb]
    if said:
        return (MegatronPruneError if code == EXIT_REFUSED else RunError)(said[-1]["text"])
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")
    return RunError(f"{verb} failed with exit code {code}: {last[:300]} (the full log is {log})")


def in_place(verb: Callable[[], object]) -> None:
    """Run the verb in this rank, then reset Megatron's globals so that another verb can run."""
    from megatron_prune.engine import cpu

    cpu.prepare()
    try:
        verb()
    finally:
        _reset()


def _reset() -> None:
    """Reset Megatron's state of this process: process groups, arguments, counters."""
    import torch.distributed
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    parallel_state.destroy_model_parallel()
    unset_num_microbatches_calculator()
    destroy_rerun_state_machine()
    destroy_global_vars()
