"""The verbs for clusters: ``preflight`` and ``launch-files``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser, start_engine
from megatron_prune.errors import UsageError

CHECKED = ("pretrain", "learn-masks", "calibrate", "sparsify", "evaluate")
EXIT_CODES = {"yes": 0, "no": 1, "look": 3}  # 2 is a usage error (errors.py)


def preflight_parser() -> Parser:
    return Parser(
        "preflight",
        f"Says whether a command line of {', '.join(CHECKED)} will run on a cluster of any size, and what it needs, in "
        "seconds and without the cluster. Exit codes: 0 it will run, 1 it will not, 3 look first.",
        verbs.PreflightSettings,
        after=" VERB …",
        example="""
megatron-prune preflight --gpus 64 --gpu h100 pretrain --load runs/a --save runs/a --shape-from checkpoints/parent \\
    --data-path data/train --seq-length 2048 --global-batch-size 256 --micro-batch-size 4 --train-iters 1000 \\
    --lr 3e-4 --bf16""",
    )


def run_without_gpus(words: Sequence[str]) -> int | None:
    """The exit code of the verb ``words`` in a process that sees no GPU: dry runs never touch this machine's.
    None if this process sees none either."""
    from megatron_prune.engine import cpu

    if cpu.is_cpu():
        return None
    command = [sys.executable, "-m", "megatron_prune", *words]
    return subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).returncode


def preflight_main(argv: list[str]) -> int:
    """Will a command line run on a cluster, and what will it need?

    Takes the exact command line of a verb in ``CHECKED`` (a leading ``torchrun … -m megatron_prune`` is skipped).
    Corpora and checkpoints on this machine are checked; missing ones are reported as not checked. Exit codes: 0 it will
    run, 1 it will not, 3 look first, 2 wrong use of preflight itself.
    """
    own, verb, rest = split_preflight(argv)
    options = preflight_parser().read(own)[0]
    if verb is None:
        raise UsageError(
            "VERB",
            got="nothing",
            expected=f"one of {', '.join(CHECKED)}, with its flags, after those of preflight",
        )
    asked = verbs.PreflightSettings.of(options)
    if (code := run_without_gpus(["preflight", *argv])) is not None:
        return code
    if not 0 < asked.mfu <= 1:
        raise UsageError("--mfu", got=asked.mfu, expected="a fraction between 0 and 1")
    from megatron_prune import artifacts

    if asked.output:
        artifacts.refuse_unwritable("--output", asked.output)
    start_engine()
    from megatron_prune.engine import installed
    from megatron_prune.preflight import host as elsewhere
    from megatron_prune.preflight import verdict
    from megatron_prune.preflight.checks import JobQuestion
    from megatron_prune.preflight.cost import Cluster

    cluster = Cluster(asked.gpus, asked.gpu, asked.gpus_per_node)
    line = elsewhere.resolve(rest, asked.model, asked.hf)
    reserve = int(asked.reserve_gb * 1e9)
    host = None if asked.host_memory_gb is None else int(asked.host_memory_gb * 1e9)
    has = installed.named(asked.installed)
    question = JobQuestion(verb, line.argv, cluster, asked.mfu, reserve, host, asked.corpus_tokens, line.absent, has)
    found = verdict.answer(question, _main_of(verb))
    if asked.output:
        artifacts.write_json(asked.output, found)
    verdict.show(found)
    return EXIT_CODES[found["verdict"]]


def _main_of(verb: str) -> Callable[[list[str]], int]:
    from megatron_prune.cli import pruning_commands, training_commands

    mains = {
        "pretrain": training_commands.pretrain_main,
        "learn-masks": training_commands.learn_masks_main,
        "calibrate": pruning_commands.calibrate_main,
        "sparsify": pruning_commands.sparsify_main,
        "evaluate": training_commands.evaluate_main,
    }
    return mains[verb]


def split_preflight(argv: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Split into preflight's own flags, the verb, and the verb's flags."""
    for place, word in enumerate(argv):
        if word in ("torchrun", "python", "srun") and "megatron_prune" in argv[place:]:
            after = argv[argv.index("megatron_prune", place) + 1 :]
            return argv[:place], after[0] if after and after[0] in CHECKED else None, after[1:]
        if word in CHECKED:
            return argv[:place], word, argv[place + 1 :]
    return argv, None, []


LAUNCH_FILES = Path(__file__).parents[1] / "launch"


def launch_files_parser() -> Parser:
    return Parser(
        "launch-files",
        "Writes the scripts and files that start runs on clusters (Slurm, Kubernetes, torchrun on every node, Docker), "
        "to read and adapt. Studies write their own Slurm scripts and need none of these.",
        verbs.LaunchFilesSettings,
        example="megatron-prune launch-files launch",
    )


def launch_files_main(argv: list[str]) -> int:
    """Write scripts that start runs on clusters, to read and adapt."""
    folder = Path(verbs.LaunchFilesSettings.of(launch_files_parser().read(argv)[0]).folder)
    if folder.exists():
        raise UsageError("DIR", got=folder, expected="a directory that does not exist")
    shutil.copytree(LAUNCH_FILES, folder)
    print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0
