"""``teach``: run a teacher once over a range of a stream and write a cache of its most probable next tokens.

At any tensor- and pipeline-parallel size; data-parallel replicas share the shards. Every rank of the last stage takes
the best of its shard of the vocabulary, and the best of these are the token's, so that logits are never gathered. A
shard is computed by one replica, from one micro-batch after the other, and appears under its name when it is whole: so
the bytes do not depend on how many replicas there were, or on when an attempt was killed. Tensor-parallel sizes differ
by rounding of the logits, as in Megatron.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prune import claims, screen, storage, verbs
from megatron_prune.artifacts import PARTIAL, check_space, explain_full_disk, refuse_unwritable, sha256_file
from megatron_prune.checkpoint.layout import ModelShape, vocabulary
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.data import indexed
from megatron_prune.data.blend import parse_blend
from megatron_prune.data.streams import Stream, parse_range
from megatron_prune.engine import fp8, runtime
from megatron_prune.errors import DataError, UsageError
from megatron_prune.masks import find_masks, open_masks
from megatron_prune.training import teacher_cache
from megatron_prune.training.data import build_stream, described, refuse_unfit, train_blend
from megatron_prune.training.distillation_loss import Shard, TopKTargets, log_probabilities, part_length
from megatron_prune.training.teacher_cache import IDS, LOG_PROBABILITIES, REST, Taught

OUTPUT = "--output"
_LOW = (1 << 32) - 1  # more than any word
_NONE = -1 << 63  # less than any key


@dataclass(frozen=True)
class Lesson:
    """A complete cache; ``seconds``: of this attempt, 0 if the cache was complete before; ``tokens``: it computed."""

    taught: Taught
    folder: Path
    tokens: int
    seconds: float


def teach(own: verbs.TeachSettings, words: Sequence[str]) -> Lesson:
    """Write the cache ``own.output``, or what is missing of it; ``words`` are Megatron's flags. Every rank calls it."""
    storage.refuse_stored(OUTPUT, own.output, "its shards are mapped into memory")
    if screen.rank() == 0:
        refuse_unwritable(OUTPUT, own.output, kind="directory")
    args = runtime.start("teach", words, own, complete=_complete)
    folder = Path(own.output).absolute()
    with claims.writing(folder, "teaching", args.rank):
        return _teach(args, folder)


