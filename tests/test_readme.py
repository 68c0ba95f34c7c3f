"""Every command in README.md, docs/ and the large example names a file or verb that exists, with flags that it has."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.__main__ import NAMES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / "examples" / "llama3.1_8b" / "README.md").read_text()
PAGES = {path: path.read_text() for path in sorted((ROOT / "docs" / "pages").rglob("*.md"))}


def commands() -> list[str]:
    """The commands of the bash blocks, each once, continued lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join([README, EXAMPLE, *PAGES.values()]), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.partition("  #")[0].split("     #")[0].strip() for line in lines if line.strip()]
    return list(dict.fromkeys(found))


def program(words: list[str]) -> str:
    """The script or verb that a command runs: ``tests/run.sh``, ``pretrain``."""
    if "-m" not in words:
        return words[1]
    module = words[words.index("-m") + 1]
    return words[words.index("-m") + 2] if module == "megatron_prune" else f"{module.replace('.', '/')}.py"


@pytest.fixture(scope="session")
def help_of(job):
    """``help_of(program, subcommand)``: the output of ``--help``, cached."""
    asked: dict[tuple[str, ...], str] = {}

    def get(*words: str) -> str:
        if words not in asked:
            if words[0] not in NAMES:
                run = [sys.executable, str(ROOT / words[0]), "--help"]
                asked[words] = subprocess.run(run, capture_output=True, text=True, check=True).stdout
                return asked[words]
            own = [*words, "--help"]
            asked[words] = job(own).ok().output
            if "--help-megatron" in asked[words]:
                asked[words] += job([*words, "--help-megatron"]).ok().output
        return asked[words]

    return get


@pytest.mark.parametrize("command", commands())
def test_the_command_has_its_flags(command: str, help_of) -> None:
    words = shlex.split(re.sub("<[^>]*>", "", command))  # placeholders for the reader
    if words[0] == "hf":  # Hugging Face's own
        return
    assert words[0] in ("bash", "megatron-prune", "python", "torchrun"), command
    name = program(words)
    if name.endswith(".sh"):
        assert (ROOT / name).is_file()
        return
    assert name in NAMES or (ROOT / name).is_file(), f"{name} does not exist"
    after = words[words.index(name) + 1 :] if name in words else words[words.index("-m") + 2 :]
    if name.startswith("tests/") and not any(word.startswith("--") for word in after):
        return  # a module that may have no --help
    subcommand = after[:1] if name in ("convert", "study") else ["--hf"] if "--hf" in after else []
    text = help_of(name, *subcommand)
    for flag in (word for word in after if word.startswith("--")):
        assert re.search(rf"{re.escape(flag)}[\s,\]=]", text), f"{name} has no {flag}"


def test_every_verb_is_in_the_table_of_commands() -> None:
    for verb in NAMES:
        assert f"`megatron-prune {verb}" in README


def test_every_method_is_in_the_table_of_methods() -> None:
    from megatron_prune import methods

    for name in methods.names():
        assert f"| `{name}` |" in README


def test_every_method_has_a_page() -> None:
    from megatron_prune import methods

    pages = {path.stem for path in PAGES if path.parent.name == "methods"}
    assert pages - {"index"} == {*methods.names(), *methods.sparse_names()}


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
