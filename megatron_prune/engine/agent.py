"""torchrun's agent of one node, for ``launch/node.sh``: ``python -m megatron_prune.engine.agent <words of torchrun>``.

torchrun restarts a job after every failure. This agent does not when a rank exits with ``EXIT_REFUSED``: the same
command would be refused again. It then exits with that code too, which Slurm and Kubernetes see.

When a job ends, the agent that holds the rendezvous store may leave before the others. They then print one line, not
tracebacks that hide what the run printed last, and their ranks have ``GRACE`` seconds to end by themselves.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_prune.errors import EXIT_REFUSED

GRACE = 30.0
_LOGGERS = (
    "torch.distributed.launcher.api",
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
    "torch.distributed.elastic.multiprocessing.errors.error_handler",
)


def run(words: Sequence[str]) -> NoReturn:
    """Be torchrun with these words, and exit."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    _install()
    try:
        torchrun.main(list(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        refused = any(one.exitcode == EXIT_REFUSED for one in error.failures.values())
        _print(f"rank {rank} exited with code {failure.exitcode}: see what it printed above"
               + ("; it is not restarted, since it would be refused again" if refused else ""))  # fmt: skip
        sys.exit(EXIT_REFUSED if refused else 1)
    except RendezvousError as error:
        _print(f"the other nodes are gone: {_first_line(error)}")
        sys.exit(1)
    sys.exit(0)


def _install() -> None:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    monitor_workers, num_nodes_waiting = LocalElasticAgent._monitor_workers, DynamicRendezvousHandler.num_nodes_waiting

    def monitor_workers_once_refused(agent: Any, group: Any) -> Any:
        result = monitor_workers(agent, group)
        if any(failure.exitcode == EXIT_REFUSED for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    lost: list[float] = []

    def num_nodes_waiting_or_none(handler: Any) -> int:
        try:
            return num_nodes_waiting(handler)
        except RendezvousError:
            lost.append(time.monotonic())
            if lost[-1] - lost[0] > GRACE:
                raise
            return 0

    LocalElasticAgent._monitor_workers = monitor_workers_once_refused  # type: ignore[method-assign]
    DynamicRendezvousHandler.num_nodes_waiting = num_nodes_waiting_or_none  # type: ignore[assignment, method-assign]
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    """A message about a lost rendezvous without its traceback."""
    from torch.distributed.elastic.rendezvous import RendezvousError

    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if isinstance(error, RendezvousError):
        record.msg, record.args = f"{record.getMessage()}: {_first_line(error)}", ()
        record.exc_info = record.exc_text = None
    return True


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _print(text: str) -> None:
    print(f"megatron-prune: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
