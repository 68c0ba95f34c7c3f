"""Counts files, lines, rooms, floors (layers), import circles, and names that occur twice.

    python -m tests.house.count [CHECKOUT …]      one row per checkout; the default is this one

A room is a folder of the package, a module at the top, or a folder of ``study``. Room A is above room B if a
module of A imports one of B; rooms that import each other in a circle share a floor. All imports count:
at the top of a file, in a function, under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import networkx

PACKAGE = "megatron_prune"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Count:
    """``twice`` are names of files, and of public classes, that occur more than once."""

    files: int
    lines: int
    median: float
    rooms: int
    floors: int
    module_circles: tuple[tuple[str, ...], ...]
    room_circles: tuple[tuple[str, ...], ...]
    files_twice: tuple[str, ...]
    classes_twice: tuple[str, ...]


def count(root: Path) -> Count:
    """Count the package in the checkout ``root``."""
    modules = {_name(path, root): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    trees = {name: ast.parse(path.read_text()) for name, path in modules.items()}
    lines = [len(path.read_text().splitlines()) for path in modules.values()]
    imports = networkx.DiGraph(
        (name, to) for name, tree in trees.items() for to in _imports(tree, modules) if to != name
    )
    room = {name: _room(name, path) for name, path in modules.items()}
    rooms = networkx.DiGraph((room[a], room[b]) for a, b in imports.edges if room[a] != room[b])
    rooms.add_nodes_from(room.values())
    named = (path for path in modules.values() if path.name != "__init__.py")
    files = Counter(path.name for path in named)
    classes = Counter(
        node.name
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    floors = networkx.dag_longest_path_length(networkx.condensation(rooms)) + 1
    return Count(
        len(modules), sum(lines), median(lines), len(rooms), floors, _circles(imports), _circles(rooms),
        _twice(files), _twice(classes),
    )  # fmt: skip


def _name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _imports(tree: ast.AST, modules: Mapping[str, Path]) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in modules else node.module


def _room(module: str, path: Path) -> str:
    """The folder that the file is in; a file at the top is a room itself."""
    words = module.split(".")
    folder = words if path.name == "__init__.py" or len(words) == 2 else words[:-1]
    return ".".join(folder[1:]) or module


def _circles(graph: networkx.DiGraph[str]) -> tuple[tuple[str, ...], ...]:
    found = networkx.strongly_connected_components(graph)
    return tuple(sorted(tuple(sorted(circle)) for circle in found if len(circle) > 1))


def _twice(names: Counter[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name, times in names.items() if times > 1))


COLUMNS = (
    "checkout", "files", "lines", "median", "rooms", "floors", "circles of files", "of rooms", "file names twice",
    "class names twice",
)  # fmt: skip


def main(argv: list[str]) -> None:
    print("| " + " | ".join(COLUMNS) + " |")
    print("| --- " * len(COLUMNS) + "|")
    for root in (Path(word).resolve() for word in argv or [str(ROOT)]):
        made = count(root)
        cells = [
            root.name, made.files, f"{made.lines:,}", f"{made.median:g}", made.rooms, made.floors,
            len(made.module_circles), len(made.room_circles), len(made.files_twice), len(made.classes_twice),
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")
        for what in (*made.module_circles, *made.room_circles, made.files_twice, made.classes_twice):
            print("   ", ", ".join(what), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
