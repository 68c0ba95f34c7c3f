"""Run a checkout's own, unmodified ``pretrain_gpt.py`` where there is no GPU.

    MEGATRON_LM=DIR python tests/interop/run_pretrain_gpt.py <flags of pretrain_gpt.py>

The checkout's ``megatron`` comes before the installed one on the path. ``engine/cpu.py`` gives torch its stand-ins for
CUDA before Megatron is imported, as for our own verbs. The data helpers, which the checkout would compile into
itself, are the wheel's. With a GPU none of this happens.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    checkout = Path(os.environ["MEGATRON_LM"]).absolute()
    from megatron_prune.engine import cpu

    cpu.prepare()
    helpers = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        del sys.modules[name]  # finding the wheel's helpers has imported its packages
    sys.path.insert(0, str(checkout))
    if cpu.is_cpu() and helpers is not None:
        from megatron.core.datasets import utils

        module = importlib.util.module_from_spec(helpers)
        assert helpers.loader is not None
        helpers.loader.exec_module(module)
        sys.modules["megatron.core.datasets.helpers_cpp"] = module
        utils.compile_helpers = lambda: None
    import megatron.training

    assert Path(megatron.training.__file__).is_relative_to(checkout), megatron.training.__file__
    cpu.prepare_megatron()
    sys.argv = [str(checkout / "pretrain_gpt.py"), *cpu.flags(), *sys.argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
