"""Prune or scratch, for one target, from one ledger; or why the ledger has no answer.

All arms that meet the target are compared: every method's pruned model, and the scratch run of every shape. The answer
is *prune* if the best pruned model is below every scratch run, *scratch* if the best scratch run is below every pruned
model. ``best`` gives the confidence: wrong answers stay below 5% even for someone who follows the advice to train more
seeds and asks again. No claim is made beyond the ledger's parent, ratios and budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_prune.study.advise import best
from megatron_prune.study.advise import best as settle
from megatron_prune.study.advise.best import LOOKS
from megatron_prune.study.advise.ledgers import Curve, Measurements
from megatron_prune.study.advise.question import AdvisedTarget
from megatron_prune.study.analysis.inference import Difference
from megatron_prune.study.grid import setting_words

SAME_SIZE = 0.1  # relative difference allowed between a parent and the ledger's, in parameters and tokens
SAME_RATIO = 0.02
UNKNOWN = "don't know"
BETWEEN = {
    "laws": "not run at this budget; losses are read between budgets, by the laws fitted to them",
    "interpolated": "not run at this budget; losses are read between budgets, on a line in log(tokens)",
}


@dataclass(frozen=True)
class Advice:
    """``answer``: prune, scratch or don't know; ``lean``: what the means say if there is no answer.

    ``gap``: best scratch arm minus best pruned arm, in nats of test loss. ``confidence``: 1 - p, corrected for picking
    the best of ``picked_from`` arms and for all looks, this being number ``look``. ``more_seeds``: how many would
    probably give an answer.
    """

    answer: str
    lean: str | None = None
    method: str | None = None
    scratch_shape: str | None = None
    as_good: tuple[str, ...] = ()
    pruned_loss: float | None = None
    scratch_loss: float | None = None
    gap: Difference | None = None
    confidence: float | None = None
    look: int | None = None
    picked_from: int | None = None
    more_seeds: int | None = None
    break_evens: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    settle: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """One way to the target: a curve's pruned or scratch side, with its losses for the shared seeds."""

    curve: Curve
    losses: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.losses.mean())


def advise(ledger: Measurements, target: AdvisedTarget) -> Advice:
    """The advice."""
    if reasons := _another_parent(ledger, target):
        return Advice(UNKNOWN, reasons=tuple(reasons), settle=(settle.own_study(target),))
    curves, reason = _in_scope(ledger, target)
    if not curves:
        return Advice(UNKNOWN, reasons=(reason,), settle=(settle.own_study(target),))
    groups = _by_ratio(curves, target)
    if not groups:
        ratios = sorted({round(100 * curve.removed(target.ratio_of), 1) for curve in curves})
        reason = (
            f"{100 * target.ratio:.3g}% removed is beyond the ratios that were measured: "
            f"{', '.join(f'{ratio:g}%' for ratio in ratios)} of {_of(target)}"
        )
        runs = settle.new_runs(_one_ratio(curves), target, f"at {100 * target.ratio:.3g}% removed")
        return Advice(UNKNOWN, reasons=(reason,), settle=(runs,))
    found = [_at_ratio(group, target) for group in groups]
    advice = found[0] if len(found) == 1 else _between(found, groups, target)
    return replace(advice, caveats=(*advice.caveats, *_caveats(ledger, target)))


def groups(ledger: Measurements, target: AdvisedTarget) -> list[list[Curve]]:
    """The curves that the advice rests on, by ratio; empty if the ledger has none for the target."""
    if _another_parent(ledger, target):
        return []
    return _by_ratio(_in_scope(ledger, target)[0], target)


def _another_parent(ledger: Measurements, target: AdvisedTarget) -> list[str]:
    """Reasons why the ledger's parent is not comparable with the target's."""
    reasons = []
    for what, asked, measured in (
        ("parameters", target.parent_params, ledger.parent_params),
        ("tokens of training", target.parent_tokens, ledger.parent_tokens),
    ):
        if asked is not None and (measured is None or abs(asked / measured - 1) > SAME_SIZE):
            known = "an unknown number" if measured is None else f"{measured:,}"
            theirs = f"that of study {ledger.study} {known}"
            reasons.append(f"the parent has {asked:,} {what}, {theirs}: another size is another question")
    return reasons


