"""torchrun's agent for ``engine/launch.py``: it ends its ranks when the process that started it is gone.

    python -m megatron_prune.engine.agent CALLER <words of torchrun>        CALLER: the id of that process

A caller that is killed cannot end anything itself, and ranks without one would hold their GPUs for hours.
"""

from __future__ import annotations

import signal
import sys

from megatron_prune.engine.fork_server import die_with


def main() -> None:
    """Become torchrun. SIGTERM has it end its ranks, with its own grace."""
    die_with(int(sys.argv.pop(1)), signal.SIGTERM)
    from torch.distributed import run  # seconds: the caller may be gone by then

    run.main()


if __name__ == "__main__":
    main()
