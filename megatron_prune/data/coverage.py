"""Unique tokens in a range of a stream: how much different text a training run has seen.

Within one epoch nothing repeats. Over several epochs the documents are shuffled and cut differently each time. The
corpora are then split wherever a document or a sample of any epoch begins, and each piece counts if the sample that
holds it was taken in any epoch of the range. This is exact, and its time depends on documents and samples, not tokens.

The number is cached next to the stream's index caches, by stream id and range (``cached``). It must not be computed
while a process group exists, because all other ranks would wait in a collective.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_prune import artifacts, screen
from megatron_prune.data.streams import Stream, StreamRange
from megatron_prune.errors import DataError

# Documents and tokens processed at a time.
DOCUMENTS = 1 << 20
TOKENS = 1 << 30
BEAT = 5.0  # seconds between heartbeats of the counting process

Report = Callable[[float], None]  # called with the fraction of a corpus that is done


def unique_tokens(samples: StreamRange, report: Report = lambda share: None) -> int:
    """Number of unique corpus positions among the input tokens of a range."""
    if torch.distributed.is_initialized():
        raise RuntimeError("unique tokens are counted before a process group exists: others would time out meanwhile")
    stream, start, end = samples.stream, samples.start, samples.end
    size = stream.samples_per_epoch
    first, last = start // size, (end - 1) // size
    if first == last:
        return (end - start) * stream.seq_length
    # [epoch][member] -> which samples of the member (in text order, before the shuffle) were taken
    taken: list[list[tuple[GPTDataset, np.ndarray]]] = []
    for epoch in range(first, last + 1):
        low, high = max(start - epoch * size, 0), min(end - epoch * size, size)
        part = stream.parts[epoch]
        if isinstance(part, BlendedDataset):
            chosen = part.dataset_index[low:high], part.dataset_sample_index[low:high]
            taken.append([(d, _marks(d, chosen[1][chosen[0] == i])) for i, d in enumerate(part.datasets)])
        else:
            taken.append([(part, _marks(part, np.arange(low, high)))])
    members = list(zip(*taken, strict=True))
    total = 0
    for member in members:
        total += _covered(list(member), stream.seq_length, report)
    return total


def _marks(dataset: GPTDataset, numbers: np.ndarray) -> np.ndarray:
    """bool [samples + 1] in text order; the last entry is for the remainder that is in no sample."""
    marks = np.zeros(len(dataset) + 1, dtype=bool)
    marks[np.asarray(dataset.shuffle_index[numbers], dtype=np.int64)] = True
    return marks


def _covered(epochs: list[tuple[GPTDataset, np.ndarray]], seq_length: int, report: Report) -> int:
    """Number of tokens of one corpus that are in a marked sample of at least one epoch."""
    lengths = np.asarray(epochs[0][0].dataset.sequence_lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    shifts = []  # per document: a token's position in the epoch's text minus its position in the corpus
    for dataset, _ in epochs:
        order = np.asarray(dataset.document_index)
        begins = np.empty(len(lengths), dtype=np.int64)
        begins[order] = np.cumsum(lengths[order]) - lengths[order]
        shifts.append(begins - (ends - lengths))
    total, document = 0, 0
    while document < len(lengths):
        enough = int(np.searchsorted(ends, ends[document] + TOKENS))
        stop = min(max(enough, document + 1), document + DOCUMENTS, len(lengths))
        first, last = int(ends[document] - lengths[document]), int(ends[stop - 1])
        cuts = [ends[document:stop] - lengths[document:stop]]
        cuts += [_sample_begins(ends, lengths, shift, slice(document, stop), seq_length) for shift in shifts]
        begins = np.unique(np.concatenate(cuts))  # of pieces, which no epoch splits further
        begins = begins[(begins >= first) & (begins < last)]
        sizes = np.diff(begins, append=last)
        holders = np.searchsorted(ends, begins, side="right")
        found = np.zeros(len(begins), dtype=bool)
        for (_, marks), shift in zip(epochs, shifts, strict=True):
            found |= marks[np.minimum((begins + shift[holders]) // seq_length, len(marks) - 1)]
        total += int(sizes[found].sum())
        document = stop
        report(document / len(lengths))
    return total


def _sample_begins(
    ends: np.ndarray, lengths: np.ndarray, shift: np.ndarray, documents: slice, seq_length: int
) -> np.ndarray:
    """Corpus positions of the tokens of ``documents`` that begin a sample of one epoch."""
    low = ends[documents] - lengths[documents] + shift[documents]
    first = -(-low // seq_length)
    counts = np.maximum((low + lengths[documents] - 1) // seq_length - first + 1, 0)
    each = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    begins: np.ndarray = (np.repeat(first, counts) + each) * seq_length - np.repeat(shift[documents], counts)
    return begins


def path(stream: Stream, start: int, end: int, cache_path: str | Path | None) -> Path:
    """The cache file for this range of this stream."""
    return stream.cache(cache_path) / f"unique-{start}-{end}.json"


def cached(stream: Stream, start: int, end: int, cache_path: str | Path | None) -> int | None:
    """The cached number for this range of this stream, or None."""
    try:
        held = artifacts.read_json(path(stream, start, end, cache_path))
        if held["stream"] == stream.id and held["range"] == [start, end]:
            return int(held["unique_tokens"])
    except Exception:  # a damaged cache is computed again
        return None
    return None


def count(stream: Stream, start: int, end: int, cache_path: str | Path | None) -> int:
    """The number of unique tokens, from the cache or computed with a progress bar; ``stream`` must be built.

    A cache that cannot be written is not an error.
    """
    known = cached(stream, start, end, cache_path)
    if known is not None:
        return known
    with screen.Bar(100, f"counting unique tokens of samples {start}:{end}", "percent", shown=True) as bar:
        number = unique_tokens(StreamRange(stream, start, end), lambda share: bar.reach(round(100 * share)))
    described: dict[str, Any] = {"stream": stream.id, "range": [start, end], "unique_tokens": number}
    try:
        artifacts.write_json(path(stream, start, end, cache_path), described)
    except OSError as error:
        screen.say(f"unique tokens of samples {start}:{end} are not kept: {error}", everywhere=True)
    return number


def is_shared(stream: Stream, cache_path: str | Path | None) -> bool:
    """Whether this process can write the cache, which may belong to another user."""
    cache = stream.cache(cache_path)
    return os.access(next(folder for folder in (cache, *cache.parents) if folder.is_dir()), os.W_OK)


def _last_sign(sign: Path) -> int:
    try:
        return sign.stat().st_mtime_ns
    except OSError:
        return -1


def _sign(stream: Stream, cache_path: str | Path | None) -> Path:
    cache = stream.cache(cache_path)
    return cache.parent / f".{cache.name}.counting"


@contextmanager
def alive(stream: Stream, cache_path: str | Path | None) -> Iterator[None]:
    """Write a heartbeat file during the block, so that ``wait`` on other machines sees that counting continues."""
    sign, over = _sign(stream, cache_path), threading.Event()
    sign.parent.mkdir(parents=True, exist_ok=True)

    def beat() -> None:
        while True:
            sign.touch()
            if over.wait(BEAT):
                return

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        sign.unlink(missing_ok=True)


def wait(stream: Stream, start: int, end: int, cache_path: str | Path | None, patience: float) -> int:
    """Wait for the result of ``count`` in another process. Needs no process group.

    Raises DataError after ``patience`` seconds without a heartbeat: this machine does not see the cache.
    """
    sign, seen, since = _sign(stream, cache_path), -1, monotonic()
    while (number := cached(stream, start, end, cache_path)) is None:
        now = _last_sign(sign)
        if now != seen:
            seen, since = now, monotonic()
        elif monotonic() - since > patience:
            raise DataError(
                f"rank 0 counts unique tokens of samples {start}:{end}, but this machine ({os.uname().nodename}) sees "
                f"nothing of it in {sign.parent}: put --data-cache-path on a file system that all nodes share"
            )
        sleep(min(1.0, BEAT / 5))
    return number