def _in_scope(ledger: Measurements, target: AdvisedTarget) -> tuple[list[Curve], str]:
    """The curves of the requested kind, or a text with what the ledger has instead."""
    kinds = [curve for curve in ledger.curves if curve.setting == target.setting]
    if not kinds:
        has = ", ".join(dict.fromkeys(curve.setting for curve in ledger.curves))
        return [], f"nothing was measured in the setting {target.setting}; the ledger has {has}"
    found = [
        curve
        for curve in kinds
        if (curve.pattern, curve.sparse) == (target.pattern, target.pattern is not None)
        and target.method in (None, curve.method)
        and target.same_cuts(curve.shape)
    ]
    masked = [curve for curve in found if not curve.dense]
    if found:
        return masked or found, ""
    has = "; ".join(dict.fromkeys(curve.label for curve in kinds))
    kind = target.pattern or ("a shape cut in " + ", ".join(sorted(target.cuts)) if target.cuts else "a smaller shape")
    method = f" with {target.method}" if target.method else ""
    return [], f"{kind}{method} was not measured; in the setting {target.setting} the ledger has {has}"


def _by_ratio(curves: Sequence[Curve], target: AdvisedTarget) -> list[list[Curve]]:
    """The curves at the target's ratio, or those at the nearest ratios below and above; empty if one is missing."""

    def removed(curve: Curve) -> float:
        return curve.removed(target.ratio_of)

    at = [curve for curve in curves if abs(removed(curve) - target.ratio) <= SAME_RATIO]
    if at:
        return [at]
    below, above = ([c for c in curves if (removed(c) < target.ratio) == side] for side in (True, False))
    if not below or not above:
        return []
    nearest = max(map(removed, below)), min(map(removed, above))
    return [
        [curve for curve in side if abs(removed(curve) - ratio) <= SAME_RATIO]
        for side, ratio in zip((below, above), nearest, strict=True)
    ]


def _one_ratio(curves: Sequence[Curve]) -> list[Curve]:
    """Each method's curve once."""
    return list({curve.method: curve for curve in curves}.values())


def _at_ratio(curves: Sequence[Curve], target: AdvisedTarget) -> Advice:
    """The advice from curves at one ratio."""
    inside = [curve for curve in curves if curve.holds(curve.budget(target))]
    if not inside:
        asked = target.budget(curves[0].flops_per_token)
        ranges = " and ".join(dict.fromkeys(map(_range, curves)))
        reason = f"{asked:,.0f} tokens are beyond the budgets that were run, {ranges}"
        return Advice(
            UNKNOWN, reasons=(reason,), break_evens=tuple(even for curve in curves if (even := curve.break_even())),
            settle=(settle.new_runs(curves, target, f"at {asked:,.0f} tokens of retraining"),),
        )  # fmt: skip
    seeds = [seed for seed in inside[0].arms.seeds if all(seed in curve.arms.seeds for curve in inside)]
    if not seeds:
        return Advice(UNKNOWN, reasons=("its methods were not run under the same seeds",),
                      settle=(settle.own_study(target),))  # fmt: skip
    pruned: list[Arm] = []
    scratch: list[Arm] = []
    between: dict[str, list[str]] = {}
    for curve in inside:
        losses = curve.at(curve.budget(target))
        own = [curve.arms.seeds.index(seed) for seed in seeds]
        pruned.append(Arm(curve, losses.pruned[own]))
        scratch.append(Arm(curve, losses.scratch[own]))
        between.setdefault(losses.source, []).append(curve.name)
    caveats = [f"{', '.join(between[source])}: {BETWEEN[source]}" for source in BETWEEN if source in between]
    caveats += [
        f"{curve.name}: {curve.learned:,.0f} of the tokens learn its masks, {curve.budget(target):,.0f} retrain it"
        for curve in inside
        if curve.learned
    ]
    if all(curve.dense for curve in inside):
        caveats.append("scratch has no masks: it is a dense model with more weights than the sparse one")
    advice = _compare(_different(pruned), _different(scratch), len(seeds), target)
    return replace(advice, caveats=(*caveats, *advice.caveats))


