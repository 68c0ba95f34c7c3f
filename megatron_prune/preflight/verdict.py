"""The whole answer of preflight: a dry run of a command line for a cluster, every check of it, and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from megatron_prune import artifacts, methods, screen
from megatron_prune.preflight import checks, cost, dry_run, files
from megatron_prune.preflight.checks import Finding, JobQuestion, Verdict
from megatron_prune.preflight.dry_run import Rehearsal

DECIDING = ("memory", "host memory", "data", "storage")  # a "look" of other checks: it runs, but badly
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
        findings = [Finding("arguments", "no", str(refused))]
    else:
        findings = [Finding("arguments", "yes", "accepted by the verb and by Megatron")]
        findings += all_findings(question, rehearsed)
        facts["parameters"] = rehearsed.shape.parameters()
    return {
        "version": 2,
        "verdict": verdict(findings),
        "command": [question.verb, *question.argv],
        "cluster": asdict(cluster),
        **facts,
        "findings": [asdict(finding) for finding in findings],
        "versions": artifacts.versions(),
    }


def all_findings(question: JobQuestion, rehearsal: Rehearsal) -> list[Finding]:
    """Every check on a command line that Megatron accepts."""
    args, shape, stages = rehearsal.args, rehearsal.shape, rehearsal.stages
    alone = question.verb == "sparsify" and methods.get_sparse(args.method).statistic == "none"
    if alone and args.allocation in ("uniform", "global"):
        return [*checks.layout(question, rehearsal), *files.weights_alone(args)]
    found = [
        checks.installed(question, rehearsal),
        *checks.layout(question, rehearsal),
        *checks.dimensions(args, shape),
    ]
    if rehearsal.unbuilt is not None:
        return [*found, Finding("model", "no", f"Megatron cannot build it: {rehearsal.unbuilt}")]
    found += checks.balance(args, shape, rehearsal)
    found.append(checks.memory_of_ranks(question, rehearsal))
    found.append(checks.memory_of_nodes(question, rehearsal))
    found += files.data(question, args)
    found += files.start(question, rehearsal)
    if question.trains:
        spent = cost.time(args, shape, question.cluster, question.mfu, checks.teacher_shape(args))
        found.append(Finding(
            "time", "yes",
            f"{spent.step_seconds:.2f} s a step and {spent.gpu_hours:,.0f} GPU-hours for {spent.tokens / 1e9:,.2f}B "
            f"tokens in {spent.steps:,} steps, if MFU is {question.mfu:g}",
            asdict(spent) | {"mfu": question.mfu},
        ))  # fmt: skip
        found.append(files.storage(args, shape, spent.steps))
    assert len(stages) == args.pipeline_model_parallel_size
    return found


def verdict(findings: Sequence[Finding]) -> Verdict:
    """Will it run? "look" if nothing refuses it and one of ``DECIDING`` is undecided."""
    if any(finding.verdict == "no" for finding in findings):
        return "no"
    return "look" if any(f.verdict == "look" and f.check in DECIDING for f in findings) else "yes"


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
