"""May these two runs be compared? Their accounts decide, field by field.

*Equal training*: the same samples of the same stream in the same order, the same batch, length and
steps, the same shape, and every resolved argument equal outside ``ALLOWED``. (Where masks were learned by training,
scratch has as many steps more, from the same first sample on. Where batches are loaded dynamically, scratch has
followed the pruned run's schedule, or the study asks that each has its own, by the same rule.) *Equal total*: the same
stream and batch, every argument equal outside ``ALLOWED`` and what follows from the number of steps
(``OWN_STEPS``), and tokens(scratch) = tokens(parent) + tokens(retraining) + tokens(pruning) within one
step or 0.1%. *Equal FLOPs*: the same with executed FLOPs instead of tokens, those of a teacher's forward pass over the
run's samples included, whether the run executed them itself or read a cache. In all settings both runs have the same
objective; a sparse model is retrained under its pruning's masks, and the scratch run is trained under the same masks,
or without masks if it is dense; retraining begins with the pruned weights, and every loss shown is for the same text.
If the study sweeps the learning rate, both arms have the same rates.

The history of the pruned arm is the lineage in its account (``training/lineage``): the parent's stages as they are now,
then the study's prunings and the retrainings between them, each begun from the result of the one before. The parent's
tokens or FLOPs count as spent under its own recipe. Larger models need another rate, batch, precision or length, and a
published parent cannot be trained again, so such differences are allowed; the match and the head of the report name
each of them. Two things make the sum meaningless and are refused: another tokenizer (its tokens are another unit), and
an unfinished training.

The result is the list of compared fields, for the report; the first mismatch raises AccountError, which names both
runs and the field.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_prune.data.blend import intersecting
from megatron_prune.errors import AccountError
from megatron_prune.study.pair import ACCOUNTED, TOLERANCE, Line, Runs
from megatron_prune.study.sample_ranges import counted
from megatron_prune.training import lineage, objective
from megatron_prune.training.account import total_flops
from megatron_prune.training.argument_roles import ALLOWED, LEARNS, OWN_STEPS
from megatron_prune.training.lineage import Stage

NAMED = "differs: these tokens are counted as the parent's own recipe spent them"
TOKENIZER = "tokenizer_type"
TEACHER = re.compile(r"objective$|teacher|distill_")  # arguments of the objective
OF_ITS_STEPS = ("train_iters", "lr_decay_iters", "lr_warmup_iters")


def equal_training(runs: Runs) -> list[Line]:
    """The lines of an equal-training match; AccountError at the first field that differs."""
    setting = "equal-training"
    runs.whole(setting)
    if learned := [stage["learned"] for stage in runs.pruned["lineage"][len(runs.parent) :] if "learned" in stage]:
        return _with_learning(runs, setting, lineage.tokens(learned))
    lines = runs.accounted(setting, ("range", "steps", "tokens", "unique_tokens", *ACCOUNTED))
    lines += _common(runs, setting)
    return lines + runs.arguments(setting, ALLOWED)


def _with_learning(runs: Runs, setting: str, learned: int) -> list[Line]:
    """Equal training where masks were learned: that was training too, so that scratch has as many tokens more, from the
    first sample of the retraining on."""
    lines = runs.accounted(setting, ACCOUNTED) + _common(runs, setting)
    lines.append(runs.equal(setting, "first sample", runs.pruned["range"][0], runs.scratch["range"][0]))
    retrained, found = runs.pruned["tokens"], runs.scratch["tokens"]
    if found != retrained + learned:
        why = f"{retrained:,} retraining + {learned:,} learning masks against {found:,}"
        raise runs.refuse(setting, "tokens", why)
    lines.append(Line("tokens", f"{found:,} = {retrained:,} retraining + {learned:,} learning masks", f"{found:,}"))
    return [*lines, *runs.arguments(setting, ALLOWED | OWN_STEPS)]


def equal_total(runs: Runs, parent_tokens: int, consumed: int, *, declared: int = 0) -> list[Line]:
    """The lines of an equal-total match; AccountError as above.

    ``parent_tokens`` must equal the sum of the parent's stages plus the tokens that are only ``declared``.
    """
    setting = "equal-total"
    runs.whole(setting)
    _refuse_another_sum(runs, setting, "tokens", parent_tokens, declared)
    lines = runs.accounted(setting, ACCOUNTED) + _common(runs, setting)
    step = runs.scratch["global_batch_size"] * runs.scratch["seq_length"]
    lines.append(_total(runs, setting, "tokens", parent_tokens, consumed, step, declared))
    return [*lines, *recipes(runs, setting), *runs.arguments(setting, ALLOWED | OWN_STEPS)]


def equal_flops(runs: Runs, parent_flops: int, spent: int, *, declared: int = 0) -> list[Line]:
    """The lines of an equal-FLOPs match (executed FLOPs); AccountError as above.

    ``parent_flops`` must equal the sum of the parent's stages plus those of ``declared`` tokens; ``spent``: FLOPs of
    the pruning.
    """
    setting = "equal-flops"
    runs.whole(setting)
    _refuse_another_sum(runs, setting, "FLOPs", parent_flops, declared)
    lines = runs.accounted(setting, ACCOUNTED) + _common(runs, setting)
    step = total_flops(runs.scratch) // runs.scratch["steps"]
    lines.append(_total(runs, setting, "FLOPs", parent_flops, spent, step, declared))
    return [*lines, *recipes(runs, setting), *runs.arguments(setting, ALLOWED | OWN_STEPS)]


def _refuse_another_sum(runs: Runs, setting: str, unit: str, known: int, declared: int) -> None:
    """The parent's tokens or FLOPs must equal the sum of its stages plus the ``declared`` ones."""
    found = (lineage.tokens if unit == "tokens" else lineage.flops)(runs.parent) + declared
    if (runs.parent or not declared) and found != known:
        raise runs.refuse(setting, f"{unit} of the parent", f"{known} here, {found} in the accounts of its stages")


