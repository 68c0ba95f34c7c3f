"""Set-up: the choice of interpreter, when an install is repeated, and that setup.py lists all requirements."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_prune

ROOT = Path(__file__).resolve().parents[1]


def bash(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` after sourcing a copy of the set-up script in ``folder``/tools."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "setup_env.sh").write_text((ROOT / "tools" / "setup_env.sh").read_text())
    for name in ("setup.py", "pyproject.toml"):
        (folder / name).write_text((ROOT / name).read_text())
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source {tools}/setup_env.sh; {script}"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def fake_venv(folder: Path, installs: Path) -> None:
    """A ``.venv`` whose python answers every check and writes down what pip is asked to install."""
    executable(
        folder / ".venv" / "bin" / "python",
        f'if [ "$1 $2 $3" = "-m pip install" ]; then echo "$@" >>{installs}; exit ${{PIP_EXIT:-0}}; fi; exit 0',
    )
    (folder / ".venv" / "pyvenv.cfg").write_text("version = 3.13.0\n")


def test_a_candidate_that_does_not_run_is_passed_over(tmp_path) -> None:
    executable(tmp_path / "shims" / "python3.13", "echo 'python3.13: command not found' >&2; exit 127")
    executable(tmp_path / "shims" / "python3.12", f'exec {sys.executable} "$@"')
    found = bash("_env_find_python", tmp_path, PATH=f"{tmp_path}/shims:/bin", PYTHON="python3.13 python3.12")
    assert found.returncode == 0, found.stderr
    version = subprocess.run([found.stdout.strip(), "--version"], capture_output=True, text=True).stdout
    assert tuple(map(int, version.split()[1].split(".")[:2])) >= (3, 12)


def test_without_a_python_it_says_what_to_install(tmp_path) -> None:
    executable(tmp_path / "bin" / "ancient", "exit 1")
    found = bash("setup_env dev", tmp_path, PATH=f"{tmp_path}/bin:/usr/bin:/bin", PYTHON="ancient")
    assert found.returncode != 0
    assert "Python 3.12 or newer" in found.stderr
    assert "apt-get install python3" in found.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_second_set_up_installs_nothing(tmp_path) -> None:
    installs = tmp_path / "installs"
    fake_venv(tmp_path, installs)
    assert bash("setup_env dev", tmp_path).returncode == 0
    assert "[dev]" in installs.read_text()
    assert bash("setup_env dev; setup_env; command -v python", tmp_path).stdout.startswith(str(tmp_path))
    assert len(installs.read_text().splitlines()) == 1


def test_what_setup_py_says_is_installed_when_it_changes(tmp_path) -> None:
    installs = tmp_path / "installs"
    fake_venv(tmp_path, installs)
    bash("setup_env", tmp_path)
    assert bash(f"echo '# more' >>{tmp_path}/setup.py; setup_env", tmp_path).returncode == 0
    assert len(installs.read_text().splitlines()) == 2


def test_an_install_that_failed_is_done_again(tmp_path) -> None:
    installs = tmp_path / "installs"
    fake_venv(tmp_path, installs)
    assert bash("setup_env dev", tmp_path, PIP_EXIT="1").returncode != 0
    assert bash("setup_env dev", tmp_path).returncode == 0
    assert len(installs.read_text().splitlines()) == 2


def test_the_version_is_the_packages() -> None:
    asked = [sys.executable, "setup.py", "--version"]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert said == megatron_prune.__version__


def listed(keyword: str) -> Any:
    """``install_requires`` or ``extras_require`` as setup.py writes it; installed metadata may be older."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (found,) = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == keyword]
    return ast.literal_eval(found)


def required() -> list[str]:
    return listed("install_requires")


WITH_LM_EVAL = ROOT / "megatron_prune" / "evaluation" / "language_model.py"  # which only a function imports


def test_every_import_of_the_package_is_required() -> None:
    """An indirect dependency would vanish when the direct one drops it. Packages of extras are imported where they are
    used, not with the package."""
    needed = names_of(required())
    optional = names_of(line for extra, lines in listed("extras_require").items() if extra != "dev" for line in lines)
    distributions = packages_distributions()
    for path in [*(ROOT / "megatron_prune").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        tree = ast.parse(path.read_text())
        at_once = set(tree.body) if path != WITH_LM_EVAL else set()
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top in ("megatron_prune", "tools", "compression"):  # of 3.14
                    continue
                providers = {canonicalize_name(owner) for owner in distributions.get(top, [top])}
                wanted = needed if node in at_once else needed | optional
                assert providers & wanted, f"{path.relative_to(ROOT)} imports {name}, setup.py does not list it"


def names_of(lines: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_pypi_apex_is_not_required() -> None:
    """It is an unrelated web toolkit."""
    assert "apex" not in names_of(required())
    assert '"apex' not in (ROOT / "setup.py").read_text()
