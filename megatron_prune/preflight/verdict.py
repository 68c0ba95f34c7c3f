"""The whole answer of preflight: a dry run of a command line for a cluster, every check of it, and a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from megatron_prune import artifacts, screen
from megatron_prune.preflight import checks, dry_run
from megatron_prune.preflight.checks import JobQuestion

_SUMMARIES = {
    "yes": "it will run",
    "look": "it may or may not run: look first",
    "no": "it will not run",
}
_STYLES = {"yes": "green", "look": "yellow", "no": "red", "not checked": "cyan"}


def answer(question: JobQuestion, verb: Callable[[list[str]], int]) -> dict[str, Any]:
    """Dry-run ``verb`` up to its arguments, and check them; returns the answer as JSON."""
    cluster = question.cluster
    facts: dict[str, Any] = {"parameters": None}
    try:
        rehearsed = dry_run.rehearse(
            verb, question.argv, gpus=cluster.gpus, per_node=cluster.local_ranks,
            capability=cluster.gpu.capability, has=question.installed,
        )  # fmt: skip
    except dry_run.MegatronRefused as refused:
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
    """Print the answer as a table."""
    console = screen.console(highlight=False)
    if not console.is_terminal:
        console = screen.console(highlight=False, width=140)
    size = f", {found['parameters'] / 1e9:.3f}B parameters" if found["parameters"] else ""
    table = Table(title=f"{found['command'][0]} on {found['cluster']['gpus']} x {found['cluster']['kind']}{size}")
    for column in ("check", "verdict", "reason"):
        table.add_column(column, overflow="fold", no_wrap=column != "reason")
    for finding in found["findings"]:
        style = _STYLES[finding["verdict"]]
        table.add_row(finding["check"], f"[{style}]{finding['verdict']}[/{style}]", escape(finding["reason"]))
    console.print(table)
    console.print(_SUMMARIES[found["verdict"]], style="bold")
