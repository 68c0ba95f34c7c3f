"""Two accounts side by side: the arms of a comparison, and the checks that every setting shares.

``Runs`` holds both accounts and gives a ``Line`` for each compared field; the first mismatch raises AccountError, which
names both runs and the field. ``match`` combines the checks for each setting.

Differences in the environment (versions, kind of device, precision) are listed but allowed. Precision settings are also
arguments, and those must be equal.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.errors import AccountError
from megatron_prune.training import objective
from megatron_prune.training.argument_roles import ALLOWED
from megatron_prune.training.lineage import Stage

Account = Mapping[str, Any]
Environment = Mapping[str, str]

SWEPT: dict[str, str] = dict.fromkeys(("lr", "min_lr"), "chosen by validation loss among the same rates for both arms")
HORIZON = ("train_iters", "lr_decay_iters")  # if set, they equal the run's own steps
STREAM = ("id", "seed", "seq_length", "epochs", "corpora")  # content: the paths of the data may differ
ACCOUNTED = ("global_batch_size", "seq_length", "seed", "permutation_seed", "parameters")
TOLERANCE = 0.001
DIFFERS = "differs"  # of the environment: listed at the top of the report


@dataclass(frozen=True)
class Line:
    """One compared field: its name, both values, and ``equal`` or why a difference is allowed."""

    field: str
    pruned: Any
    scratch: Any
    verdict: str = "equal"


@dataclass(frozen=True)
class Runs:
    """Two complete accounts with their names, and the checks that all settings share.

    ``weights``: fingerprint of the pruned checkpoint. ``parent``: the parent's stages as they are now, none for one
    from elsewhere. ``between``: samples of the retrainings between links. ``texts``: the evaluation text of every run
    whose loss is shown. ``warmup``: the recipe's warm-up steps for a number of steps. ``masks``: hash of the pruning's
    masks, or None; ``dense``: the scratch run has no masks. ``swept``: both arms' accounts at every learning rate of a
    sweep. ``scored``: the evaluation environment of each. ``follows``: the scratch run has followed the pruned one's
    schedule of batches.
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
    scored: tuple[Environment, Environment] = ({}, {})
    follows: bool = False

    def refuse(self, setting: str, field: str, why: str) -> AccountError:
        return AccountError(
            f"{setting}: {self.pruned_name} and {self.scratch_name} may not be compared: {field}: {why}"
        )

    def whole(self, setting: str) -> None:
        """Each account is complete, consistent, and starts as its arm requires."""
        for name, account, start in (
            (self.pruned_name, self.pruned, "pruned"),
            (self.scratch_name, self.scratch, "random"),
        ):
            if account.get("complete") is not True:
                raise self.refuse(setting, "complete", f"{name} has not finished")
            if account["start"] != start:
                raise self.refuse(setting, "start", f"{name}: got the start {account['start']}, expected {start}")
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
        return [*self.streams(setting), *self.equal_fields(setting, fields), *self.objective(setting)]

    def streams(self, setting: str) -> list[Line]:
        return [
            self.equal(setting, f"stream.{key}", self.pruned["stream"].get(key), self.scratch["stream"].get(key))
            for key in STREAM
        ]

    def equal_fields(self, setting: str, fields: tuple[str, ...]) -> list[Line]:
        return [self.equal(setting, key, self.pruned[key], self.scratch[key]) for key in fields]

    def objective(self, setting: str) -> list[Line]:
        """Both runs learned from the same: the text, or the same teacher in the same way. None for text alone."""
        ours, theirs = (objective.of(account) for account in (self.pruned, self.scratch))
        wanted, found = objective.settings(ours), objective.settings(theirs)
        for key in dict.fromkeys([*wanted, *found]):
            if wanted.get(key) != found.get(key):
                raise self.refuse(setting, f"objective: {key}", f"{wanted.get(key)} against {found.get(key)}")
        if ours == objective.LM:
            return []
        lines = [
            Line("objective", objective.words(ours), objective.words(theirs)),
            Line("teacher", ours["teacher"], theirs["teacher"]),
        ]
        if setting != "equal-training":
            counted = "its training counts as the parent's", "its training is not counted"
            lines.append(Line("the teacher's training", *counted, "may differ: start"))
        return lines

    def held(self, setting: str) -> list[Line]:
        """The masks that each run held."""
        expected = None if self.dense else self.masks
        for name, account, masks in (
            (self.pruned_name, self.pruned, self.masks),
            (self.scratch_name, self.scratch, expected),
        ):
            if account["masks"] != masks:
                raise self.refuse(
                    setting, "masks", f"{name} held {account['masks'] or 'none'}, expected {masks or 'none'}"
                )
        if self.masks is None:
            return []
        verdict = "may differ: the study asks for dense scratch" if self.dense else "equal"
        return [Line("masks", self.masks, expected or "none", verdict)]

    def began(self, setting: str) -> Line:
        """Retraining started from the pruning's checkpoint, not from an earlier one."""
        found = (self.pruned["initial"] or {}).get("fingerprint")
        if found != self.weights:
            why = f"{self.pruned_name} began with {found}, its pruning left {self.weights}"
            raise self.refuse(setting, "weights at the start", why)
        return Line("weights at the start", found, "random", "may differ: start")

    def text(self, setting: str) -> Line:
        """All losses shown are for the same windows of the same corpora."""
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

    def schedules(self, setting: str) -> list[Line]:
        """How batches were drawn from the corpora: not at all dynamically, by one schedule, or by one rule."""
        field = "schedule of batches"
        ours, theirs = self.pruned.get("schedule"), self.scratch.get("schedule")
        if ours is None and theirs is None:
            return []
        if ours is None or theirs is None:
            fixed, dynamic = (self.pruned_name, self.scratch_name)[:: 1 if ours is None else -1]
            raise self.refuse(setting, field, f"{fixed} has fixed proportions, those of {dynamic} changed")
        if not self.follows:
            if ours["settings"] != theirs["settings"]:
                raise self.refuse(setting, field, f"{ours['settings']} against {theirs['settings']}")
            return [Line(field, ours["hash"], theirs["hash"], "may differ: each arm has its own, by the same rule")]
        for what, a, b in (
            ("first samples of the corpora", ours["begins"], theirs["begins"]),
            *((f"block of step {block['step']}", _drawn(block), _drawn(other))
              for block, other in itertools.zip_longest(ours["blocks"], theirs["blocks"][: len(ours["blocks"])])),
        ):  # fmt: skip
            if a != b:
                raise self.refuse(setting, field, f"{what}: {a} against {b}")
        longer = len(theirs["blocks"]) > len(ours["blocks"])
        verdict = f"equal in the {self.pruned['steps']:,} steps that both have" if longer else "equal"
        return [Line(field, ours["hash"], theirs["hash"], verdict)]

    def environments(self) -> list[Line]:
        """Versions, devices and precision of both runs; differences are allowed."""
        trained = differences(of_account(self.pruned), of_account(self.scratch))
        scored = [(f"{name} of the evaluation", a, b) for name, a, b in differences(*self.scored)]
        return [Line(name, a, b, "equal" if a == b else DIFFERS) for name, a, b in [*trained, *scored]]

    def rates(self, setting: str) -> list[Line]:
        """Both arms were trained at every rate, on the same samples as the chosen run."""
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

    def _refuse_changed(self, setting: str, allowed: Mapping[str, str]) -> None:
        """AccountError if a launch that continued one of the runs had another argument outside ``allowed``."""
        for name, account in ((self.pruned_name, self.pruned), (self.scratch_name, self.scratch)):
            for key, value, step in changed_arguments(account):
                if key not in allowed:
                    why = f"{account['arguments'].get(key)} when {name} began, {value} from step {step} on"
                    raise self.refuse(setting, f"arguments.{key}", why)

    def arguments(self, setting: str, allowed: Mapping[str, str]) -> list[Line]:
        """Compare every resolved argument: differences in ``allowed`` are listed, others refused."""
        ours, theirs = self.pruned["arguments"], self.scratch["arguments"]
        allowed = allowed if self.swept is None else {**allowed, **SWEPT}
        self._refuse_changed(setting, allowed)
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