def _teach(args: argparse.Namespace, folder: Path) -> Lesson:
    taught = _asked(args)
    found = teacher_cache.read_manifest(folder, OUTPUT)
    if found is not None:
        _refuse_other_cache(folder, found[0], taught)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(OUTPUT, got=folder, expected="a free path, or the cache of an earlier attempt")
    missing = [shard for shard in range(taught.shards) if not teacher_cache.is_written(folder, taught, shard)]
    if found is not None and found[1] is not None and not missing:
        if args.rank == 0:
            _verify(folder, found[1])
            screen.say(f"{folder}: the cache is complete, and every shard has its hash; nothing to do")
        return Lesson(taught, folder, 0, 0.0)
    if args.rank == 0:
        for _, prefix in parse_blend(train_blend(args)):
            indexed.check_fits_model(prefix, taught.vocabulary)
        check_space(folder, sum(_samples(taught, missing)) * taught.seq_length * taught.bytes_per_token)
        again = f"; {taught.shards - len(missing)} exist already" if found else ""
        screen.say(f"teaching {taught}{again}")
    runtime.initialize(args)
    if args.rank == 0:  # after all have looked
        teacher_cache.write_manifest(folder, taught)
        for left_over in folder.glob(f".*{PARTIAL}*"):
            left_over.unlink()
    shared: list[Any] = [missing]  # a file system could show some ranks an older folder
    torch.distributed.broadcast_object_list(shared)
    seconds = _write(args, taught, folder, shared[0])
    _finish(args, taught, folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return Lesson(taught, folder, sum(_samples(taught, shared[0])) * taught.seq_length, seconds)


def _write(args: argparse.Namespace, taught: Taught, folder: Path, missing: Sequence[int]) -> float:
    """Compute and write the missing shards, shared among replicas. Returns the seconds that it took. Collective."""
    from megatron.core import parallel_state as mpu

    from megatron_prune.engine import forward
    from megatron_prune.training.zeros import check_loaded

    stream = build_stream(args, train_blend(args), epochs=args.stream_epochs)
    if not missing:
        return 0.0
    model = runtime.load_model(args)
    check_loaded(model, runtime.loaded_directory(args), allow_missing=args.allow_missing_masks)
    vocabulary_shard = Shard.of_megatron(taught.vocabulary)
    writes = mpu.get_tensor_model_parallel_rank() == 0
    began = time.monotonic()
    mine = missing[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]
    with screen.Bar(sum(_samples(taught, mine)), "teaching", "sample") as bar:
        for shard in mine:
            samples = bar.over(range(*taught.shard_range(shard)))
            found = forward.run_logits(
                model,
                _batches(stream, samples, args.micro_batch_size),
                lambda logits: top_k(logits, taught.k, vocabulary_shard),
            )
            if found is None or not writes:
                continue
            tensors = {
                IDS: torch.cat([one.ids for one in found]),
                LOG_PROBABILITIES: torch.cat([one.log_probabilities for one in found]),
                REST: torch.cat([one.log_rest for one in found]),
            }
            _refuse_not_finite(tensors, taught, shard)
            with explain_full_disk(folder, "the shards before it are complete, and the same command goes on"):
                teacher_cache.write_shard(folder, taught, shard, tensors)
    torch.distributed.barrier()
    return time.monotonic() - began


def _batches(stream: Stream, samples: Iterator[int], batch: int) -> Iterator[torch.Tensor]:
    """Tokens [b, S] of some samples."""
    from megatron_prune.engine import forward

    for numbers in itertools.batched(samples, batch):
        yield torch.stack([forward.checked(stream[number]["tokens"]) for number in numbers])


def _finish(args: argparse.Namespace, taught: Taught, folder: Path) -> None:
    """Hash the shards, a share per rank, and write the manifest. Collective."""
    ranks = torch.distributed.get_world_size()
    lost = [shard for shard in range(taught.shards) if not teacher_cache.is_written(folder, taught, shard)]
    if lost:
        raise DataError(
            f"{teacher_cache.shard_path(folder, lost[0])} is missing on this machine: put {OUTPUT} on a file system "
            "that all nodes share"
        )
    shares: list[Any] = [None] * ranks
    own = range(taught.shards)[args.rank :: ranks]
    torch.distributed.all_gather_object(
        shares, {shard: sha256_file(teacher_cache.shard_path(folder, shard)) for shard in own}
    )
    hashes = {shard: found for share in shares for shard, found in share.items()}
    if args.rank == 0:
        teacher_cache.write_manifest(folder, taught, [hashes[shard] for shard in range(taught.shards)])


def _samples(taught: Taught, shards: Sequence[int]) -> list[int]:
    return [end - start for start, end in map(taught.shard_range, shards)]


def _asked(args: argparse.Namespace) -> Taught:
    """The cache that the command line asks for."""
    samples = parse_range(args.stream_range)
    stream = described(train_blend(args), args.seq_length, args.stream_seed, args.stream_epochs)
    refuse_unfit(stream, samples, [])
    checkpoint = open_checkpoint(runtime.loaded_directory(args))
    masks = find_masks(checkpoint.root)
    words = vocabulary(vars(args))
    if args.top_k > words:
        raise UsageError("--top-k", got=args.top_k, expected=f"at most {words}, the teacher's vocabulary")
    shape = ModelShape.from_args(vars(args))
    return Taught(
        teacher={
            "path": str(checkpoint.directory),
            "fingerprint": checkpoint.fingerprint(),
            "masks": None if masks is None else open_masks(masks).hash,
            "params_dtype": str(args.params_dtype).removeprefix("torch."),
            "fp8": fp8.describe(args),
        },
        stream=stream,
        range=samples,
        vocabulary=words,
        tokenizers=teacher_cache.tokenizers_of([prefix for _, prefix in parse_blend(train_blend(args))]),
        k=args.top_k,
        dtype=args.dtype,
        shard_samples=args.shard_samples
        or teacher_cache.default_shard_samples(args.top_k, args.dtype, words, args.seq_length),
        flops=shape.forward_flops(args.seq_length) * (samples[1] - samples[0]),
    )


def _refuse_other_cache(folder: Path, held: Taught, asked: Taught) -> None:
    ours, theirs = asked.identity(), held.identity()
    for key in ours:
        if ours[key] != theirs[key]:
            raise UsageError(
                OUTPUT, got=f"{folder}, a cache of another {key.replace('_', ' ')}",
                expected="a free path, or a cache that these flags began", do="choose another folder, or remove it",
            )  # fmt: skip


def _verify(folder: Path, shards: Sequence[teacher_cache.ShardFile]) -> None:
    """DataError if a shard of a complete cache is not what was written."""
    for shard, entry in enumerate(shards):
        path = teacher_cache.shard_path(folder, shard)
        if (found := sha256_file(path)) != entry["sha256"]:
            raise DataError(
                f"{path} is damaged: expected SHA-256 {entry['sha256'][:12]}…, got {found[:12]}…; remove it and run "
                "the same command again"
            )


def _refuse_not_finite(tensors: dict[str, torch.Tensor], taught: Taught, shard: int) -> None:
    bad = (~torch.isfinite(tensors[LOG_PROBABILITIES])).flatten(1).any(1)  # [samples]
    if bool(bad.any()):
        sample = taught.shard_range(shard)[0] + int(bad.nonzero()[0])
        raise DataError(f"the teacher's probabilities on sample {sample} are not finite: expected weights that are")


# -- the best of a vocabulary -------------------------------------------------------------------------


@torch.no_grad()
def top_k(logits: torch.Tensor, k: int, shard: Shard) -> TopKTargets:
    """The k most probable words of each token, from logits [b, s, V / TP]; the same on every tensor-parallel rank.

    Sorted by log-probability, of equals the lowest id first. ``ids`` int64, the others float32. Collective over
    ``shard.group``.
    """
    rows = logits.flatten(0, 1)
    parts = [_top_k(part, k, shard) for part in torch.split(rows, part_length(rows))]
    ids, logs, rest = (torch.cat(each) for each in zip(*parts, strict=True))
    whole = logits.shape[:2]
    return TopKTargets(ids.view(*whole, k), logs.view(*whole, k), rest.view(whole))


def _top_k(logits: torch.Tensor, k: int, shard: Shard) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of rows [n, V / TP]: ids and log-probabilities [n, k], and the log of the rest [n]."""
    width = logits.shape[-1]
    logs = log_probabilities(logits, shard).float()  # [n, V / TP]; padding has -inf
    words = torch.arange(shard.first(width), shard.first(width) + width, device=logs.device)
    best = _best(logs, words, min(k, width))
    if shard.group is not None:
        gathered = [torch.empty_like(best) for _ in range(shard.group.size())]
        torch.distributed.all_gather(gathered, best, group=shard.group)
        best = torch.cat(gathered, dim=-1).topk(k, dim=-1).values
    ids, found = _of_keys(best)
    if k == shard.words:
        rest = logs.new_full(logs.shape[:1], -torch.inf)
    else:
        least, last = found[:, -1:], ids[:, -1:]
        others = logs.masked_fill((logs > least) | (logs == least) & (words <= last), -torch.inf)
        rest = shard.log_sum_exp(others.logsumexp(-1)).clamp(max=0)
    return ids, found.clamp(max=0), rest


def _best(values: torch.Tensor, words: torch.Tensor, k: int) -> torch.Tensor:
    """The keys of the k best of ``values`` [n, width], in falling order: [n, k]."""
    found = values.topk(k, dim=-1)
    least = found.values[:, -1:]
    keys = _keys(found.values, words[found.indices])
    # Of those equal to the least one, topk takes any: where there are more of them, the lowest words are found.
    rows = ((values >= least).sum(-1) > k).nonzero().squeeze(-1)
    if len(rows):
        place, column = (values[rows] == least[rows]).nonzero(as_tuple=True)  # row after row, in the order of words
        before = torch.bincount(place, minlength=len(rows)).cumsum(0).roll(1)
        before[0] = 0
        number = torch.arange(len(place), device=place.device) - before[place]  # of an equal one in its row
        lowest = keys.new_full((len(rows), k), _NONE)
        first = number < k
        lowest[place[first], number[first]] = _keys(least[rows].squeeze(-1)[place[first]], words[column[first]])
        above = torch.where(found.values[rows] > least[rows], keys[rows], _NONE)
        keys[rows] = torch.cat([above, lowest], dim=-1).topk(k, dim=-1).values
    return keys.sort(dim=-1, descending=True).values


def _keys(values: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """int64 in the order of float32 ``values``, and of equal ones in the order of falling ``words``. No two keys of
    different words are equal, so that their order is the same on every machine."""
    bits = (values + 0.0).view(torch.int32).long()  # 0.0 for -0.0
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return (ordered << 32) | (_LOW - words)


def _of_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and values of keys."""
    ordered = keys >> 32
    bits = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF)
    return _LOW - (keys & _LOW), bits.to(torch.int32).view(torch.float32)


