"""What the study's report says of each claim of README.md, as the tables of RESULTS.md.

    python examples/miniature/claims.py runs/miniature-small-x0.3/report/results.json

Reads verdicts and answers to ``compare:``, whose p values are corrected in the report. A claim is *shown*; or its
contrary is, where the report tells the opposite from nothing; or it is *undecided*, and then the gap or slope follows
that 80% of such studies would have found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prune.study.report.tables import shown_p
from megatron_prune.study.report.tabular import interval, signed

Answer = Mapping[str, Any]
SETTINGS = {"equal-training": "equal training", "equal-total": "equal total"}
SHOWN, CONTRARY, OPEN = "shown", "the contrary is shown", "undecided"


def tables(results: Mapping[str, Any]) -> str:
    """The gaps of the family's comparisons and of the others, and one line per claim, as Markdown."""
    family = [one for one in results["verdicts"] if one["corrected"] is not None]
    others = [one for one in results["verdicts"] if one["corrected"] is None]
    return "\n".join([*_gaps(family, p=True), "", *_gaps(others, p=False), "", *_claims(family, results["compare"])])


def _gaps(verdicts: Sequence[Answer], *, p: bool) -> Iterator[str]:
    yield "| method | setting | tokens of retraining | scratch | pruned | scratch minus pruned |" + " p | lower |" * p
    yield "| --- | --- | ---: | ---: | ---: | ---: |" + " ---: | --- |" * p
    for one in verdicts:
        losses = f"{one['scratch']['test']:.3f} | {one['pruned']['test']:.3f}"
        subject = f"| {_name(one)} | {SETTINGS[one['setting']]} | {one['tokens']:,} "
        end = f" {shown_p(one['corrected'])} | {one['winner']} |" if p else ""
        yield f"{subject}| {losses} | {_gap(one['test'])} |{end}"


def _claims(family: Sequence[Answer], compare: Sequence[Answer]) -> Iterator[str]:
    yield "| claim | answer | by |"
    yield "| --- | --- | --- |"
    for one in family:
        answer = {"pruned": SHOWN, "scratch": CONTRARY}.get(one["winner"], OPEN)
        yield _line(f"(a) {_name(one)}, {one['tokens']:,} tokens", answer, one["test"], one["corrected"], one)
    for one in compare:
        answer = {"falls": SHOWN, "vanishes": SHOWN, "larger": SHOWN, "open": OPEN}.get(one["outcome"], CONTRARY)
        if answer == OPEN and one["asked"]["kind"] == "vanishes" and (one["gap"]["high"] or 0) < 0:
            answer = "no lead: scratch is ahead"  # by the interval; the p value tests equivalence
        yield _line(one["subject"], answer, one["gap"], one["corrected"], one)


def _line(claim: str, answer: str, gap: Answer, p: float | None, one: Answer) -> str:
    found = f"{_gap(gap, 4)}, p {'not tested' if p is None else shown_p(p)}"
    if answer == OPEN and one.get("detectable") is not None:
        found += f"; {one['detectable']:.4f} would have been found"
    return f"| {claim} | **{answer}** | {found} |"


def _gap(gap: Answer, digits: int = 3) -> str:
    return f"{signed(gap['mean'], digits)} {interval(gap['low'], gap['high'], digits)}"


def _name(one: Answer) -> str:
    pattern = " 2:4" if one["pattern"] == "2:4" else ""
    scratch = {"masked": ", scratch under its masks", "dense": ", dense scratch"}[one["against"]] * one["sparse"]
    distilled = ", both distilled" * (one["objective"] == "distill")
    return f"{one['method']}{pattern}{scratch}{distilled}, {one['ratio']:.1%} removed"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("claims.py: expected the results.json of a report")
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
