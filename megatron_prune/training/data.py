"""The data sets of a training run: a range of a token stream, or Megatron's own without ``--stream-range``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from megatron_prune.checkpoint.layout import vocabulary
from megatron_prune.data import indexed
from megatron_prune.data.blend import after, intersecting, members, parse_blend, ranges, samples_per_epoch
from megatron_prune.data.schedule import ScheduledRange
from megatron_prune.data.streams import Stream, StreamRange, parse_range, refuse_overlap
from megatron_prune.engine.from_checkpoint import given
from megatron_prune.errors import UsageError
from megatron_prune.training import batch_flags
from megatron_prune.training.cached_targets import WithTargets
from megatron_prune.training.scheduled_batches import ScheduledBatches
from megatron_prune.training.teacher_cache import TeacherCache


def complete_arguments(args: argparse.Namespace, argv: list[str]) -> None:
    """Derive the number of steps from the range and refuse flags that would contradict it."""
    if args.stream_range is None:
        for flag in (
            "--stream-epochs", "--stream-permutation-seed", "--stream-seed", "--stream-allow-seen",
            batch_flags.EVERY, batch_flags.FOLLOWS,
        ):  # fmt: skip
            if given(argv, flag):
                raise UsageError(flag, got="none", expected="--stream-range START:END with it")
        return
    for name in ("dataloader_inter_document_masking", "dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap"):
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                flag, got="it", expected="no such flag with --stream-range", why="a stream builds its own indices"
            )
    start, end = parse_range(args.stream_range)
    if not train_blend(args):
        raise UsageError(
            "--stream-range", got=f"{args.stream_range} alone", expected="--train-data-path or --data-path with it"
        )
    if given(argv, "--split"):
        raise UsageError(
            "--split",
            got=args.split,
            expected="no such flag with --stream-range",
            why="a stream takes its corpora whole",
            do="give validation text with --valid-data-path",
        )
    if args.rampup_batch_size is not None or args.step_batch_size_schedule is not None:
        raise UsageError(
            "--rampup-batch-size",
            got=args.rampup_batch_size,
            expected="no such flag with --stream-range",
            why="all steps of a range have one global batch size",
        )
    if args.global_batch_size is None:
        raise UsageError("--global-batch-size", got="nothing", expected="a number with --stream-range")
    if args.train_samples is not None:
        raise UsageError(
            "--train-samples",
            got=args.train_samples,
            expected="no such flag with --stream-range",
            why="the range says how many samples",
        )
    if (end - start) % args.global_batch_size:
        raise UsageError(
            "--stream-range",
            got=args.stream_range,
            expected=f"a multiple of --global-batch-size {args.global_batch_size} samples",
            why=f"{end - start} samples leave a rest of {(end - start) % args.global_batch_size}",
        )
    steps = (end - start) // args.global_batch_size
    if args.train_iters not in (None, steps):
        raise UsageError(
            "--train-iters",
            got=args.train_iters,
            expected=f"no such flag, or {steps}",
            why=f"--stream-range {args.stream_range} is {steps} batches of {args.global_batch_size}",
        )
    args.train_iters = steps
    if args.valid_data_path is None:
        if given(argv, "--eval-iters") and args.eval_iters:
            raise UsageError("--eval-iters", got=args.eval_iters, expected="--valid-data-path with it, or 0")
        args.eval_iters = 0
    prefixes = [prefix for _, prefix in parse_blend(train_blend(args))]
    batch_flags.complete_arguments(args, prefixes, functools.partial(given, argv))


def refuse_unfit_range(args: argparse.Namespace, seen: list[dict[str, Any]]) -> list[int] | None:
    """Refuse a range beyond the stream's end, or one whose samples the start was already trained on.

    Runs before anything starts and needs only the corpora's sizes and ids, which must be in the model's vocabulary.
    ``seen`` are the trainings in the lineage of the starting checkpoint. A run under a schedule of batches begins after
    what they read: the first sample of every corpus is returned. Raises UsageError and DataError.
    """
    if args.stream_range is None:
        return None
    for _, prefix in parse_blend(train_blend(args)):
        indexed.check_fits_model(prefix, vocabulary(vars(args)))  # a dry run has no tokenizer yet
    stream = described(train_blend(args), args.seq_length, args.stream_seed, args.stream_epochs)
    seen = [] if args.stream_allow_seen else seen
    if batch_flags.asked(args):
        for earlier in seen:
            if earlier["stream"] is not None and earlier["stream"]["id"] != stream["id"]:
                refuse_unfit(stream, parse_range(args.stream_range), [earlier])
        return batch_flags.begins(args, train_blend(args), seen)
    refuse_unfit(stream, parse_range(args.stream_range), seen)
    return None


def refuse_unfit_cache(args: argparse.Namespace, cache: TeacherCache, teacher: str | None = None) -> None:
    """UsageError unless a teacher's cache is of the samples that the run trains on, in the student's vocabulary; and of
    the ``teacher`` with this fingerprint, if it is given. Runs before anything starts."""
    stream = described(train_blend(args), args.seq_length, args.stream_seed, args.stream_epochs)
    prefixes = [prefix for _, prefix in parse_blend(train_blend(args))]
    cache.refuse_other_use(stream, parse_range(args.stream_range), vocabulary(vars(args)), prefixes, teacher)


DEFAULT_SPLIT = "969, 30, 1"  # from Megatron's validate_args


def refuse_empty_parts(args: argparse.Namespace) -> None:
    """UsageError if ``--split`` leaves a part of a corpus without tokens: Megatron would count its epochs forever.

    Runs before anything starts. Cuts like Megatron, by the documents of each corpus.
    """
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, _ = get_blend_and_blend_per_split(args)
    if args.stream_range is not None or args.mock_data or blend is None:
        return
    split = args.split or DEFAULT_SPLIT
    parts = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for prefix in blend[0]:
        if "://" in prefix:
            continue  # in an object store, which only Megatron reads
        corpus = indexed.open_indexed(prefix)
        lengths = corpus.sequence_lengths  # a view of the file, valid while ``corpus`` exists
        for name, part in zip(("training", "validation", "test"), parts, strict=True):
            if part is None:
                continue
            first, end = (round(bound * len(lengths)) for bound in part)
            if not lengths[first:end].any():
                raise UsageError(
                    "--split", expected="parts that each hold a document",
                    got=split if args.split else f"{split} (the default)",
                    why=f"the {name} part of {prefix} is empty, of {len(lengths)} documents",
                    do="give that part the share 0 to leave it out",
                )  # fmt: skip


def described(blend: list[str], seq_length: int, seed: int, epochs: int) -> dict[str, Any]:
    """An account's entry for a stream, with its number of samples, from the corpora's sizes: builds no index."""
    corpora = members(parse_blend(blend))
    found = Stream(corpora, seq_length, seed, epochs).describe()
    return found | {"samples": samples_per_epoch(corpora, seq_length) * epochs}


def refuse_unfit(
    stream: Mapping[str, Any], samples: tuple[int, int], seen: Sequence[Mapping[str, Any]], name: str = "this run"
) -> None:
    """UsageError for samples [start, end) beyond the stream's end; DataError if the start of the run ``name`` was
    already trained on them (in ``seen``). ``study plan`` calls it for every cell, ``pretrain`` for its run."""
    start, end = samples
    if end > stream["samples"]:
        raise UsageError(
            "--stream-range",
            got=f"{start}:{end}" + f" for {name}" * (name != "this run"),
            expected=f"an end of at most {stream['samples']}",
            why=f"the stream has {stream['samples'] // stream['epochs']} samples of {stream['seq_length']} tokens in "
            f"each of {stream['epochs']} epoch(s) and does not wrap",
            do="give more text, or declare more epochs with --stream-epochs",
        )
    for earlier in seen:
        if earlier["stream"] is None:
            continue
        if earlier.get("batching") and earlier["stream"]["id"] == stream["id"]:
            _refuse_read_dynamically(stream, samples, earlier, name)
        else:
            own = {"stream": stream, "range": [start, end]}
            refuse_overlap(earlier, own, (f"the run {earlier['run']}, which {name} starts from,", name))


def _refuse_read_dynamically(
    stream: Mapping[str, Any], samples: tuple[int, int], earlier: Mapping[str, Any], name: str
) -> None:
    """UsageError if a run under a schedule of batches has read some of the samples; says from where on it has not."""
    corpora = members([(weight, prefix) for weight, prefix in stream["blend"]])
    if intersecting(earlier["domains"], ranges(corpora, stream["seq_length"], *samples)):
        free = after(corpora, stream["seq_length"], [last for _, last in earlier["domains"]])
        raise UsageError(
            "--stream-range", got=f"{samples[0]}:{samples[1]}", expected=f"samples from {free} on",
            why=f"{name} starts from {earlier['run']}, which loaded its batches dynamically and read some of these",
        )  # fmt: skip


def train_blend(args: argparse.Namespace) -> list[str]:
    """The corpora of the stream, from Megatron's flags for training text. Empty if neither is given."""
    return args.train_data_path or args.data_path or []


