"""``sparsify`` in a rank that a test has changed: block inputs from a file, cached weights, a kill."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import torch

LAST_LAYER = 3


def _main(argv: list[str]) -> None:
    from megatron_prune.__main__ import main

    if code := main([str(word) for word in argv]):
        raise SystemExit(code)


def with_block_inputs(argv: list[str], folder: str, record: bool) -> None:
    """Save the inputs of each block in ``folder`` (one process), or let every block read those inputs."""
    from megatron_prune.engine import cpu

    cpu.prepare()
    from megatron.core import parallel_state as mpu

    from megatron_prune.sparse.driver import ResidualStream

    advance = ResidualStream.advance

    def advance_and_exchange(self: Any, block: Any) -> None:
        advance(self, block)
        path = Path(folder) / f"{block.layer_number}.pt"
        if record:
            torch.save(self.states, path)
        else:
            own = torch.load(path)[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
            assert [state.shape for state in own] == [state.shape for state in self.states]
            assert all((a - b).norm() < 0.1 * a.norm() for a, b in zip(own, self.states, strict=True))
            self.states = own

    ResidualStream.advance = advance_and_exchange  # type: ignore[method-assign]
    _main(argv)


def with_cached_weights(argv: list[str]) -> None:
    """Linears multiply a copy of their weights, made again only where ``is_first_microbatch`` says so: as Transformer
    Engine's do in FP8, where the copy is the cast one."""
    from megatron_prune.engine import cpu

    cpu.prepare()
    from megatron_prune.engine import runtime

    load = runtime.load_model

    def load_and_cache(args: Any) -> Any:
        model = load(args)
        for block in model[0].modules():
            for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
                if hasattr(block, name):
                    _cache(getattr(block, name))
        return model

    runtime.load_model = load_and_cache
    _main(argv)


def _cache(linear: Any) -> None:
    forward, copies = linear.forward, []
    linear.is_first_microbatch = True

    def cached(*args: Any, **named: Any) -> Any:
        own = linear.weight.data
        if linear.is_first_microbatch:
            copies[:] = [own.clone()]
        linear.is_first_microbatch = False
        linear.weight.data = copies[0]
        try:
            return forward(*args, **named)
        finally:
            linear.weight.data = own

    linear.forward = cached


def killed(argv: list[str], where: str) -> None:
    """SIGKILL every rank that reaches ``where``: in the middle of a block, or while the result is written.

    ``where`` "full": the disk is, at block 2.
    """
    from megatron_prune.engine import cpu

    cpu.prepare()
    from megatron_prune.checkpoint.writer import CheckpointWriter
    from megatron_prune.sparse.scratch import Scratch

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where.startswith("block "):  # its weights are written, but not marked as finished
        finish, last = Scratch.finish, int(where.removeprefix("block "))
        Scratch.finish = lambda self, layer, *rest: die() if layer == last else finish(self, layer, *rest)  # type: ignore
    elif where.startswith("counts "):  # the layer's are not stored
        keep_counts, last = Scratch.keep_counts, int(where.removeprefix("counts "))
        Scratch.keep_counts = lambda self, layer, counted: (  # type: ignore[method-assign]
            die() if layer == last else keep_counts(self, layer, counted)
        )
    elif where == "generation 5":
        keep = Scratch.keep_levels
        Scratch.keep_levels = lambda self, found: (  # type: ignore[method-assign]
            keep(self, found),
            die() if found.generation == 5 else None,
        )
    elif where == "full":
        from megatron_prune.sparse import scratch

        write_part = scratch.write_part

        def fill_up(folder: Path, shards: Any) -> None:
            write_part(folder, shards)
            if folder.parent.name == "block-0002":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        scratch.write_part = fill_up
    elif where == "result":
        add = CheckpointWriter.add
        CheckpointWriter.add = lambda self, name, *rest, **more: (  # type: ignore[method-assign]
            die() if "final_layernorm" in name else add(self, name, *rest, **more)
        )
    elif where == "after":  # the result is there, and its sources too
        Scratch.remove = die  # type: ignore[method-assign]
    _main(argv)