def _range(curve: Curve) -> str:
    """The budgets that were run, with what the curve's masks were learned on."""
    low, high = (f"{tokens + round(curve.learned):,}" for tokens in (curve.arms.tokens[0], curve.arms.tokens[-1]))
    return f"{low} to {high}" + (f" ({curve.name}, its masks included)" if curve.learned else "")


def _different(arms: Sequence[Arm]) -> list[Arm]:
    """The distinct arms: runs that several methods share count once."""
    return list({arm.losses.tobytes(): arm for arm in reversed(arms)}.values())[::-1]


def _compare(pruned: Sequence[Arm], scratch: Sequence[Arm], seeds: int, target: AdvisedTarget) -> Advice:
    if best.look(seeds) is None:
        return _too_few(pruned, scratch, seeds, target)
    found = best.compare(*(np.stack([arm.losses for arm in side]) for side in (pruned, scratch)))
    first, rival = pruned[found.pruned], scratch[found.scratch]
    used = found.gap.seeds
    lean = _lean(first, rival, used)
    advice = replace(lean, gap=found.gap, confidence=1 - found.p, look=found.look, picked_from=found.picked_from)
    if used < seeds:
        looks = ", ".join(map(str, LOOKS))
        caveat = f"{seeds} seeds are there and the first {used} are used: answers are looked for at {looks} seeds"
        advice = replace(advice, caveats=(caveat,))
    if not found.sure:
        reason = (
            f"{used} seeds do not tell the best pruned and the best scratch model apart: {found.gap.mean:+.3f} nats, "
            f"p = {found.p:.2g}"
        )
        what = (
            f"nothing within {LOOKS[-1]} seeds: the difference is too small to matter beside their scatter"
            if found.more_seeds is None
            else settle.more_seeds(_curves(first, rival), target, seeds, found.more_seeds)
        )
        return replace(advice, reasons=(reason,), more_seeds=found.more_seeds, settle=(what,))
    own = pruned if found.prunes else scratch
    as_good = tuple(own[arm].curve.name if found.prunes else f"shape {own[arm].curve.shape}" for arm in found.as_good)
    return replace(advice, answer=advice.lean or UNKNOWN, as_good=as_good)


def _too_few(pruned: Sequence[Arm], scratch: Sequence[Arm], seeds: int, target: AdvisedTarget) -> Advice:
    """The advice from fewer seeds than the first look needs: only what the means say."""
    first, rival = (min(side, key=lambda arm: arm.mean) for side in (pruned, scratch))
    lean, more = _lean(first, rival, seeds), LOOKS[0] - seeds
    assert lean.gap is not None
    reason = (
        f"{seeds} seed{'s' * (seeds != 1)}: how far others would scatter around a gap of {lean.gap.mean:+.3f} nats is "
        f"judged from {LOOKS[0]} on"
    )
    what = settle.more_seeds(_curves(first, rival), target, seeds, more)
    return replace(lean, reasons=(reason,), more_seeds=more, settle=(what,))


def _lean(first: Arm, rival: Arm, seeds: int) -> Advice:
    """The means of the best pruned and the best scratch arm over the first ``seeds`` seeds."""
    losses = [float(arm.losses[:seeds].mean()) for arm in (first, rival)]
    even = first.curve.break_even()
    return Advice(
        UNKNOWN, "prune" if losses[0] < losses[1] else "scratch", first.curve.name, rival.curve.shape,
        pruned_loss=losses[0], scratch_loss=losses[1], gap=Difference(seeds, losses[1] - losses[0]),
        break_evens=(even,) if even else (),
    )  # fmt: skip


def _curves(first: Arm, rival: Arm) -> list[Curve]:
    return [first.curve] if first.curve is rival.curve else [first.curve, rival.curve]


def _between(found: Sequence[Advice], groups: Sequence[Sequence[Curve]], target: AdvisedTarget) -> Advice:
    """The advice at a ratio between two measured ones: theirs if they agree, with the lower confidence."""
    asked = f"{100 * target.ratio:.3g}%"
    ratios = [group[0].removed(target.ratio_of) for group in groups]
    text = " and ".join(f"{100 * ratio:.3g}%" for ratio in ratios)
    answers = {advice.answer for advice in found}
    if len(answers) == 1 and UNKNOWN not in answers:
        least = min(found, key=lambda advice: advice.confidence or 0.0)
        caveat = f"{asked} was not measured: at {text} the answer is the same, and the less sure one is shown"
        return replace(least, caveats=(caveat, *least.caveats))
    said = "; ".join(f"at {100 * ratio:.3g}%: {advice.answer}" for ratio, advice in zip(ratios, found, strict=True))
    reasons = dict.fromkeys(reason for advice in found for reason in advice.reasons)
    runs = settle.new_runs(_one_ratio(groups[0]), target, f"at {asked} removed")
    return Advice(
        UNKNOWN, reasons=(f"{asked} lies between ratios that do not agree ({said})", *reasons), settle=(runs,)
    )


