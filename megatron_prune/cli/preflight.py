"""``python -m megatron_prune preflight --gpus 1024 pretrain …``: will it run there, and what will it take?

Takes the command line of ``pretrain``, ``calibrate``, ``sparsify`` or ``evaluate``, written as it will be (a
``torchrun … -m megatron_prune`` before it is skipped). Corpora and checkpoints are looked at where they are on this
machine; what is not here is reported as not checked (``elsewhere``). Exit codes: 0 it will run, 1 it will not, 2
preflight itself was asked something wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prune import artifacts
from megatron_prune.errors import UsageError
from megatron_prune.preflight import host as elsewhere
from megatron_prune.preflight.cost import GPUS, Cluster

VERBS = ("pretrain", "calibrate", "sparsify", "evaluate")
EXIT_CODES = {"yes": 0, "no": 1, "look": 3}  # 2 is a refusal's (errors.py)
CONTAINER = "te,apex,flash-attn"  # NVIDIA's for PyTorch
_SUMMARIES = {
    "yes": "it will run",
    "look": "it may run or not: look first",
    "no": "it will not run",
}
_STYLES = {"yes": "green", "look": "yellow", "no": "red", "not checked": "cyan"}


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    own, verb, rest = split(argv)
    options, unknown = _parser().parse_known_args(own)
    if verb is None or unknown:
        raise UsageError("preflight", got=" ".join(unknown) or "no command", expected="its own flags, then one of "
                         f"{', '.join(VERBS)} with the flags of that")  # fmt: skip
    # It would warn of a CUDA that is missing, which is no news here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from megatron_prune.engine import cpu

    if not cpu.is_cpu():  # rehearsals never touch this machine's GPUs
        command = [sys.executable, "-m", "megatron_prune", "preflight", *argv]
        return subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).returncode
    if not 0 < options.mfu <= 1:
        raise UsageError("--mfu", got=options.mfu, expected="a fraction between 0 and 1")
    from megatron_prune.engine import installed
    from megatron_prune.preflight.checks import Question
    from megatron_prune.study.values import parse_tokens

    try:
        tokens = None if options.corpus_tokens is None else parse_tokens(options.corpus_tokens)
    except ValueError as error:
        raise UsageError("--corpus-tokens", got=options.corpus_tokens, expected=str(error)) from error
    cluster = Cluster(options.gpus, options.gpu, options.gpus_per_node)
    line = elsewhere.resolve(rest, options.model)
    reserve = int(options.reserve_gb * 1e9)
    host = None if options.host_memory_gb is None else int(options.host_memory_gb * 1e9)
    has = installed.named(options.installed)
    found = answer(Question(verb, line.argv, cluster, options.mfu, reserve, host, tokens, line.absent, has))
    if options.output:
        artifacts.write_json(options.output, found)
    show(found)
    return EXIT_CODES[found["verdict"]]


def split(argv: list[str]) -> tuple[list[str], str | None, list[str]]:
    """preflight's own flags, the verb, and the verb's flags."""
    for place, word in enumerate(argv):
        if word in ("torchrun", "python", "srun") and "megatron_prune" in argv[place:]:
            verb = argv.index("megatron_prune", place) + 1
            return argv[:place], argv[verb] if argv[verb : verb + 1] and argv[verb] in VERBS else None, argv[verb + 1 :]
        if word in VERBS:
            return argv[:place], word, argv[place + 1 :]
    return argv, None, []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron_prune preflight", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="megatron_prune preflight [options] VERB …",
    )  # fmt: skip
    add = parser.add_argument
    add("--gpus", type=int, required=True, metavar="N", help="ranks of the job")
    add("--gpu", default="h100", choices=GPUS, help="kind of GPU (default: %(default)s)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    add(
        "--installed",
        default=CONTAINER,
        metavar="WORDS",
        help="what every node has besides PyTorch, of te, apex, flash-attn, nvrx and emerging-optimizers, with commas "
        "between, or none (default: %(default)s, as launch/Dockerfile.ngc has; launch/Dockerfile: none)",
    )
    add(
        "--mfu",
        type=float,
        default=0.4,
        metavar="F",
        help="share of dense bf16 FLOPs that is reached, for times (default: %(default)s); measure yours",
    )
    add(
        "--reserve-gb",
        type=float,
        default=6,
        metavar="GB",
        help="of every GPU, for the CUDA context, NCCL, workspaces and fragmentation (default: %(default)s)",
    )
    add("--host-memory-gb", type=float, metavar="GB", help="memory of a node, without which it is told and not judged")
    add(
        "--model",
        metavar="FILE",
        help="the model's flags, while the checkpoint that says them is not here (# begins a comment)",
    )
    add("--corpus-tokens", metavar="N", help="what the corpora hold, such as 750B, while they are not here")
    add("--output", metavar="FILE.json", help="the answer as data, too")
    return parser  # fmt: skip


def answer(question: Any) -> dict[str, Any]:
    """Rehearse and check; the whole answer as JSON."""
    from megatron_prune.preflight import checks, dry_run

    cluster = question.cluster
    facts: dict[str, Any] = {"parameters": None}
    try:
        rehearsed = dry_run.rehearse(
            question.verb, question.argv, gpus=cluster.gpus, per_node=cluster.local_ranks,
            capability=cluster.gpu.capability, has=question.installed,
        )  # fmt: skip
    except dry_run.Refused as refused:
        findings = [checks.Finding("arguments", "no", str(refused))]
    else:
        findings = [checks.Finding("arguments", "yes", "accepted by the verb and by Megatron")]
        findings += checks.all_findings(question, rehearsed)
        facts["parameters"] = rehearsed.shape.parameters()
    return {
        "version": 2,
        "verdict": checks.verdict(findings),
        "command": [question.verb, *question.argv],
        "cluster": asdict(cluster),
        **facts,
        "findings": [asdict(finding) for finding in findings],
        "versions": artifacts.versions(),
    }


def show(found: dict[str, Any]) -> None:
    """Print an answer for people."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
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