def unique_tokens(args: argparse.Namespace) -> int:
    """The number of distinct tokens that the run trains on. Call on all ranks, before any process group exists.

    Tokens of Megatron's own data sets all count. Over several epochs one rank per file system builds the stream's
    caches and counts, unless ``build-index`` has done so; the others wait without a collective, which would time out.
    """
    if args.stream_range is None:
        return int(args.train_iters * args.global_batch_size * args.seq_length)
    from megatron_prune.data import coverage

    start, end = parse_range(args.stream_range)
    corpora = members(parse_blend(train_blend(args)))
    size = samples_per_epoch(corpora, args.seq_length)
    if start // size == (end - 1) // size:
        return int((end - start) * args.seq_length)
    stream, cache = Stream(corpora, args.seq_length, args.stream_seed, args.stream_epochs), args.data_cache_path
    known = coverage.cached(stream, start, end, cache)
    if known is not None:
        return known
    shared = coverage.is_shared(stream, cache)
    if args.rank == 0 if shared else args.rank == args.world_size - 1:  # the last rank keeps the account
        with coverage.alive(stream, cache) if shared else nullcontext():
            built = Stream.build(train_blend(args), args.seq_length, args.stream_seed, args.stream_epochs, cache)
            return coverage.count(built, start, end, cache)
    if not shared:
        return 0  # this rank keeps no account
    return coverage.wait(stream, start, end, cache, 60 * args.distributed_timeout_minutes)


