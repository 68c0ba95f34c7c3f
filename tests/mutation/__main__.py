"""Mutants of the package, one change each, and whether the tests notice.

    python -m tests.mutation [MODULE …] [--sample N] [--again]

The changes are cosmic-ray's operators; ``modules.toml`` names the tests of each module. cosmic-ray's own driver starts
a process for each mutant, which imports torch and Megatron for seconds. Here every mutant is a fork of one process that
has imported them but nothing of this package, and the changed module is loaded in place of its file.

Results go to ``runs/mutation/<module>.jsonl`` one by one, under a hash of the mutant: a run that was stopped continues,
and mutants that survived are tried again. ``README.md`` here explains the survivors.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_prune"
RESULTS = ROOT / "runs" / "mutation"
CHANGES = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul", "BitAnd_BitOr",
           "BitOr_BitAnd")  # fmt: skip
COMPARISONS = ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is")
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{change}" for change in CHANGES),
    *(f"core/ReplaceComparisonOperator_{change}" for change in COMPARISONS),
    "core/ReplaceUnaryOperator_Delete_USub", "core/ReplaceUnaryOperator_Delete_Not", "core/AddNot",
    "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue", "core/ReplaceAndWithOr", "core/ReplaceOrWithAnd",
    "core/ReplaceBreakWithContinue", "core/ReplaceContinueWithBreak", "core/NumberReplacer",
    "core/ZeroIterationForLoop",
)  # fmt: skip
SURVIVED, KILLED, TIMED_OUT = "survived", "killed", "timed out"


@dataclass(frozen=True)
class Mutant:
    """A module's source with one change, and the lines that changed."""

    module: str
    source: str
    change: str

    @property
    def id(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]


def mutants(module: str) -> Iterator[Mutant]:
    """Every change that the operators can make in a module."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    path = path_of(module)
    original = path.read_text()
    seen = {_meaning(original)}
    for name in OPERATORS:
        operator = plugins.get_operator(name)()
        for occurrence in range(10_000):
            source = mutate_code(original, operator, occurrence)
            if source is None:
                break
            meaning = _meaning(source)
            if meaning is not None and meaning not in seen:
                seen.add(meaning)
                yield Mutant(module, source, "\n".join(_difference(original, source)))


def path_of(module: str) -> Path:
    return ROOT / PACKAGE / f"{module}.py"


def _difference(original: str, source: str) -> Iterator[str]:
    lines = difflib.unified_diff(original.splitlines(), source.splitlines(), lineterm="", n=0)
    for line in lines:
        if line.startswith("@@"):
            yield line.split()[1].lstrip("-").split(",")[0]
        elif line[:3] not in ("---", "+++"):
            yield f"{line[0]} {line[1:].strip()}"


def _meaning(source: str) -> str | None:
    """The code without layout and argument types, equal for equivalent texts. None if it is not Python."""
    try:
        tree = ast.parse(source)
        compile(tree, "mutant", "exec")
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    return ast.dump(tree)


class InPlaceOf(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Load one module of the package from a text, and all others from their files."""

    def __init__(self, module: str, source: str):
        self._path, self._source = path_of(module), source
        self._name = f"{PACKAGE}/{module}".removesuffix("/__init__").replace("/", ".")

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        places = [str(self._path.parent)] if self._path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name,
            self._path,
            loader=self,
            submodule_search_locations=places,  # type: ignore[arg-type]
        )

    def get_source(self, fullname: str) -> str:
        return self._source

    def is_package(self, fullname: str) -> bool:
        return self._path.name == "__init__.py"

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, str(self._path), "exec"), module.__dict__)


def outcome(module: str, source: str, tests: list[str], seconds: float) -> str:
    """Run tests on a changed module in a fork of this process."""
    child = os.fork()
    if child == 0:
        os.setsid()  # all processes of a test end with it
        with contextlib.suppress(BaseException), open(os.devnull, "r+b") as nothing:
            for stream in range(3):
                os.dup2(nothing.fileno(), stream)
            sys.meta_path.insert(0, InPlaceOf(module, source))
            import pytest

            words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "--quick", "--timeout=0"]
            os._exit(int(pytest.main([*words, *tests])))
        os._exit(1)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            _end_session(child)
            return SURVIVED if os.waitstatus_to_exitcode(status) == 0 else KILLED
        time.sleep(0.02)
    _end_session(child)
    os.waitpid(child, 0)
    return TIMED_OUT


def _end_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def import_what_is_slow() -> None:
    """The slow imports of tests, without the package."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import hypothesis  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import megatron.core  # noqa: F401
    import megatron.core.datasets.gpt_dataset  # noqa: F401
    import megatron.core.dist_checkpointing  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import scipy.optimize  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401
    import transformers  # noqa: F401
    import yaml  # noqa: F401

    assert not any(name.split(".")[0] == PACKAGE for name in sys.modules), "a fork could not load it again"


def run(module: str, tests: list[str], sample: int | None, again: bool) -> Counter[str]:
    """Run all mutants of a module, or ``sample`` of them; counts by outcome."""
    results = RESULTS / f"{module.replace('/', '.')}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    if results.is_file() and not again:
        known = {found["id"]: found for found in map(json.loads, results.read_text().splitlines())}
    made = list(mutants(module))
    chosen = made if sample is None or sample >= len(made) else random.Random(0).sample(made, sample)
    began = time.monotonic()
    if outcome(module, path_of(module).read_text(), tests, 3600) != SURVIVED:
        return Counter({f"not run: its tests fail without a change (pytest --quick {' '.join(tests)})": len(made)})
    patience = 60 + 10 * (time.monotonic() - began)
    found: Counter[str] = Counter(mutants=len(made), run=len(chosen))
    with open(results, "a") as log:
        for mutant in chosen:
            if known.get(mutant.id, {}).get("outcome", SURVIVED) == SURVIVED:  # the tests may have changed
                result = outcome(module, mutant.source, tests, patience)
                known[mutant.id] = {"id": mutant.id, "outcome": result, "change": mutant.change}
                log.write(json.dumps(known[mutant.id]) + "\n")
                log.flush()
            found[known[mutant.id]["outcome"]] += 1
            if known[mutant.id]["outcome"] == SURVIVED:
                print(f"{PACKAGE}/{module}.py:{mutant.change}\n", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=(__doc__ or "").split("\n\n")[0])
    table: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("modules.toml").read_text())["modules"]
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as study/grid; all of modules.toml if none")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants of each module, always the same ones")
    parser.add_argument("--again", action="store_true", help="run those too that were killed before")
    options = parser.parse_args()
    if unknown := set(options.modules) - set(table):
        parser.error(f"{', '.join(sorted(unknown))}: not in modules.toml")
    os.chdir(ROOT)
    import_what_is_slow()
    for module in options.modules or table:
        found = run(module, table[module], options.sample, options.again)
        print(f"{module}: " + ", ".join(f"{number} {what}" for what, number in found.items()), flush=True)


if __name__ == "__main__":
    main()
