"""``megatron-prune preflight --gpus 1024 pretrain …``: will it run there, and what will it need?

Takes the exact command line of ``pretrain``, ``calibrate``, ``sparsify`` or ``evaluate`` (a leading ``torchrun … -m
megatron_prune`` is skipped). Corpora and checkpoints on this machine are checked; missing ones are reported as not
checked. Exit codes: 0 it will run, 1 it will not, 3 look first, 2 wrong use of preflight itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from megatron_prune import screen, verbs
from megatron_prune.cli.parser import Parser, start_engine
from megatron_prune.errors import UsageError

VERBS = ("pretrain", "learn-masks", "calibrate", "sparsify", "evaluate")
EXIT_CODES = {"yes": 0, "no": 1, "look": 3}  # 2 is a usage error (errors.py)
_SUMMARIES = {
    "yes": "it will run",
    "look": "it may or may not run: look first",
    "no": "it will not run",
}
_STYLES = {"yes": "green", "look": "yellow", "no": "red", "not checked": "cyan"}


def parser() -> Parser:
    return Parser(
        "preflight",
        f"Says whether a command line of {', '.join(VERBS)} will run on a cluster of any size, and what it needs, in "
        "seconds and without the cluster. Exit codes: 0 it will run, 1 it will not, 3 look first.",
        verbs.PreflightSettings,
        after=" VERB …",
        example="""
megatron-prune preflight --gpus 64 --gpu h100 pretrain --load runs/a --save runs/a --shape-from checkpoints/parent \\
    --data-path data/train --seq-length 2048 --global-batch-size 256 --micro-batch-size 4 --train-iters 1000 \\
    --lr 3e-4 --bf16""",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    own, verb, rest = split(argv)
    options = parser().read(own)[0]
    if verb is None:
        raise UsageError(
            "VERB",
            got="nothing",
            expected=f"one of {', '.join(VERBS)}, with its flags, after those of preflight",
        )
    asked = verbs.PreflightSettings.of(options)
    from megatron_prune.engine import cpu

    if not cpu.is_cpu():  # dry runs never touch this machine's GPUs
        command = [sys.executable, "-m", "megatron_prune", "preflight", *argv]
        return subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).returncode
    if not 0 < asked.mfu <= 1:
        raise UsageError("--mfu", got=asked.mfu, expected="a fraction between 0 and 1")
    start_engine()
    from megatron_prune import artifacts
    from megatron_prune.engine import installed
    from megatron_prune.preflight import host as elsewhere
    from megatron_prune.preflight import verdict
    from megatron_prune.preflight.checks import JobQuestion
    from megatron_prune.preflight.cost import Cluster

    cluster = Cluster(asked.gpus, asked.gpu, asked.gpus_per_node)
    line = elsewhere.resolve(rest, asked.model)
    reserve = int(asked.reserve_gb * 1e9)
    host = None if asked.host_memory_gb is None else int(asked.host_memory_gb * 1e9)
    has = installed.named(asked.installed)
    question = JobQuestion(verb, line.argv, cluster, asked.mfu, reserve, host, asked.corpus_tokens, line.absent, has)
    found = verdict.answer(question, _main_of(verb))
    if asked.output:
        artifacts.write_json(asked.output, found)
    show(found)
    return EXIT_CODES[found["verdict"]]


def _main_of(verb: str) -> Callable[[list[str]], int]:
    from megatron_prune.cli import calibrate, evaluate, learn_masks, pretrain, sparsify

    mains = {
        "pretrain": pretrain.main, "learn-masks": learn_masks.main, "calibrate": calibrate.main,
        "sparsify": sparsify.main, "evaluate": evaluate.main,
    }  # fmt: skip
    return mains[verb]


def split(argv: list[str]) -> tuple[list[str], str | None, list[str]]:
    """Split into preflight's own flags, the verb, and the verb's flags."""
    for place, word in enumerate(argv):
        if word in ("torchrun", "python", "srun") and "megatron_prune" in argv[place:]:
            verb = argv.index("megatron_prune", place) + 1
            return argv[:place], argv[verb] if argv[verb : verb + 1] and argv[verb] in VERBS else None, argv[verb + 1 :]
        if word in VERBS:
            return argv[:place], word, argv[place + 1 :]
    return argv, None, []


def show(found: dict[str, Any]) -> None:
    """Print the answer as a table."""
    from rich.table import Table

    console = screen.console(highlight=False)
    if not console.is_terminal:
        console = screen.console(highlight=False, width=140)
    size = f", {found['parameters'] / 1e9:.3f}B parameters" if found["parameters"] else ""
    table = Table(title=f"{found['command'][0]} on {found['cluster']['gpus']} x {found['cluster']['kind']}{size}")
    for column in ("check", "verdict", "reason"):
        table.add_column(column, overflow="fold", no_wrap=column != "reason")
    for finding in found["findings"]:
        style = _STYLES[finding["verdict"]]
        table.add_row(finding["check"], f"[{style}]{finding['verdict']}[/{style}]", _plain(finding["reason"]))
    console.print(table)
    console.print(_SUMMARIES[found["verdict"]], style="bold")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
