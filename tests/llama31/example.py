"""examples/llama3.1_8b: its folder, its tables, its launch.py as a module."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "llama3.1_8b"
_spec = importlib.util.spec_from_file_location("llama31_launch", EXAMPLE / "launch.py")
assert _spec is not None and _spec.loader is not None
launch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launch)
TABLE = launch.TABLE
