"""May these two runs be compared? Their accounts decide, field by field (DESIGN §7).

*Equal training*: the same samples of the same stream in the same order, the same batch, length and
steps, the same shape, and every resolved argument equal outside ``ALLOWED``. *Equal total*: the same
stream and batch, every argument equal outside ``ALLOWED`` and what follows from the number of steps
(``OWN_STEPS``), and tokens(scratch) = tokens(parent) + tokens(retraining) + tokens(pruning) within one
step or 0.1%. *Equal FLOPs*: the same with executed FLOPs in place of tokens. In all of them a
sparse model was retrained under the masks that its pruning made, and the scratch run was trained under the same masks,
or, where it is a dense one, under none; retraining began with the weights that the pruning left, and every loss that is
shown is of the same text. Where the study sweeps the learning rate, both arms had the same rates.

What is behind the pruned arm is in the lineage of its account (``training/lineage``): it must be the parent's stages as
they are now, then the study's prunings and the retrainings between them, each begun with what the one before it left.
Where the parent's tokens or FLOPs count, ``parents`` names what its recipe has other than the arms'.

The result is the list of what was compared, for the report; the first thing that does not match
raises AccountError, which names both runs and the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.errors import AccountError
from megatron_prune.study import environment, parents
from megatron_prune.study.budgets import counted
from megatron_prune.study.parents import Line as Line
from megatron_prune.training import lineage
from megatron_prune.training.lineage import Stage

Account = Mapping[str, Any]

# Resolved arguments in which the two arms of any comparison may differ, and why.
ALLOWED: dict[str, str] = {
    "pretrained_checkpoint": "start",
    "shape_from": "start",
    "use_checkpoint_args": "start",
    "finetune": "start",
    # Set by pretrain for FP8 weights that begin with a checkpoint (training/pretrain.py).
    "load_main_params_from_ckpt": "start",
    "no_load_optim": "start",
    "stream_ckpt_dequant": "start",
    "load": "output path",
    "save": "output path",
    "tensorboard_dir": "output path",
    "wandb_save_dir": "output path",
    "wandb_exp_name": "output path",
    "save_interval": "how often an output is saved",
    # Set by pretrain where a run goes on at another number of ranks (engine/optimizer_layout.py).
    "ddp_bucket_size": "how gradients are packed to be sent",
    "masks": "a path; which masks they are is compared by their hash",
    # Counters, not settings: Megatron keeps them among its arguments. The range says what was consumed.
    "iteration": "progress at the last start",
    "curr_iteration": "progress at the last start",
    "consumed_train_samples": "progress at the last start",
    "consumed_valid_samples": "progress at the last start",
    "skipped_train_samples": "progress at the last start",
    "num_floating_point_operations_so_far": "progress at the last start",
    # How a global batch is computed: the sums are the same but for their order, so that the last digits differ.
    **dict.fromkeys(
        (
            "micro_batch_size",
            "eval_micro_batch_size",
            "world_size",
            "inprocess_active_world_size",
            "data_parallel_size",
            "rank",
            "local_rank",
        ),
        "how a batch is shared out",
    ),
}
# What a run's own number of steps decides, where the settings differ in it.
OWN_STEPS: dict[str, str] = {
    "train_iters": "own steps",
    "lr_decay_iters": "own steps",
    "lr_warmup_iters": "own steps, by the recipe",
    "stream_range": "own steps",
    "eval_interval": "own steps",
}
SWEPT: dict[str, str] = dict.fromkeys(("lr", "min_lr"), "chosen by validation loss among the same rates for both arms")
HORIZON = ("train_iters", "lr_decay_iters")  # where they are set, they are the run's own steps
STREAM = ("id", "seed", "seq_length", "epochs", "blend")
ACCOUNTED = ("global_batch_size", "seq_length", "seed", "permutation_seed", "parameters")
TOLERANCE = 0.001
DIFFERS = "differs"  # of what the runs were made with: listed at the top of the report


@dataclass(frozen=True)
class Runs:
    """Two complete accounts with their names, and the checks that both settings share.

    ``weights``: fingerprint of what the pruning left. ``parent``: stages behind the parent as they are now, none
    for one from elsewhere. ``between``: samples of the retrainings between links. ``texts``: by run, for all
    whose losses are shown, what it was evaluated on. ``warmup``: the recipe's steps of warm-up for a number of
    steps. ``masks``: the hash of those that the pruning made, None where it made none; ``dense`` says that the
    scratch run is to have none. ``swept``: of every learning rate, if there are several, both arms' accounts.
    ``scored``: what each was evaluated with.
    """

    pruned_name: str
    scratch_name: str
    pruned: Account
    scratch: Account
    weights: str
    texts: Mapping[str, Any]
    warmup: Callable[[int], int]
    parent: Sequence[Stage] = ()
    between: Sequence[Sequence[int]] = ()
    masks: str | None = None
    dense: bool = True
    swept: Mapping[float, tuple[Account, Account]] | None = None
    scored: tuple[environment.Environment, environment.Environment] = ({}, {})

    def refuse(self, setting: str, field: str, why: str) -> AccountError:
        return AccountError(
            f"{setting}: {self.pruned_name} and {self.scratch_name} may not be compared: {field}: {why}"
        )

    def whole(self, setting: str) -> None:
        """Each account is complete, agrees with itself, and starts as its arm says."""
        for name, account, start in (
            (self.pruned_name, self.pruned, "pruned"),
            (self.scratch_name, self.scratch, "random"),
        ):
            if account.get("complete") is not True:
                raise self.refuse(setting, "complete", f"{name} has not finished")
            if account["start"] != start:
                raise self.refuse(setting, "start", f"{name} started as {account['start']}, not as {start}")
            first, end = account["range"]
            if end - first != account["steps"] * account["global_batch_size"]:
                raise self.refuse(
                    setting,
                    "range",
                    f"{name} has {end - first} samples in its range and "
                    f"{account['steps']} steps of {account['global_batch_size']}",
                )
            if account["tokens"] != (end - first) * account["seq_length"]:
                raise self.refuse(
                    setting,
                    "tokens",
                    f"{name} says {account['tokens']}, its range holds {(end - first) * account['seq_length']}",
                )
            for key in HORIZON:
                if account["arguments"].get(key) not in (None, account["steps"]):
                    raise self.refuse(
                        setting, f"arguments.{key}", f"{name} has {account['arguments'][key]}, its own steps are "
                        f"{account['steps']}"
                    )  # fmt: skip
            warmed, rule = account["arguments"].get("lr_warmup_iters") or 0, self.warmup(account["steps"])
            if warmed != rule:
                raise self.refuse(
                    setting, "arguments.lr_warmup_iters", f"{name} has {warmed}, by the recipe it is {rule}"
                )

    def equal(self, setting: str, field: str, pruned: Any, scratch: Any) -> Line:
        if pruned != scratch:
            raise self.refuse(setting, field, f"{pruned} against {scratch}")
        return Line(field, pruned, scratch)

    def accounted(self, setting: str, fields: tuple[str, ...]) -> list[Line]:
        lines = [
            self.equal(setting, f"stream.{key}", self.pruned["stream"].get(key), self.scratch["stream"].get(key))
            for key in STREAM
        ]
        return lines + [self.equal(setting, key, self.pruned[key], self.scratch[key]) for key in fields]

    def held(self, setting: str) -> list[Line]:
        """Which zeros each run held."""
        expected = None if self.dense else self.masks
        for name, account, masks in (
            (self.pruned_name, self.pruned, self.masks),
            (self.scratch_name, self.scratch, expected),
        ):
            if account["masks"] != masks:
                raise self.refuse(
                    setting, "masks", f"{name} held {account['masks'] or 'none'}, expected was {masks or 'none'}"
                )
        if self.masks is None:
            return []
        verdict = "may differ: the study asks for dense scratch" if self.dense else "equal"
        return [Line("masks", self.masks, expected or "none", verdict)]

    def began(self, setting: str) -> Line:
        """Retraining started from the checkpoint that the pruning left, not from one that was there before it."""
        found = (self.pruned["initial"] or {}).get("fingerprint")
        if found != self.weights:
            why = f"{self.pruned_name} began with {found}, its pruning left {self.weights}"
            raise self.refuse(setting, "weights at the start", why)
        return Line("weights at the start", found, "random", "may differ: start")

    def text(self, setting: str) -> Line:
        """Every loss that is shown is over the same windows of the same corpora."""
        (first, text), *others = self.texts.items()
        for name, other in others:
            for corpus in sorted({*text, *other}):
                one, two = text.get(corpus), other.get(corpus)
                if one != two:
                    raise self.refuse(setting, "evaluation text", f"{corpus}: {one} for {first}, {two} for {name}")
        shown = ", ".join(
            f"{corpus} {own['fingerprint'][:12]} {own['windows']} x {own['seq_length']}" for corpus, own in text.items()
        )
        return Line("evaluation text", shown, shown)

    def environments(self) -> list[Line]:
        """Versions, devices and precision of both, equal or not: none of them is a reason not to compare."""
        trained = environment.differences(environment.of_account(self.pruned), environment.of_account(self.scratch))
        scored = [(f"{name} of the evaluation", a, b) for name, a, b in environment.differences(*self.scored)]
        return [Line(name, a, b, "equal" if a == b else DIFFERS) for name, a, b in [*trained, *scored]]

    def rates(self, setting: str) -> list[Line]:
        """Both arms were trained at every rate, each time on the samples of the run that stands for the arm."""
        if self.swept is None:
            return []
        for rate, accounts in self.swept.items():
            for name, chosen, account in zip(
                (self.pruned_name, self.scratch_name), (self.pruned, self.scratch), accounts, strict=True
            ):
                for key in ("complete", "start", "range", "steps", "tokens", "masks", *ACCOUNTED):
                    if account[key] != chosen[key]:
                        why = f"{name} has {chosen[key]}, its arm at lr {rate} {account[key]}"
                        raise self.refuse(setting, key, why)
                differing = _differing(account, chosen, ALLOWED | SWEPT)
                if differing or account["arguments"].get("lr") != rate:
                    field = differing or "lr"
                    raise self.refuse(setting, f"arguments.{field}", f"{name}'s arm at lr {rate} has another")
        rates = [float(rate) for rate in self.swept]
        return [self.equal(setting, "learning rates tried", rates, rates)]

    def arguments(self, setting: str, allowed: Mapping[str, str]) -> list[Line]:
        """Every resolved argument of both: differences inside ``allowed`` are listed, others refused."""
        ours, theirs = self.pruned["arguments"], self.scratch["arguments"]
        allowed = allowed if self.swept is None else {**allowed, **SWEPT}
        lines, same = [], 0
        for key in sorted(set(ours) | set(theirs)):
            a, b = ours.get(key, "absent"), theirs.get(key, "absent")
            if a == b:
                same += 1
            elif key in allowed:
                lines.append(Line(f"arguments.{key}", a, b, f"may differ: {allowed[key]}"))
            else:
                raise self.refuse(setting, f"arguments.{key}", f"{a} against {b}")
        return [*lines, Line("all other resolved arguments", same, same)]


def _differing(one: Account, other: Account, allowed: Mapping[str, str]) -> str | None:
    """The first argument outside ``allowed`` in which two runs differ."""
    ours, theirs = one["arguments"], other["arguments"]
    keys = sorted((set(ours) | set(theirs)) - set(allowed))
    return next((key for key in keys if ours.get(key, "absent") != theirs.get(key, "absent")), None)


def equal_training(runs: Runs) -> list[Line]:
    """The lines of an equal-training match; AccountError at the first field that differs."""
    setting = "equal-training"
    runs.whole(setting)
    lines = runs.accounted(setting, ("range", "steps", "tokens", "unique_tokens", *ACCOUNTED))
    lines += _common(runs, setting)
    return lines + runs.arguments(setting, ALLOWED)


def equal_total(runs: Runs, parent_tokens: int, consumed: int, *, declared: int = 0) -> list[Line]:
    """The lines of an equal-total match; AccountError as above.

    ``parent_tokens`` must be what all stages behind the parent say, and those that are only ``declared``.
    """
    setting = "equal-total"
    runs.whole(setting)
    _refuse_another_sum(runs, setting, "tokens", parent_tokens, declared)
    lines = runs.accounted(setting, ACCOUNTED) + _common(runs, setting)
    step = runs.scratch["global_batch_size"] * runs.scratch["seq_length"]
    lines.append(_total(runs, setting, "tokens", parent_tokens, consumed, step, declared))
    return [*lines, *parents.recipes(runs, setting), *runs.arguments(setting, ALLOWED | OWN_STEPS)]


def equal_flops(runs: Runs, parent_flops: int, spent: int, *, declared: int = 0) -> list[Line]:
    """The lines of an equal-FLOPs match, executed ones; AccountError as above.

    ``parent_flops`` must be what all stages behind the parent say, and those of tokens that are only ``declared``;
    ``spent`` is the pruning's.
    """
    setting = "equal-flops"
    runs.whole(setting)
    _refuse_another_sum(runs, setting, "FLOPs", parent_flops, declared)
    lines = runs.accounted(setting, ACCOUNTED) + _common(runs, setting)
    step = runs.scratch["flops_executed"] // runs.scratch["steps"]
    lines.append(_total(runs, setting, "flops_executed", parent_flops, spent, step, declared))
    return [*lines, *parents.recipes(runs, setting), *runs.arguments(setting, ALLOWED | OWN_STEPS)]


def _refuse_another_sum(runs: Runs, setting: str, unit: str, known: int, declared: int) -> None:
    """The parent's tokens, or FLOPs, are what its stages add up to; ``declared`` ones come before these."""
    found = (lineage.tokens if unit == "tokens" else lineage.flops)(runs.parent) + declared
    if (runs.parent or not declared) and found != known:
        raise runs.refuse(setting, f"{unit} of the parent", f"{known} here, {found} in the accounts of its stages")


def _common(runs: Runs, setting: str) -> list[Line]:
    return [
        runs.began(setting), *runs.held(setting), *parents.unseen(runs, setting), parents.behind(runs, setting),
        runs.text(setting), *runs.rates(setting), *runs.environments(),
    ]  # fmt: skip


def _total(runs: Runs, setting: str, unit: str, parent: int, spent: int, step: int, declared: int) -> Line:
    """Scratch has as many tokens, or FLOPs, as all of the pruned arm, within one step or 0.1%."""
    retrained, found = runs.pruned[unit], runs.scratch[unit]
    own = lineage.trainings(runs.pruned["lineage"][len(runs.parent) :])
    between = (lineage.tokens if unit == "tokens" else lineage.flops)(own)
    pruning = counted(spent, parent + retrained + between)
    total = parent + retrained + between + pruning
    terms = f"{parent:,} parent + {retrained:,} retraining + {pruning:,} pruning"
    terms += f" + {between:,} retraining between prunings" if between else ""
    difference = abs(found - total)
    name = {"tokens": "total tokens", "flops_executed": "total FLOPs"}[unit]
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
