"""The wheel, installed without a checkout: it is complete, and pruning from Hugging Face to Hugging Face runs."""

from __future__ import annotations

import ast
import fnmatch
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from megatron_prune.artifacts import read_json
from tests.test_setup import ROOT, listed

PACKAGE = ROOT / "megatron_prune"
TEXT = ["--calibration-sequences", "2", "--calibration-seq-length", "32"]


def test_every_file_of_the_package_is_packaged() -> None:
    """What is not Python goes into the wheel only where setup.py names it."""
    patterns = listed("package_data")["megatron_prune"]
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    left_out = [str(path.relative_to(PACKAGE)) for path in files if not any(
        fnmatch.fnmatch(str(path.relative_to(PACKAGE)), pattern) for pattern in patterns
    )]  # fmt: skip
    assert files and not left_out


def test_nothing_in_the_package_looks_for_a_checkout() -> None:
    """``parents[…]`` beyond the package would lead into site-packages."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.value, ast.Attribute)
                and node.value.attr == "parents"
                and isinstance(node.slice, ast.Constant)
            ):
                up = node.slice.value
                assert up < len(path.relative_to(ROOT).parts) - 1, f"{path.relative_to(ROOT)}: parents[{up}]"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """``installed(program, …)`` runs it in an empty folder, with a venv that has the wheel and no checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source, venv, empty = folder / "source", folder / "venv", folder / "empty"
    shutil.copytree(PACKAGE, source / "megatron_prune", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("megatron_prune-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (venv / "lib").glob("python*/site-packages")
    # The big packages come from here, after what is installed. An editable install is a .pth there, which is not read.
    (packages / "here.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{sysconfig.get_paths()['platlib']}\n")
    empty.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PATH": f"{venv / 'bin'}:{env['PATH']}", "VIRTUAL_ENV": str(venv), "HF_HUB_OFFLINE": "1"}

    def run(*words: object) -> str:
        command = [str(word) for word in words]
        done = subprocess.run(command, cwd=empty, env=env, text=True, capture_output=True)
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
        return done.stdout

    run.wheel, run.packages, run.empty = wheel, packages, empty  # type: ignore[attr-defined]
    return run


@pytest.mark.slow
def test_from_hugging_face_and_back_without_a_checkout(installed, tiny_hf, tiny_corpus) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"megatron_prune"}  # and its .dist-info
    where = installed("python", "-c", "import megatron_prune; print(megatron_prune.__file__)").strip()
    assert where == str(installed.packages / "megatron_prune" / "__init__.py")

    installed("megatron-prune", "convert", "import", "--hf", tiny_hf("llama-gqa"), "--save", "parent")
    load = ["--load", "parent"]
    installed("megatron-prune", "prune", *load, "--method", "minitron-width", "--ratio", "0.3", "--divisible-by", "8",
              "--tolerance", "0.1", "--calibration-data-path", tiny_corpus, *TEXT, "--save", "pruned")  # fmt: skip
    installed("megatron-prune", "evaluate", "--load", "pruned", "--data-path", tiny_corpus,
              "--seq-length", "32", "--windows", "2", "--output", "scores.json")  # fmt: skip
    exported = installed("megatron-prune", "convert", "export", "--load", "pruned", "--hf", "exported")
    assert exported.strip() == "wrote exported"
    scores = read_json(installed.empty / "scores.json")
    (corpus,) = scores["corpora"].values()
    assert 0 < corpus["loss"] < 20 and corpus["windows"] == 2
    before, after = (
        read_json(folder / "config.json") for folder in (tiny_hf("llama-gqa"), installed.empty / "exported")
    )
    assert after["hidden_size"] < before["hidden_size"] and after["intermediate_size"] < before["intermediate_size"]
    assert scores["checkpoint"]["path"] == "pruned"


@pytest.mark.slow
def test_what_a_cluster_needs_is_installed(installed) -> None:
    wrote = installed("megatron-prune", "launch-files")
    assert "node.sh" in wrote and (installed.empty / "launch" / "node.sh").is_file()
    assert (installed.packages / "megatron_prune" / "launch" / "node.sh").is_file()
    assert "usage: megatron-prune study plan" in installed("python", "-m", "megatron_prune", "study", "plan", "--help")
