"""Which of Megatron's flags nothing here reads, derived from Megatron's source.

    python -m tests.engine.unreached > megatron_prune/engine/unreached.json

Megatron's parser has flags that only its entry scripts read (``pretrain_gpt.py``'s forward step, its inference servers,
its vision, retriever and RL programs). Our own entry points would accept them without effect. The algorithm:

1. Reached code: the modules that this package imports from Megatron, and their imports in turn; in them,
   module-level code, and every function and class whose name occurs in reached code, until nothing is added. A
   class counts with all its methods. This is a superset of the code that can run.
2. A flag is read where reached code has an attribute of its name (``args.x``, ``config.x``), or that name as a string
   (``getattr(args, "x")``). In ``megatron.core``, which never sees the arguments, that counts only for fields of the
   configurations that are filled from all arguments of the same name; in our own code, only for ``args.x`` and strings.
   ``arguments.py`` itself does not count, except where the flag decides what another, read flag becomes.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import megatron_prune

PACKAGE = Path(megatron_prune.__file__).parent
# Functions that name a flag as a string but only restore, compare or check it.
_NAMING = {"_set_arg", "_compare", "_check_arg_is_not_none"}
_PARSERS = {"megatron.training.arguments", "megatron.training.yaml_arguments"}
# Code in megatron.core that gets the arguments, or a configuration with the same names.
_SEES_ARGUMENTS = ("megatron.core.tokenizers.", "megatron.core.fault_injector")
# megatron.core.optimizer.emerging_optimizers puts these names together.
_PUT_TOGETHER = ("muon_", "adaptive_muon_")
_OURS = "ours."
_TABLES = ("refusals.py", "model_arguments.py")  # of ours, which name flags and read none of them
_APART = ("api", "cli")  # of ours, which never see Megatron's arguments
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class _Module:
    """One file: its top-level statements, and its functions and classes by name."""

    def __init__(self, name: str, path: Path, known: set[str]) -> None:
        self.name, self.known = name, known
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        self.definitions: dict[str, list[_Definition]] = defaultdict(list)
        self.top: list[ast.AST] = []
        for statement in tree.body:
            self._sort(statement)

    def _sort(self, statement: ast.stmt) -> None:
        if isinstance(statement, _Definition):
            self.definitions[statement.name].append(statement)
            self.top += statement.decorator_list
        elif isinstance(statement, (ast.If, ast.Try)):
            self.top.append(statement.test if isinstance(statement, ast.If) else ast.Pass())
            handlers = [part for handler in getattr(statement, "handlers", []) for part in handler.body]
            for part in [*statement.body, *handlers, *statement.orelse, *getattr(statement, "finalbody", [])]:
                self._sort(part)
        else:
            self.top.append(statement)

    def imported(self, part: ast.Import | ast.ImportFrom) -> Iterator[str]:
        """Modules of Megatron that an import in this file names."""
        if isinstance(part, ast.Import):
            yield from (alias.name for alias in part.names if alias.name in self.known)
        else:
            base = self.package.split(".")
            base = base[: len(base) - part.level + 1] if part.level else []
            module = ".".join([*base, *([part.module] if part.module else [])])
            for name in (module, *(f"{module}.{alias.name}" for alias in part.names)):
                if name in self.known:
                    yield name


@dataclasses.dataclass
class _Piece:
    """The imports of a piece of code, the names that occur in it, and those that it reads."""

    owner: str
    node: ast.AST
    imports: set[str] = dataclasses.field(default_factory=set)
    mentions: set[str] = dataclasses.field(default_factory=set)
    reads: set[str] = dataclasses.field(default_factory=set)


def _look(module: _Module, node: ast.AST) -> _Piece:
    piece, ours = _Piece(module.name, node), module.name.startswith(_OURS)
    waiting = [(node, False)]
    while waiting:
        part, naming = waiting.pop()
        if isinstance(part, ast.Name):
            piece.mentions.add(part.id)
        elif isinstance(part, ast.Attribute):
            piece.mentions.add(part.attr)
            base = getattr(part.value, "id", getattr(part.value, "attr", ""))
            if isinstance(part.ctx, ast.Load) and (base == "args" or not ours):
                piece.reads.add(part.attr)
        elif isinstance(part, ast.Constant):
            if isinstance(part.value, str) and part.value.isidentifier():
                piece.mentions.add(part.value)
                if not naming:
                    piece.reads.add(part.value)
        elif isinstance(part, (ast.Import, ast.ImportFrom)):
            piece.imports.update(module.imported(part))
            piece.mentions.update(alias.name.rpartition(".")[2] for alias in part.names)
        elif isinstance(part, ast.Call):
            naming = naming or getattr(part.func, "id", getattr(part.func, "attr", "")) in _NAMING
        waiting.extend((child, naming) for child in ast.iter_child_nodes(part))
    return piece


def _files() -> dict[str, Path]:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations is not None
    found = {}
    for root in map(Path, spec.submodule_search_locations):
        for path in [*root.glob("core/**/*.py"), *root.glob("training/**/*.py")]:
            parts = ("megatron", *path.relative_to(root).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def reached() -> list[_Piece]:
    """Every piece of Megatron's and our code that may run."""
    files = _files()
    known = set(files)
    module = cache(lambda name: _Module(name, files[name], known))
    own = [
        path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in _TABLES and path.parent.name not in _APART
    ]
    ours = [_Module(f"{_OURS}{number}", path, known) for number, path in enumerate(own)]
    pieces: list[_Piece] = []
    mentioned: set[str] = set()
    modules: set[str] = set()
    waiting: list[tuple[_Module, ast.AST]] = []
    unnamed: dict[str, list[tuple[_Module, ast.AST]]] = defaultdict(list)  # definitions whose names have not occurred

    def enter(name: str) -> None:
        parts = name.split(".")
        for end in range(2, len(parts) + 1):
            package = ".".join(parts[:end])
            if package in known and package not in modules:
                modules.add(package)
                waiting.extend((module(package), node) for node in module(package).top)
                for title, nodes in module(package).definitions.items():
                    for node in nodes:
                        if title in mentioned:
                            waiting.append((module(package), node))
                        else:
                            unnamed[title].append((module(package), node))

    for file in ours:
        waiting += [(file, node) for node in file.top]
        waiting += [(file, node) for nodes in file.definitions.values() for node in nodes]
    while waiting:
        piece = _look(*waiting.pop())
        pieces.append(piece)
        for name in piece.imports:
            enter(name)
        for name in piece.mentions - mentioned:
            mentioned.add(name)
            waiting += unnamed.pop(name, [])
    return pieces


def _decides(node: ast.AST, under: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """(flag, other flag whose value it decides) in the parser's own code."""
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        under = under | _attributes(node.test)
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.value is not None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Attribute):
                yield from ((name, target.attr) for name in under | _attributes(node.value))
    for part in ast.iter_child_nodes(node):
        yield from _decides(part, under)


def _attributes(node: ast.AST) -> frozenset[str]:
    return frozenset(part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute))


def parser() -> argparse.ArgumentParser:
    """Megatron's own parser."""
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def _filled() -> set[str]:
    """Fields of the configurations of ``megatron.core`` that ``megatron.training`` fills from arguments by name."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    models = (TransformerConfig, MLATransformerConfig, HeterogeneousTransformerConfig)
    configurations = (*models, OptimizerConfig, DistributedDataParallelConfig)
    return {field.name for configuration in configurations for field in dataclasses.fields(configuration)}


def unreached() -> list[str]:
    """The destinations of flags that nothing reads."""
    flags = {action.dest for action in parser()._actions if action.option_strings and action.dest != "help"}
    filled, read = _filled(), {name for name in flags if name.startswith(_PUT_TOGETHER)}
    decides = set()
    for piece in reached():
        if piece.owner in _PARSERS:
            decides |= set(_decides(piece.node))
        else:
            by_name = piece.owner.startswith("megatron.core.") and not piece.owner.startswith(_SEES_ARGUMENTS)
            read |= flags & piece.reads & filled if by_name else flags & piece.reads
    while more := {name for name, other in decides if other in read} & (flags - read):
        read |= more
    return sorted(flags - read)


if __name__ == "__main__":
    json.dump(unreached(), sys.stdout, indent=1)
    print()