# -- arguments ------------------------------------------------------------------------------------------


def _complete(args: argparse.Namespace, argv: list[str]) -> None:
    """Fill in what follows from the flags, and refuse what cannot work. Before Megatron validates."""
    if args.load is None:
        raise UsageError("--load", got="nothing", expected="the teacher's checkpoint")
    if not train_blend(args):
        raise UsageError("--train-data-path", got="nothing", expected="the corpora of the stream, as for pretrain")
    for flag, value in (
        ("--reset-position-ids", args.reset_position_ids), ("--reset-attention-mask", args.reset_attention_mask),
        ("--eod-mask-loss", args.eod_mask_loss),
    ):  # fmt: skip
        if value:
            raise UsageError(
                flag, got="it", expected="no such flag with this verb",
                why="a cache is of samples whose positions count from 0 and whose tokens attend to all before them",
            )  # fmt: skip
    for name in ("top_k", "shard_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}", got=value, expected="at least 1")
    if args.seq_length is None:
        raise UsageError("--seq-length", got="nothing", expected="tokens per sample, as for pretrain")
    fp8.refuse_delayed(args)
    if args.micro_batch_size is None or args.fp8:  # samples that share a scale would depend on each other
        args.micro_batch_size = 1
    args.global_batch_size = None
    args.train_iters = 1  # Megatron validates a schedule although nothing is trained
    args.lr = args.lr or 1.0
    args.save = None
    runtime.refuse_layouts(args)
