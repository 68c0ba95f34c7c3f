"""The whole answer of preflight: a dry run of a command line for a cluster, and every check of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from megatron_prune import artifacts
from megatron_prune.preflight import checks, dry_run
from megatron_prune.preflight.checks import JobQuestion


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
