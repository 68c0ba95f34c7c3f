"""A save on CPU passes its write results in process, and between processes if it is asynchronous."""

from __future__ import annotations

import argparse
import multiprocessing
import queue


def queues() -> tuple[bool, bool, int, bool]:
    from megatron_prune.engine import cpu

    cpu.prepare()
    cpu.prepare_megatron()
    cpu.prepare_megatron()  # the second call must not wrap the first one's work
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import global_vars

    global_vars._GLOBAL_ARGS = argparse.Namespace(async_save=False)
    plain = filesystem_async.get_write_results_queue()
    same = plain is filesystem_async.get_write_results_queue()
    started = len(multiprocessing.active_children())
    global_vars._GLOBAL_ARGS = argparse.Namespace(async_save=True)
    shared = filesystem_async.get_write_results_queue("fork")
    return isinstance(plain, queue.Queue), same, started, hasattr(shared, "_manager")


def test_a_synchronous_save_starts_no_process(distributed) -> None:
    ((plain, same, started, shared),) = distributed(queues, 1)
    assert plain and same and started == 0
    assert shared