def _common(runs: Runs, setting: str) -> list[Line]:
    return [
        runs.began(setting), *runs.held(setting), *unseen(runs, setting), behind(runs, setting),
        *runs.schedules(setting), runs.text(setting), *runs.rates(setting), *runs.environments(),
    ]  # fmt: skip


def _total(runs: Runs, setting: str, unit: str, parent: int, spent: int, step: int, declared: int) -> Line:
    """Scratch must have as many tokens or FLOPs as the whole pruned arm, within one step or 0.1%."""
    amount = total_flops if unit == "FLOPs" else operator.itemgetter("tokens")
    retrained, found = amount(runs.pruned), amount(runs.scratch)
    own = lineage.trainings(runs.pruned["lineage"][len(runs.parent) :])
    between = (lineage.tokens if unit == "tokens" else lineage.flops)(own)
    pruning = counted(spent, parent + retrained + between)
    total = parent + retrained + between + pruning
    terms = f"{parent:,} parent + {retrained:,} retraining + {pruning:,} pruning"
    terms += f" + {between:,} retraining between prunings" if between else ""
    difference = abs(found - total)
    name = f"total {unit}"
    if difference > max(step, TOLERANCE * total):
        raise runs.refuse(
            setting,
            name,
            f"{total:,} = {terms} against {found:,}: expected a difference of at most one step ({step:,}) or 0.1%, "
            f"got {difference:,}",
        )
    marked = " (the parent's are declared)" if declared else ""
    verdict = "equal" if not difference else "within one step" if difference <= step else "within 0.1%"
    return Line(name, f"{total:,} = {terms}{marked}", f"{found:,}", verdict)


def equal_but_for_teacher(runs: Runs, *, own_steps: bool) -> list[Line]:
    """The lines of two runs of one arm, the first distilled and the second not; AccountError if more differs.

    ``own_steps``: their numbers of steps may differ, as those of scratch runs at equal FLOPs do.
    """
    setting = "the same run without a teacher"
    ours, theirs = runs.pruned, runs.scratch
    for name, account, wanted in ((runs.pruned_name, ours, "distill"), (runs.scratch_name, theirs, "lm")):
        if (found := objective.of(account)["name"]) != wanted:
            raise runs.refuse(setting, "objective", f"{name} has {found}, expected {wanted}")
    fields = () if own_steps else ("range", "steps", "tokens", "unique_tokens")
    lines = runs.streams(setting) + runs.equal_fields(setting, (*fields, "start", "masks", *ACCOUNTED))
    start, other = ((account["initial"] or {}).get("fingerprint") for account in (ours, theirs))
    lines.append(runs.equal(setting, "weights at the start", start, other))
    taught = {key: "the teacher" for key in (*ours["arguments"], *theirs["arguments"]) if TEACHER.match(key)}
    return [*lines, *runs.arguments(setting, ALLOWED | taught | (OWN_STEPS if own_steps else {}))]


def unseen(runs: Runs, setting: str) -> list[Line]:
    """No stage behind the pruned arm may have seen its retraining samples."""
    own = runs.pruned["stream"]
    start, stop = runs.pruned["range"]
    lines = []
    before = lineage.seen(runs.parent)
    between = lineage.seen(runs.pruned["lineage"][len(runs.parent) :])
    for stage in (*before, *between):
        who = "the parent" if len(before) == 1 and stage is before[0] else stage["run"]
        field = "range against the parent's" if who == "the parent" else f"range against {who}'s"
        stream = stage["stream"]
        if stream is None:
            lines.append(Line(field, f"{start}:{stop}", "not on a stream", "not compared: its text is only declared"))
        elif stream["id"] != own["id"]:
            if set(stream["corpora"]) & set(own["corpora"]):
                raise runs.refuse(setting, f"stream.id of {who}", f"{who} was trained on its corpora in another order")
            ours, theirs = (", ".join(prefix for _, prefix in one["blend"]) for one in (own, stream))
            verdict = "other corpora: a study whose corpora share documents with them is refused"
            lines.append(Line(f"text of {who}", ours, theirs, verdict))
        elif stage.get("batching") or runs.pruned.get("batching"):
            ours_of, theirs_of = runs.pruned.get("domains"), stage.get("domains")
            if ours_of is None or theirs_of is None:
                raise runs.refuse(setting, "domains", "an account does not say which samples of each corpus it read")
            if shared := intersecting(ours_of, theirs_of):
                corpus, first, end = shared
                why = f"{runs.pruned_name} retrains on samples of which {who} saw {first}:{end} of corpus {corpus + 1}"
                raise runs.refuse(setting, "domains", why)
            lines.append(Line(field.replace("range", "ranges"), _ranges(ours_of), _ranges(theirs_of), "disjoint"))
        else:
            first, end = stage["range"]
            if max(first, start) < min(end, stop):
                seen = f"{max(first, start)}:{min(end, stop)}"
                raise runs.refuse(
                    setting, "range", f"{runs.pruned_name} retrains on {start}:{stop}, of which {who} saw {seen}"
                )
            lines.append(Line(field, f"{start}:{stop}", f"{first}:{end}", "disjoint"))
    return lines