def build_stream(args: argparse.Namespace, blend: list[str], *, epochs: int) -> Stream:
    """A stream with the run's sequence length and masking flags; collective if there is a process group."""
    from megatron.training import get_tokenizer

    for _, prefix in parse_blend(blend):
        indexed.limit(prefix, vocabulary(vars(args)))
    resets = args.reset_position_ids or args.reset_attention_mask or args.eod_mask_loss
    return Stream.build(
        blend,
        args.seq_length,
        args.stream_seed,
        epochs,
        args.data_cache_path,
        eod=get_tokenizer().eod if resets else None,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )


class Provider:
    """Gives Megatron's loop its training and validation data; keeps the stream for the account.

    With a teacher's ``cache``, training samples have its targets where the loss is computed.
    """

    is_distributed = True  # Megatron calls it on every rank

    def __init__(
        self, args: argparse.Namespace, batches: ScheduledBatches | None = None, cache: TeacherCache | None = None
    ):
        self.args, self.batches, self.cache = args, batches, cache
        self.train: StreamRange | ScheduledRange | None = None
        self._valid: StreamRange | None = None

    def __call__(self, num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        from megatron_prune.engine.forward import is_last_stage, needs_data

        if self.args.stream_range is None:
            datasets: tuple[Any, Any, Any] = _megatron_datasets(self.args, num_samples, vp_stage)
            return datasets
        if self.train is None:  # once, although every virtual stage calls it
            self._build(num_samples[1])
        if not needs_data(vp_stage):
            return None, None, None
        reads_cache = self.cache is not None and is_last_stage(vp_stage)
        return WithTargets(self.train, self.cache) if reads_cache else self.train, self._valid, None

    def domains(self) -> list[list[int]] | None:
        """By corpus, its samples that the run reads, so far under a schedule; None for one corpus or several epochs."""
        if self.batches is not None and self.batches.schedule is not None:
            return self.batches.schedule.domains
        train = self.train
        return train.stream.ranges(train.start, train.end) if isinstance(train, StreamRange) else None

    def _build(self, validation_samples: int | None) -> None:
        args = self.args
        start, end = parse_range(args.stream_range)
        stream = build_stream(args, train_blend(args), epochs=args.stream_epochs)
        if self.batches is not None:
            self.train = self.batches.begin(stream, functools.partial(build_stream, args, epochs=1))
        else:
            self.train = StreamRange(stream, start, end, args.stream_permutation_seed, args.global_batch_size)
        if args.valid_data_path and args.eval_iters:
            # For monitoring only (results come from `evaluate`), so it may repeat.
            one = build_stream(args, args.valid_data_path, epochs=1)
            wanted = validation_samples or len(one)
            epochs = -(-wanted // len(one))
            valid = one if epochs == 1 else build_stream(args, args.valid_data_path, epochs=epochs)
            self._valid = StreamRange(valid, 0, min(wanted, len(valid)))


def _megatron_datasets(args: argparse.Namespace, num_samples: list[int], vp_stage: int | None) -> Any:
    """Megatron's builder, as its own pretraining script uses it: no stream, no account of samples."""
    from functools import partial

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    from megatron_prune.engine.forward import needs_data

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
    )

    class Vetted(GPTDataset):  # type: ignore[misc]
        """Refuses token ids outside the vocabulary, in everything that is read."""

        @staticmethod
        def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
            indexed.limit(dataset_path, vocabulary(vars(args)))
            return indexed.vetted(GPTDataset.build_low_level_dataset(dataset_path, config), dataset_path)

    Vetted.__name__ = GPTDataset.__name__  # which is part of the names of Megatron's caches
    kind = MockGPTDataset if args.mock_data else Vetted
    return BlendedMegatronDatasetBuilder(kind, num_samples, partial(needs_data, vp_stage), config).build()
