"""Training and serving together: from how many served tokens a faster shape is worth a more expensive training.

A model that costs ``training`` FLOPs and ``serving`` FLOPs per token has cost training + serving · T after T served
tokens. Of two models with the same loss, the faster one pays from

    T = (training of the faster - training of the slower) / (serving of the slower - serving of the faster)

Serving a token is a forward pass of dense products: a third of a training token's FLOPs, at the study's sequence
length. Masks do not make a model faster here. What the parent has cost is spent, so the setting is equal training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prune.errors import UsageError
from megatron_prune.study.advise import answer
from megatron_prune.study.advise.ledgers import Curve, Measurements
from megatron_prune.study.advise.question import AdvisedTarget

FORWARD = 1 / 3  # of the FLOPs of training on a token


@dataclass(frozen=True)
class Served:
    """A model, its test ``loss``, the ``tokens`` and FLOPs of its training, and FLOPs per served token."""

    name: str
    loss: float
    tokens: float
    training: float
    serving: float

    def lifetime(self, served: float) -> float:
        """FLOPs of training and of ``served`` tokens."""
        return self.training + self.serving * served


def break_even(one: Served, other: Served) -> float | None:
    """Served tokens from which the faster of the two has cost less; 0 if it always has, None if both are as fast."""
    fast, slow = sorted((one, other), key=lambda model: model.serving)
    if fast.serving == slow.serving:
        return None
    return max(0.0, (fast.training - slow.training) / (slow.serving - fast.serving))


def compare(ledger: Measurements, target: AdvisedTarget) -> tuple[Served, list[Served]] | None:
    """The best measured model that meets ``target``, and its rivals: the parent as it is, and every other measured
    shape and start, trained until it has the same loss. None if the ledger does not reach the target.

    UsageError unless the setting is equal training.
    """
    if target.setting != "equal-training":
        raise UsageError(
            "--served-tokens", got=f"--setting {target.setting}", expected="--setting equal-training",
            why="what is compared is what is still to be spent, and the parent has been trained",
        )  # fmt: skip
    curves = [curve for group in answer.groups(ledger, target)[:1] for curve in group]
    own = [
        served for curve in curves if curve.holds(curve.budget(target)) for served in _at(curve, curve.budget(target))
    ]
    if not own:
        return None
    best = min(own, key=lambda served: served.loss)
    rivals = list(_parent(ledger))
    for curve in ledger.curves:
        if curve.setting == target.setting:
            rivals += _reaching(curve, best.loss)
    different = {rival.name: rival for rival in rivals if rival.name != best.name}
    return best, sorted(different.values(), key=lambda rival: rival.lifetime(target.served or 0.0))


def words(best: Served, rivals: Sequence[Served], served: float) -> list[str]:
    """The comparison as lines."""
    lines = [
        f"served tokens: {best.name} costs {best.training:.3g} FLOPs of training and {best.serving:.3g} per served "
        f"token: {best.lifetime(served):.3g} with {served:,.0f} served"
    ]
    for rival in rivals:
        even = break_even(best, rival)
        fast = best if best.serving < rival.serving else rival
        if even is None:
            cheap = min((best, rival), key=lambda model: model.training)
            said = f"as fast, and the training of {cheap.name} costs less"
        elif even == 0.0:
            said = f"{fast.name} costs less at any number of served tokens"
        else:
            said = f"{fast.name} costs less from {even:,.0f} served tokens on"
        lines.append(
            f"  against {rival.name} (loss {rival.loss:.3f}, {rival.tokens:,.0f} tokens of training): "
            f"{rival.lifetime(served):.3g} FLOPs with {served:,.0f} served; {said}"
        )
    return lines


def _named(curve: Curve, arm: str) -> str:
    return curve.label if arm == "pruned" else f"scratch of shape {curve.shape}"


def _served(curve: Curve, arm: str, loss: float, tokens: float) -> Served:
    """An arm after ``tokens`` of training; learning masks comes on top, for the pruned one."""
    training = tokens * curve.flops_per_token
    if arm == "pruned":
        tokens, training = tokens + curve.learned, training + curve.learned_flops
    return Served(_named(curve, arm), loss, float(tokens), float(training), FORWARD * curve.flops_per_token)


def _at(curve: Curve, tokens: float) -> Iterator[Served]:
    """Both arms at a budget that the curve holds."""
    losses = curve.at(tokens)
    yield _served(curve, "pruned", float(losses.pruned.mean()), tokens)
    beside = float(np.interp(tokens, curve.arms.tokens, curve.arms.scratch_tokens))
    yield _served(curve, "scratch", float(losses.scratch.mean()), beside)


def _reaching(curve: Curve, loss: float) -> Iterator[Served]:
    """Both arms at the budget at which they reach ``loss``, if that is among those that were run: on a line in
    log(tokens) between two budgets, or the smallest budget if that one is already below."""
    arms = curve.arms
    for arm, trained, found in (
        ("pruned", arms.tokens, arms.pruned),
        ("scratch", arms.scratch_tokens, arms.scratch),
    ):
        tokens, means = np.array(trained, dtype=float), found.mean(axis=0)
        below = np.flatnonzero(means <= loss)
        if not len(below):
            continue
        first = int(below[0])
        needed = tokens[0]
        if first:
            ends = means[first - 1], means[first]
            share = (ends[0] - loss) / (ends[0] - ends[1])
            needed = tokens[first - 1] * (tokens[first] / tokens[first - 1]) ** share
        yield _served(curve, arm, loss if first else float(means[0]), needed)


def _parent(ledger: Measurements) -> Iterator[Served]:
    """The parent: nothing more to train. Its loss is another one, which the line shows."""
    if ledger.parent_flops_per_token is not None and ledger.parent_loss is not None:
        yield Served("the parent as it is", ledger.parent_loss, 0.0, 0.0, FORWARD * ledger.parent_flops_per_token)