def _ranges(domains: list[list[int]]) -> str:
    """Of every corpus."""
    return ", ".join(f"{first}:{end}" for first, end in domains)


def behind(runs: Runs, setting: str) -> Line:
    """The lineage of the pruned arm: the parent's stages as they are now, then prunings and retrainings."""
    own: list[Stage] = runs.pruned["lineage"]
    try:
        lineage.check(own, str((runs.pruned["initial"] or {}).get("fingerprint")), runs.pruned_name)
    except AccountError as error:
        raise runs.refuse(setting, "lineage", str(error)) from error
    for stage, now in zip(own, runs.parent, strict=False):
        for key, value in now.items():
            if key != "run" and stage.get(key) != value:
                why = f"{key} of {now['run']} is {value} now, {runs.pruned_name} began with {stage.get(key)}"
                raise runs.refuse(setting, "lineage", why)
    rest = own[len(runs.parent) :]
    if not rest or rest[-1]["kind"] != "pruned":
        raise runs.refuse(setting, "lineage", f"{runs.pruned_name} has {len(own)} stages, the last is no pruning")
    found, asked = [stage["range"] for stage in lineage.trainings(rest)], [list(one) for one in runs.between]
    if found != asked:
        why = f"{runs.pruned_name} was trained on {found} after its parent, the study asks for {asked}"
        raise runs.refuse(setting, "retraining between prunings", why)
    return Line("lineage", " → ".join(map(_words, own)), "random", "may differ: start")


def _words(stage: Stage) -> str:
    if stage["kind"] == "pruned":
        return str(stage["method"])
    return f"trained on {stage['tokens']:,}"


def recipes(runs: Runs, setting: str) -> list[Line]:
    """Differences of every training behind the pruned arm from the arms; AccountError if its tokens cannot count."""
    own = runs.pruned["lineage"]
    stages = [*lineage.seen(own[: len(runs.parent)]), *lineage.trainings(own[len(runs.parent) :])]
    arms = lineage.recipe_of(runs.scratch["arguments"])
    lines: list[Line] = []
    for number, stage in enumerate(stages, 1):
        if stage["complete"] is not True:
            raise runs.refuse(setting, "complete", f"{stage['run']}, behind {runs.pruned_name}, has not finished")
        of = "recipe of the parent" + f", training {number} of {len(stages)}" * (len(stages) > 1)
        named: list[tuple[str, Any, Any]] = []
        others: list[tuple[str, Any, Any]] = []
        for key, value, arm in _differences(stage, arms, runs):
            if key == TOKENIZER:
                why = f"{value} of {stage['run']} against {arm}: their tokens are not the same unit"
                raise runs.refuse(setting, f"{of}: {key}", why)
            # The head of the report names the recipe one by one; all other differences share one line.
            (named if LEARNS.match(key) else others).append((key, value, arm))
        lines += [Line(f"{of}: {key}", value, arm, NAMED) for key, value, arm in named]
        if others:
            theirs, ours = ("; ".join(f"{one[0]} {one[side]}" for one in others) for side in (1, 2))
            lines.append(Line(f"{of}: other arguments", theirs, ours, NAMED))
    return lines


def _differences(stage: Stage, arms: Mapping[str, Any], runs: Runs) -> Iterator[tuple[str, Any, Any]]:
    recipe, steps = stage["recipe"], stage["steps"]
    for key in sorted({*recipe, *arms} - {*OF_ITS_STEPS}):
        value, arm = (one.get(key, "not set") for one in (recipe, arms))
        if value != arm:
            yield key, value, arm
    # By the arms' rule, for a run with this number of steps.
    if recipe.get("lr_decay_iters") not in (None, steps):
        yield "lr_decay_iters", recipe["lr_decay_iters"], steps
    warmed, rule = recipe.get("lr_warmup_iters") or 0, runs.warmup(steps)
    if warmed != rule:
        yield "lr_warmup_iters", warmed, rule
