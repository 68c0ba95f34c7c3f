"""Flags of dynamic batch loading: what they say, and what is refused before anything starts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_prune import artifacts
from megatron_prune.checkpoint.layout import vocabulary
from megatron_prune.data import blend, contamination, indexed
from megatron_prune.data.schedule import Schedule, followed
from megatron_prune.data.streams import parse_range
from megatron_prune.errors import DataError, UsageError

EVERY, VALIDATION, REFERENCES, SAMPLES, FOLLOWS = (
    "--dynamic-batch-every", "--domain-validation", "--reference-losses", "--domain-samples", "--batch-schedule",
)  # fmt: skip
DEFAULT_SAMPLES = 500  # of 4,096 tokens: the paper's two million of each domain


def asked(args: argparse.Namespace) -> bool:
    """Whether a schedule decides the batches of this run."""
    return args.dynamic_batch_every is not None or args.batch_schedule is not None


def complete_arguments(args: argparse.Namespace, prefixes: Sequence[str], given: Callable[[str], bool]) -> None:
    """Read the reference losses, and refuse (UsageError) what cannot work; ``prefixes``: the corpora of the stream."""
    if not asked(args):
        for flag in (VALIDATION, REFERENCES, SAMPLES):
            if given(flag):
                raise UsageError(flag, got="it alone", expected=f"{EVERY} STEPS with it")
        return
    for unfit, flag, got, expected, why in (
        (
            args.dynamic_batch_every is not None and args.batch_schedule is not None,
            f"{EVERY}, {FOLLOWS}", "both", "one of them", "a run that follows a schedule makes none",
        ),
        (
            len(prefixes) < 2, "--data-path", f"{len(prefixes)} corpus", "at least two",
            "proportions of one corpus never change",
        ),
        (
            args.stream_epochs > 1, "--stream-epochs", args.stream_epochs, "1",
            "under a schedule every sample of a corpus is read once",
        ),
        (
            given("--num-workers") and args.num_workers > 0, "--num-workers", args.num_workers, "0, or no such flag",
            "workers read ahead, before proportions are known",
        ),
        (args.dataloader_type not in (None, "single"), "--dataloader-type", args.dataloader_type, "single", ""),
        (
            bool(args.iterations_to_skip), "--iterations-to-skip", args.iterations_to_skip, "no such flag",
            "nothing is measured before a step that is skipped",
        ),
        (args.save is None, "--save", "nothing", "a directory", "the proportions are recorded there"),
    ):  # fmt: skip
        if unfit:
            raise UsageError(flag, got=got, expected=f"{expected} with a schedule of batches", why=why)
    args.num_workers = 0
    if args.batch_schedule is not None:
        for flag in (VALIDATION, REFERENCES, SAMPLES):
            if given(flag):
                raise UsageError(flag, got=f"it with {FOLLOWS}", expected=f"{EVERY} with it")
        return
    if args.dynamic_batch_every >= args.train_iters:
        raise UsageError(
            EVERY, got=args.dynamic_batch_every, expected=f"fewer than the {args.train_iters} steps of the run",
            why="proportions would never change",
        )  # fmt: skip
    if len(args.domain_validation) != len(prefixes):
        raise UsageError(
            VALIDATION, got=" ".join(args.domain_validation) or "nothing",
            expected=f"{len(prefixes)} corpora of text that is not trained on, one for each of {' '.join(prefixes)}",
        )  # fmt: skip
    args.reference_losses = references(args.reference_losses, args.domain_validation)
    if args.domain_samples is None:
        args.domain_samples = DEFAULT_SAMPLES


def references(words: Sequence[Any], validation: Sequence[str]) -> list[float]:
    """The reference losses by corpus: numbers, or one JSON file, by prefix or as ``evaluate`` wrote it.

    UsageError for a corpus without one, or a loss that is not a number.
    """
    found: list[Any] = list(words)
    where = ""
    if len(words) == 1 and _number(words[0]) is None:
        where = f" in {words[0]}"
        found = [_of_file(str(words[0]), prefix) for prefix in validation]
    if len(found) != len(validation):
        raise UsageError(
            REFERENCES, got=f"{len(found)} number(s)",
            expected=f"{len(validation)}, one for each of {' '.join(validation)}, or a FILE with them",
        )  # fmt: skip
    numbers = [_number(value) for value in found]
    for value, number, prefix in zip(found, numbers, validation, strict=True):
        if number is None or not math.isfinite(number) or number < 0:
            raise UsageError(
                REFERENCES, got="nothing" if value is None else value,
                expected=f"a finite loss per token, in nats, for {prefix}{where}",
            )  # fmt: skip
    return [number for number in numbers if number is not None]


def _of_file(path: str, prefix: str) -> Any:
    """The entry of a corpus in ``{"PREFIX": loss}``, or in scores.json by the text that was scored."""
    held = artifacts.read_json(path)
    if not isinstance(held, dict):
        return None
    if isinstance(held.get("corpora"), dict):
        print_ = indexed.fingerprint(prefix)
        return next((one.get("loss") for one in held["corpora"].values() if one.get("fingerprint") == print_), None)
    return held.get(prefix)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def identity(args: argparse.Namespace) -> dict[str, Any] | None:
    """What the flags say about the schedule: a run resumes with the same."""
    if args.batch_schedule is not None:
        return {"follows": Schedule.read(args.batch_schedule).hash}
    if args.dynamic_batch_every is None:
        return None
    return {
        "every": args.dynamic_batch_every,
        "references": list(args.reference_losses),
        "validation": [indexed.fingerprint(prefix) for prefix in args.domain_validation],
        "samples": args.domain_samples,
    }


def _refuse_unfit_schedule(args: argparse.Namespace, corpora: list[str], schedule: Schedule) -> None:
    """UsageError for a schedule that is not whole, or that this run cannot follow."""
    start, _ = parse_range(args.stream_range)
    stream = schedule.stream
    if schedule.next_step is not None:
        raise UsageError(
            FOLLOWS, got=f"{args.batch_schedule}, known up to step {schedule.next_step} of {schedule.steps}",
            expected="the schedule of a run that has finished",
        )  # fmt: skip
    for what, ours, theirs in (
        ("corpora", corpora, stream["corpora"]),
        ("--seq-length", args.seq_length, stream["seq_length"]),
        ("--stream-seed", args.stream_seed, stream["seed"]),
        ("a first sample of", start, schedule.start),
        ("--global-batch-size", args.global_batch_size, schedule.global_batch_size),
        ("--stream-permutation-seed", args.stream_permutation_seed, schedule.permutation_seed),
    ):
        if ours != theirs:
            raise UsageError(
                FOLLOWS, got=f"{args.batch_schedule}, of a run with {what} {_short(theirs)}",
                expected=f"one with {what} {_short(ours)}", why="its samples are to be this run's",
            )  # fmt: skip
    if args.train_iters < schedule.steps:
        raise UsageError(
            FOLLOWS, got=f"{args.batch_schedule} of {schedule.steps} steps for a run of {args.train_iters}",
            expected="a schedule of at most as many steps", why="its blocks are read whole",
        )  # fmt: skip


def _short(value: Any) -> str:
    return ", ".join(one[:12] for one in value) if isinstance(value, list) else str(value)


def begins(args: argparse.Namespace, blended: list[str], seen: Sequence[Mapping[str, Any]]) -> list[int]:
    """The first sample of every corpus: after those before the range, and after all that the start has ``seen``.

    Rank 0, before anything starts. Raises UsageError and DataError for text that does not suffice, a schedule that
    cannot be followed or whose samples the start has seen, and validation text that is trained on.
    """
    corpora = blend.members(blend.parse_blend(blended))
    behind = [
        (stage, stage.get("domains") or blend.ranges(corpora, args.seq_length, *stage["range"]))
        for stage in seen
        if stage["stream"] is not None and set(stage["stream"]["corpora"]) & {one.fingerprint for one in corpora}
    ]
    if args.batch_schedule is not None:
        schedule = Schedule.read(args.batch_schedule)
        _refuse_unfit_schedule(args, [one.fingerprint for one in corpora], schedule)
        domains = followed(schedule, args.train_iters).domains
        for stage, ranges in behind:
            if shared := blend.intersecting(ranges, domains):
                corpus, first, last = shared
                raise DataError(
                    f"the run {stage['run']}, which this run starts from, has read samples {first}:{last} of "
                    f"{corpora[corpus].prefix}, which {args.batch_schedule} would read again: follow another schedule"
                )
        return list(schedule.begins)
    _check_validation(args, [one.prefix for one in corpora])
    start, end = parse_range(args.stream_range)
    found = [until for _, until in blend.ranges(corpora, args.seq_length, 0, start)]
    for _, ranges in behind:
        found = [max(first, last) for first, (_, last) in zip(found, ranges, strict=True)]
    lengths = [(indexed.tokens(indexed.open_indexed(one.prefix)) - 1) // args.seq_length for one in corpora]
    left = sum(max(most - first, 0) for most, first in zip(lengths, found, strict=True))
    if left < end - start:
        raise UsageError(
            "--stream-range", got=args.stream_range, expected=f"at most {left} samples",
            why=f"that many are left of the corpora after sample {start} and what the start has seen",
            do="give more text",
        )  # fmt: skip
    return found


def _check_validation(args: argparse.Namespace, trained: Sequence[str]) -> None:
    """Validation text must suffice, be in the model's vocabulary, and have no document of the training text."""
    for prefix in args.domain_validation:
        indexed.check_fits_model(prefix, vocabulary(vars(args)))
        available = (indexed.tokens(indexed.open_indexed(prefix)) - 1) // args.seq_length
        if available < args.domain_samples:
            raise UsageError(
                SAMPLES, got=args.domain_samples, expected=f"at most {available}",
                why=f"{prefix} holds so many samples of {args.seq_length} tokens",
            )  # fmt: skip
    contamination.refuse_shared_documents(trained, args.domain_validation)