def _drawn(block: Mapping[str, Any] | None) -> Any:
    """A block's first step, and how many samples of each corpus it has."""
    return None if block is None else [block["step"], block["counts"]]


def changed_arguments(account: Account) -> list[tuple[str, Any, int]]:
    """(argument, value, first step) of launches that continued a run with other arguments than it began with."""
    attempts = account.get("attempts", [])
    first = max((n for n, attempt in enumerate(attempts) if attempt.get("from_step") == 1), default=0)
    return [
        (key, value, attempt["from_step"])
        for attempt in attempts[first:]
        for key, value in attempt.get("changed", {}).items()
    ]


def _differing(one: Account, other: Account, allowed: Mapping[str, str]) -> str | None:
    """The first argument outside ``allowed`` in which two runs differ."""
    ours, theirs = one["arguments"], other["arguments"]
    keys = sorted((set(ours) | set(theirs)) - set(allowed))
    return next((key for key in keys if ours.get(key, "absent") != theirs.get(key, "absent")), None)


# Environments of runs.

PRECISIONS = ("fp4", "fp8", "fp16", "bf16")  # arguments; the first one set wins


def of_account(account: Mapping[str, Any]) -> dict[str, str]:
    """The environment of a training, over all attempts. The device is that of the rank that writes the account."""
    attempts = account.get("attempts", [])
    found = _together([_of(attempt) for attempt in attempts])
    return {**found, "precision": precision(account["arguments"])}


def of_scores(scores: Mapping[str, Any]) -> dict[str, str]:
    """The environment of an evaluation."""
    return _of(scores)


def precision(arguments: Mapping[str, Any]) -> str:
    """``bf16``, ``fp8 (hybrid)`` …; ``fp32`` if no flag says otherwise."""
    for name in PRECISIONS:
        if value := arguments.get(name):
            return name if value is True else f"{name} ({value})"
    return "fp32"


def differences(pruned: Environment, scratch: Environment) -> list[tuple[str, str, str]]:
    """Each field of either environment, with both values."""
    names = [*pruned, *(name for name in scratch if name not in pruned)]
    return [(name, pruned.get(name, "none"), scratch.get(name, "none")) for name in names]


def words(environments: Iterable[Environment]) -> str:
    """All environments for a footer: ``3 runs: torch 2.9, …, on NVIDIA H100``."""
    counts = Counter(
        ", ".join(f"{name} {value}" for name, value in sorted(one.items()) if name != "device")
        + (f", on {one['device']}" if "device" in one else "")
        for one in environments
    )
    return "; ".join(f"{count} run{'s' * (count != 1)}: {text}" for text, count in counts.items())


def _of(made: Mapping[str, Any]) -> dict[str, str]:
    device = made.get("device")
    own = {"device": f"{device['name']} ({device['kind']} {device['capability']})"} if device else {}
    return {**made.get("versions", {}), **own}


def _together(attempts: Sequence[Environment]) -> dict[str, str]:
    """One environment for all attempts of a run; changes are joined by ``then``."""
    names = dict.fromkeys(name for attempt in attempts for name in attempt)
    return {name: " then ".join(dict.fromkeys(one.get(name, "none") for one in attempts)) for name in names}
