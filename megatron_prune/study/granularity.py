"""What a pruning removes (layers, channels and heads, or single weights), and which comparisons a question selects."""

from __future__ import annotations

from megatron_prune import methods
from megatron_prune.methods import options
from megatron_prune.methods.base import DEPTH, DIMENSIONS, WIDTH
from megatron_prune.study.grid import Comparison
from megatron_prune.study.prunings import Pruning
from megatron_prune.study.schema import GapSelection, StudyConfig
from megatron_prune.study.values import GRANULARITIES


def granularity(pruning: Pruning) -> str:
    """What is removed: ``depth`` (layers), ``width`` (channels, heads), ``sparse`` (single weights), or ``depth and
    width``."""
    found: set[str] = set()
    for link in pruning.links:
        if link.method.pattern is not None:
            found.add("sparse")
            continue
        sizes = {name.removeprefix("target-").replace("-", "_") for name in link.method.target}
        if not sizes & set(DIMENSIONS):
            own = options.STRUCTURED[link.method.name]
            known = {flag.name for flag in own.flags()}
            given = {key: value for key, value in link.method.settings.items() if key.replace("-", "_") in known}
            sizes = set(methods.get(link.method.name).free_dimensions(own.read(given)))
        found |= {kind for kind, own in (("depth", DEPTH), ("width", WIDTH)) if sizes & set(own)}
    return " and ".join(kind for kind in GRANULARITIES if kind in found)


def selects(study: StudyConfig, selection: GapSelection, made: Comparison, *, every_budget: bool = False) -> bool:
    """Whether a selection of ``compare`` has a comparison."""
    if not selection.holds(made.group(0) | {"budget": made.budget}):
        return False
    if selection.budgets is None and not every_budget and made.budget != max(study.budgets):
        return False
    if selection.against is not None and made.pruning.sparse and made.against != selection.against:
        return False
    return selection.granularities is None or granularity(made.pruning) in selection.granularities