def _of(target: AdvisedTarget) -> str:
    return "the blocks' linear weights" if target.ratio_of == "linears" else "all parameters"


def _caveats(ledger: Measurements, target: AdvisedTarget) -> list[str]:
    caveats = []
    if ledger.one_parent:
        caveats.append("conditional on one parent: another one of the same size was not tried")
    if target.parent_params is None and target.parent_tokens is None:
        tokens = "an unknown number of" if ledger.parent_tokens is None else f"{ledger.parent_tokens:,}"
        caveats.append(
            f"for a parent like that of {ledger.study}: {ledger.parent_params:,} parameters, {tokens} tokens"
        )
    elif target.parent_tokens is None:
        caveats.append("the parent's tokens were not given, and are taken to be the ledger's")
    caveats.append("by test loss on the study's own text, with its recipe: not by tasks, and not on other text")
    return caveats


def to_json(ledger: Measurements, asked: AdvisedTarget, advice: Advice) -> dict[str, Any]:
    """The advice with its question and its source."""
    return {
        "version": 1,
        "target": asked.to_json(),
        "ledger": {
            "study": ledger.study,
            "parent_params": ledger.parent_params,
            "parent_tokens": ledger.parent_tokens,
        },
        **asdict(advice),
        "words": words(ledger, asked, advice),
    }


def words(ledger: Measurements, asked: AdvisedTarget, advice: Advice) -> list[str]:
    """Text lines: the answer, then the evidence, then the measurements that would settle open questions."""
    lines = [_headline(advice)]
    lines += [f"  because {reason}" for reason in advice.reasons]
    if advice.gap is not None:
        lines.append(f"  {_numbers(advice)}")
    if advice.confidence is not None and advice.gap is not None:
        lines.append(f"  confidence {_percent(advice.confidence)} ({_how(advice, advice.gap)})")
    lines += [f"  {even.rstrip('.')}" for even in advice.break_evens]
    lines += [f"  note: {caveat}" for caveat in advice.caveats]
    lines += [f"  would settle it: {measurement}" for measurement in advice.settle]
    lines.append(f"  from study {ledger.study}, {setting_words(asked.setting)}")
    return lines


def _headline(advice: Advice) -> str:
    if advice.answer == UNKNOWN:
        lean = f" (the means lean to: {advice.lean})" if advice.lean else ""
        return f"Don't know{lean}."
    good = f"; as good within the seeds: {', '.join(advice.as_good)}" * bool(advice.as_good)
    if advice.answer == "prune":
        return f"Prune: {advice.method}{good}."
    return f"Train from scratch: shape {advice.scratch_shape}{good}."


def _numbers(advice: Advice) -> str:
    assert advice.gap is not None
    text = (
        f"test loss: {advice.method} {advice.pruned_loss:.3f}, best scratch ({advice.scratch_shape}) "
        f"{advice.scratch_loss:.3f}; scratch minus pruned {advice.gap.mean:+.3f} nats"
    )
    if advice.gap.low is None or advice.gap.high is None:
        return text
    return f"{text}, 95% interval {advice.gap.low:+.3f} to {advice.gap.high:+.3f}"


def _how(advice: Advice, gap: Difference) -> str:
    """The corrections in the confidence and the interval."""
    picked = f", for picking the best of {advice.picked_from} arms" * ((advice.picked_from or 1) > 1)
    return (
        f"paired over {gap.seeds} seeds, {gap.freedom:.3g} degrees of freedom; corrected for asking again with more "
        f"seeds, look {advice.look} of {len(LOOKS)}{picked}"
    )


def _percent(confidence: float) -> str:
    return "above 99.9%" if confidence > 0.999 else f"{100 * confidence:.1f}%"
