"""The report of a study: ``report/index.html`` in one file, ``results.json``, ``results.csv``, figures and tables.

Every number on the page comes from ``Results``; this module only formats. The page contains its figures and needs no
network; it opens with the conclusion and ends with the accounts.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from megatron_prune import artifacts
from megatron_prune.study import grid, schema
from megatron_prune.study.analysis import results
from megatron_prune.study.analysis.effects import ASKED, FourArms
from megatron_prune.study.analysis.results import Results
from megatron_prune.study.grid import label
from megatron_prune.study.match import NAMED
from megatron_prune.study.pair import DIFFERS
from megatron_prune.study.prunings import Places
from megatron_prune.study.report import appendix, curves, figures, four_arms, pareto, tables, trends
from megatron_prune.study.report.drawing import Drawing
from megatron_prune.study.report.tabular import MINUS, Table, perplexity

MOST_PENDING = 12  # listed individually
EXPLAINED = {
    "equal-training": "Scratch was trained on as many tokens as the pruned model was retrained on, the same ones.",
    "equal-total": "Scratch was trained on as many tokens as the pruned model in total: its parent's, its pruning's "
    "and its retraining's.",
    "equal-flops": "Scratch was trained with as many FLOPs as the pruned model in total: its parent's, its pruning's "
    "and its retraining's.",
}


def write(found: Results, places: Places) -> Path:
    """Write the report's files; returns the page's path."""
    directory = places.root / "report"
    losses = {cell: places.losses(cell) for cell in found.records}
    if found.study.parent.load:
        losses["parent"] = places.beside_parent(found.study) / "losses.csv"
    made = (
        four_arms.figure(found), figures.gaps(found), figures.final_losses(found), trends.costs(found),
        *pareto.serving_costs(found), trends.loss_by_budget(found),
        trends.gap_by_budget(found), trends.gap_by_ratio(found), curves.loss_curves(found, losses),
    )  # fmt: skip
    drawings = [figure for figure in made if figure]
    for figure in drawings:
        figure.write(directory / "figures")
    for one in (*_in_text(found), *appendix.every(found)):
        one.write(directory / "tables")
    artifacts.write_json(directory / "results.json", results.to_json(found))
    artifacts.write_bytes(directory / "results.csv", table(found).encode())
    page = directory / "index.html"
    artifacts.write_bytes(page, render(found, drawings).encode())
    return page


def table(found: Results) -> str:
    """The rows as CSV; an unknown value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, results.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.rows)
    return text.getvalue()


