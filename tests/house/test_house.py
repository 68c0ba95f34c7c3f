"""The layering: no room imports one above it, no circle, no name twice."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import megatron_prune
from tests.house.count import ROOT, count


def test_the_contracts_of_pyproject_are_kept():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[done.stdout.find("Broken contracts") :] + done.stderr


def test_no_circle_and_no_name_of_a_file_or_class_twice():
    made = count(ROOT)
    assert not made.module_circles and not made.room_circles
    assert made.files_twice == () and made.classes_twice == ()


def checkout(folder: Path, **files: str) -> Path:
    for name, text in {"__init__": "", "errors": "", **files}.items():
        path = folder / "megatron_prune" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(textwrap.dedent(text))
    return folder


def test_what_is_counted(tmp_path):
    made = count(
        checkout(
            tmp_path,
            **{
                "masks/reader": "import megatron_prune.errors\nclass Found: ...\nclass _Own: ...\n",
                "data/reader": "from megatron_prune import errors\nclass Found: ...\nclass _Own: ...\n",
                "data/windows": """
                    def late():
                        from megatron_prune.data.shards import x
                """,
                "data/shards": "from megatron_prune.data import windows\nx = 1\n",
                "cli/plan": "from megatron_prune.data.windows import late\nfrom megatron_prune.masks import reader\n",
            },
        )
    )
    assert (made.files, made.rooms) == (10, 5)  # the package itself is a room, and errors is one
    assert made.floors == 3  # errors, data and masks, cli
    assert made.module_circles == (("megatron_prune.data.shards", "megatron_prune.data.windows"),)
    assert made.room_circles == () and made.files_twice == ("reader.py",) and made.classes_twice == ("Found",)


def test_rooms_that_import_each_other_are_a_circle(tmp_path):
    made = count(
        checkout(tmp_path, **{"a/x": "import megatron_prune.b.y\n", "b/y": "from megatron_prune.a import x\n"})
    )
    assert made.room_circles == (("a", "b"),) and made.floors == 1


@pytest.mark.parametrize("module", ["data.preprocess", "data.contamination", "data.readers", "data.local_text"])
def test_text_is_tokenized_without_importing_megatron(module):
    """Importing it takes seconds, longer than tokenizing a small corpus."""
    script = f"import sys, megatron_prune.{module}; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("module", ["cli.parser", "api.launching", "engine.runtime", "engine.fork_server"])
def test_the_engine_is_set_up_before_megatron_is_imported(module):
    """Megatron chooses its optimizer and its norms of gradients when it is imported: without a GPU,
    ``cpu.prepare`` must hide Transformer Engine first."""
    script = f"import sys, megatron_prune.{module}; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("name", megatron_prune.__all__)
def test_every_public_name_loads(name):
    assert getattr(megatron_prune, name).__name__ == name


# Folders of tests that belong to no room: the layering, bad inputs, real models, other environments, measurements.
APART = {"benchmarks", "fuzz", "gpu", "house", "interop", "llama31", "miniature", "mutation", "smollm2", "te"}


def test_folders_of_tests_have_the_names_of_rooms():
    rooms = {path.stem for path in (ROOT / "megatron_prune").iterdir()}
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("*.py"))}
    assert folders - APART <= rooms and APART <= folders


# Rooms whose code runs while the screen is diverted to a log (``screen.divert``).
DIVERTED = ("calibration", "evaluation", "pruning", "sparse", "structured", "training")


@pytest.mark.parametrize("room", DIVERTED)
def test_what_a_person_is_to_see_goes_through_the_screen(room):
    """A ``print`` there would end in the log file."""
    calls = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "megatron_prune" / room).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls
