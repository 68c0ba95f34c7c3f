"""What the head of the page says of the parent: its stages, what is only declared, a recipe other than the arms'."""

from __future__ import annotations

from megatron_prune.study.analysis.results import Results
from megatron_prune.study.match import NAMED


def said(found: Results) -> list[str]:
    """Sentences, none where the parent is one run of the study with the recipe of the arms."""
    return [*_stages(found), *_declared(found), *_recipe(found)]


def _stages(found: Results) -> list[str]:
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
    """Every difference once, over all comparisons."""
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