def render(found: Results, drawings: list[Drawing]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_prune.study.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["minus"] = minus
    parent = found.parent
    return environment.get_template("page.html.j2").render(
        name=found.study.name,
        summary=_summary(found),
        headlines=_headlines(found),
        contrasts=_contrasts(found),
        taught=_taught(found),
        rests_on=_rests_on(found),
        verdicts=found.verdicts,
        remarks=_remarks(found),
        figures=drawings,
        several_seeds=len(found.study.seeds) > 1,
        tables={one.name: one for one in _in_text(found)},
        appendix=appendix.every(found),
        titles=TITLES,
        matches=[item for item in appendix.matches(found).rows if item["lines"]],
        family=max((verdict.family for verdict in found.verdicts), default=0),
        without=max((verdict.without for verdict in found.verdicts), default=0),
        one_parent=not found.study.parent_per_seed,
        bootstrapped=any(verdict.documents for verdict in found.verdicts),
        unigram=_unigram(parent),
        configuration=yaml.safe_dump(schema.resolved(found.study), sort_keys=False),
        ran=found.ran,
    )


def minus(text: str) -> str:
    """``-0.094`` → ``−0.094``: a minus as wide as a plus; hyphens stay."""
    return re.sub(r"(?<![\w-])-(?=\d)", MINUS, text)


TITLES = {
    "rows": "Every run",
    "sweeps": "Learning rates",
    "prunings": "Prunings",
    "tasks": "Tasks of the suites",
    "scores": "Every model on tasks and other corpora",
    "account": "Tokens and FLOPs",
    "matches": "What was compared with what",
    "seconds": "Time",
    "left-out": "Not shown",
}


def _headlines(found: Results) -> list[dict[str, Any]]:
    """The conclusion: name, meaning and headlines of each setting, with what each is without. Empty before anything is
    finished."""
    known = {one.setting for one in found.headlines}
    known |= {one.setting for one in found.unfinished if not one.question}
    settings = [setting for setting in tables.SETTINGS if setting in known and found.headlines]
    return [
        {
            "setting": tables.SETTINGS[setting],
            "means": EXPLAINED[setting],
            "lines": [
                *_with_conclusion(found, setting),
                *_without_conclusion(found, setting),
            ],
        }
        for setting in settings
    ]


def _with_conclusion(found: Results, setting: str) -> Iterator[tuple[str, str, str, str, str | None]]:
    for one in found.headlines:
        if one.setting == setting:
            missing = results.describe_unfinished(found, one.subject, setting)
            yield one.subject, one.winner, one.claim, one.words, missing


def _without_conclusion(found: Results, setting: str) -> Iterator[tuple[str, str, str, str, str]]:
    known = {one.subject for one in found.headlines if one.setting == setting}
    for one in found.unfinished:
        if one.setting == setting and not one.question and one.subject not in known:
            yield one.subject, "neither", "No conclusion", ".", one.words


def _in_text(found: Results) -> list[Table]:
    """The tables of the body that are not empty."""
    made = [*tables.in_text(found), four_arms.table(found), four_arms.worth(found)]
    return [table for table in made if table.rows]


def _taught(found: Results) -> dict[str, list[tuple[str, str, str]]]:
    """What the start and the teacher give: (subject, claim, the rest of the sentence) by setting."""
    made: dict[str, list[tuple[str, str, str]]] = {}
    for one in found.four_arms:
        lines = made.setdefault(grid.setting_words(one.setting), [])
        lines += [(f"{one.subject}: {ASKED[e.question][0].lower()}{ASKED[e.question][1:]}", e.claim, e.words)
                  for e in one.effects]  # fmt: skip
        lines += [(f"{one.subject}: the teacher in tokens", "", _worth(one))] if one.worth else []
    return made


def _worth(one: FourArms) -> str:
    """``shortgpt, 50% removed: pruned, distilled on …; scratch, …``"""
    methods = dict.fromkeys(each.subject.label for each in one.worth)
    named = {name: [each.words for each in one.worth if each.subject.label == name] for name in methods}
    sentences = [f"{name}: {'; '.join(own)}" if len(named) > 1 else "; ".join(own) for name, own in named.items()]
    text = ". ".join(sentences)
    return f"{text[0].upper()}{text[1:]}."


def _contrasts(found: Results) -> dict[str, list[tuple[str, str, str, str | None]]]:
    """The answers to ``compare`` by setting, with what each is without."""
    made: dict[str, list[tuple[str, str, str, str | None]]] = {}
    for setting in tables.SETTINGS:
        own = [one for one in found.contrasts if one.setting == setting]
        lacks = {one.subject: one.words for one in found.unfinished if one.question and one.setting == setting}
        lines = made.setdefault(grid.setting_words(setting), [])
        lines += [(one.subject, one.claim, one.words, lacks.pop(one.subject, None)) for one in own]
        lines += [(subject, "No answer", ".", words) for subject, words in lacks.items()]
    return {setting: lines for setting, lines in made.items() if lines}


def _rests_on(found: Results) -> str:
    """The basis of the conclusion: budgets, and the kind of intervals."""
    if not found.headlines:
        return ""
    budgets = sorted({verdict.tokens for headline in found.headlines for verdict in headline.verdicts})
    at = " or ".join(f"{tokens:,}" for tokens in budgets)
    largest = ", the largest budget" if len(found.study.budgets) > 1 else ""
    text = (
        f"Test losses after {at} tokens of retraining{largest}{figures.removed(found)}; differences in nats per token."
    )
    over_seeds = any(headline.test.low is not None for headline in found.headlines)
    if over_seeds:
        text += f" Intervals are paired t over seeds{', for this one parent' * (not found.study.parent_per_seed)}."
    elif any(headline.interval for headline in found.headlines):
        text += " There is one seed: intervals are over evaluation documents and do not cover other seeds."
    else:
        text += " There is one seed, and too little text for an interval over documents."
    return text


def _unigram(parent: Mapping[str, Any] | None) -> dict[str, str] | None:
    """The unigram losses; None if the scored texts no longer exist."""
    losses = parent["unigram_loss"] if parent else {}
    return None if not losses or None in losses.values() else {name: f"{loss:.3f}" for name, loss in losses.items()}


def _summary(found: Results) -> str:
    parent, study = found.parent, found.study
    if parent is None:
        return "The parent is not finished yet."
    tokens = "an unknown number of tokens" if parent["tokens"] is None else f"{parent['tokens']:,} tokens"
    seeds = "one seed" if len(study.seeds) == 1 else f"{len(study.seeds)} seeds"
    declared = "declared to be " * parent["declared"]
    return (
        f"A parent of {parent['parameters']:,} parameters, {declared}trained on {tokens} (test loss "
        f"{parent['test_loss']:.3f}, perplexity {perplexity(tables.exp(parent['test_loss']))}), is pruned and trained "
        f"on; models of the same shapes are trained from random weights. {seeds.capitalize()}, "
        f"{study.recipe.global_batch_size} × {study.data.seq_length} tokens per step."
    )


def _remarks(found: Results) -> list[str]:
    """Remarks on files and parent, on comparisons without a verdict, and on unexpected effects of study.yaml."""
    remarks = [f"Not believed: {said}." for said in found.disbelieved]
    if found.verified is not None:
        remarks.append(f"Read again, whole: {verified_words(found.verified)}.")
    if found.left_out:
        remarks.append(
            f"{len(found.left_out)} more finished in this folder and are not shown: the table “Not shown” has them, "
            "and comparisons between them count in the correction of p values."
        )
    remarks += [*_stages(found), *_declared(found), *_recipe(found), *_differences(found)]
    remarks += [f"{note}." for note in grid.notes(found.study)]
    pending = sum(item.status == "pending" for item in found.compared)
    if pending > MOST_PENDING:
        remarks.append(f"{pending} of {len(found.compared)} comparisons are not finished.")
    for item in found.compared:
        made = item.comparison
        setting = tables.setting_name(made.setting, made.against, made.pruning.sparse)
        name = f"{setting}, {label(*made.subject)}, seed {made.seed}"
        if made.not_run:
            remarks.append(f"{name}: not run, since {made.not_run}.")
        elif item.status == "pending" and pending <= MOST_PENDING:
            remarks.append(f"{name}: not finished.")
    return remarks


def verified_words(read: Mapping[str, int]) -> str:
    """``6 checkpoints, 2 masks, 4 corpora; 1 changed``"""
    counts = ", ".join(f"{number} {name}" for name, number in read.items() if name != "changed")
    return f"{counts}; {read['changed'] or 'none'} changed"


def _stages(found: Results) -> list[str]:
    """The parent's history, if it has more than one stage."""
    stages = found.parent["stages"] if found.parent else []
    if len(stages) < 2:
        return []
    words = [f"{stage['method']} ({stage['tokens']:,} tokens read)" if stage["kind"] == "pruned"
             else f"a training on {stage['tokens']:,} tokens" for stage in stages]  # fmt: skip
    return [f"Behind the parent are {len(stages)} stages, all of them counted: {', then '.join(words)}."]


def _declared(found: Results) -> list[str]:
    parent, reason = found.study.parent, found.study.parent.declared_unseen
    if reason is not None:
        return [f"That the parent has seen no text of this study is declared, not accounted: {reason.rstrip('.')}."]
    if parent.pretrain is not None or found.parent is None or not found.parent["declared"]:
        return []
    return [
        "What the parent was trained on is not accounted: whether it has seen text of this study is not known "
        "(parent.declared_unseen in study.yaml says why not, where there is a reason)."
    ]


def _recipe(found: Results) -> list[str]:
    """Differences between the parent's recipe and the arms', each once over all comparisons."""
    differences = dict.fromkeys(
        f"{line.field.removeprefix('recipe of the parent').lstrip(':, ')} {line.pruned} against {line.scratch}"
        for item in found.compared
        for line in item.match
        if line.verdict == NAMED
    )
    if not differences:
        return []
    return [
        "Equal total tokens and equal FLOPs count the parent's as its own recipe spent them, which differs from that "
        f"of the compared runs (the parent's first): {'; '.join(differences)}."
    ]


def _differences(found: Results) -> list[str]:
    """Differences between the environments of compared runs."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for item in found.compared:
        for line in item.match:
            if line.verdict == DIFFERS:
                pair = f"{item.comparison.pruned} and {item.comparison.scratch}"
                seen.setdefault((line.field, str(line.pruned), str(line.scratch)), []).append(pair)
    return [
        f"Compared runs differ in {field}: {pruned} for pruned, {scratch} for scratch, in {len(pairs)} "
        f"comparison{'s' * (len(pairs) != 1)} ({pairs[0]}{', …' if len(pairs) > 1 else ''})."
        for (field, pruned, scratch), pairs in seen.items()
    ]
