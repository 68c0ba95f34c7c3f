"""``megatron-prune launch-files DIR``: scripts that start runs on clusters, to read and adapt."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser
from megatron_prune.errors import UsageError

FILES = Path(__file__).parents[1] / "launch"


def parser() -> Parser:
    return Parser(
        "launch-files",
        "Writes the scripts and files that start runs on clusters (Slurm, Kubernetes, torchrun on every node, Docker), "
        "to read and adapt. Studies write their own Slurm scripts and need none of these.",
        verbs.LaunchFilesSettings,
        example="megatron-prune launch-files launch",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    folder = Path(verbs.LaunchFilesSettings.of(parser().read(argv)[0]).folder)
    if folder.exists():
        raise UsageError("DIR", got=folder, expected="a directory that does not exist")
    shutil.copytree(FILES, folder)
    print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0
