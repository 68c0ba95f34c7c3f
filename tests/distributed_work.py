"""What a rank of the ``distributed`` fixture runs: import a test's function, call it, keep its result.

It is not in conftest.py because ranks import it by name, from a process without pytest.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FunctionCall:
    """One call of a module-level function of a test file, made by every rank.

    Rank *r* writes its pickled return value to ``results/r``.
    """

    file: str
    module: str
    function: str
    arguments: bytes
    results: str

    def __call__(self) -> int:
        if self.module not in sys.modules:
            spec = importlib.util.spec_from_file_location(self.module, self.file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[self.module] = module
            spec.loader.exec_module(module)
        function = getattr(sys.modules[self.module], self.function)
        arguments, keywords = pickle.loads(self.arguments)
        value = function(*arguments, **keywords)
        Path(self.results, os.environ["RANK"]).write_bytes(pickle.dumps(value))
        self._leave_group()
        return 0

    @staticmethod
    def _leave_group() -> None:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # no rank may exit while another still reads from it
            torch.distributed.destroy_process_group()


def results(folder: Path, nproc: int) -> list[Any]:
    """Return values of all ranks, in rank order."""
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(nproc)]
