"""How much of its text a training run has really seen: unique tokens of a range of a stream.

Within one epoch every sample is another piece of text, so nothing repeats. Over several epochs the
documents are shuffled and cut differently each time; then the corpora are cut wherever a document or a sample of
any epoch begins, and each piece is looked up in every epoch that the range touches: was the sample that holds it
taken? That is exact, and its time follows from documents and samples, not from tokens.

The number is kept beside the stream's index caches, under the stream's id and the range (``cached``). It is never
counted while a process group exists, where every other rank would wait for it in a collective.
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

# What is looked up at a time: documents, and tokens.
DOCUMENTS = 1 << 20
TOKENS = 1 << 30
BEAT = 5.0  # seconds between signs of life of who counts

Report = Callable[[float], None]  # takes the share of a corpus that is done


def unique_tokens(samples: StreamRange, report: Report = lambda share: None) -> int:
    """Number of different positions of the corpora among the input tokens of a range."""
    if torch.distributed.is_initialized():
        raise RuntimeError("unique tokens are counted before a process group exists: others would time out meanwhile")
    stream, start, end = samples.stream, samples.start, samples.end
    size = stream.samples_per_epoch
    first, last = start // size, (end - 1) // size
    if first == last:
        return (end - start) * stream.seq_length
    # [epoch][member] -> which of the member's samples (in text order, before the shuffle) were taken
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
    """Boolean [samples + 1] in text order; the entry past the end is the remainder that no sample holds."""
    marks = np.zeros(len(dataset) + 1, dtype=bool)
    marks[np.asarray(dataset.shuffle_index[numbers], dtype=np.int64)] = True
    return marks


def _covered(epochs: list[tuple[GPTDataset, np.ndarray]], seq_length: int, report: Report) -> int:
    """Tokens of one corpus that lie in a marked sample of at least one epoch."""
    lengths = np.asarray(epochs[0][0].dataset.sequence_lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    shifts = []  # from a token's number in the corpus to its place in an epoch's joined text, by document
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
        begins = np.unique(np.concatenate(cuts))  # of pieces: no epoch has a cut inside one
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
    """Numbers in the corpus of the tokens of ``documents`` that begin a sample of one epoch."""
    low = ends[documents] - lengths[documents] + shift[documents]
    first = -(-low // seq_length)
    counts = np.maximum((low + lengths[documents] - 1) // seq_length - first + 1, 0)
    each = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    begins: np.ndarray = (np.repeat(first, counts) + each) * seq_length - np.repeat(shift[documents], counts)
    return begins


def path(stream: Stream, start: int, end: int, cache_path: str | Path | None) -> Path:
    """Where the number of this range of this stream is kept."""
    return stream.cache(cache_path) / f"unique-{start}-{end}.json"


def cached(stream: Stream, start: int, end: int, cache_path: str | Path | None) -> int | None:
    """The number that was counted for this range of this very stream, or None."""
    try:
        held = artifacts.read_json(path(stream, start, end, cache_path))
        if held["stream"] == stream.id and held["range"] == [start, end]:
            return int(held["unique_tokens"])
    except Exception:  # whatever is wrong with it, it is counted again
        return None
    return None


def count(stream: Stream, start: int, end: int, cache_path: str | Path | None) -> int:
    """``cached``, counted first where it is not; ``stream`` is built. Says how far it is where it takes long.

    Who waits for it sees a sign of life (``wait``). A cache that cannot be written is not an error.
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
    """Whether a number that is counted here can be kept for others: caches may be another user's."""
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
    """While it is open, ``wait`` on other machines sees that somebody is at work."""
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
    """What ``count`` gives in another process: as long as that takes. No process group is needed.

    DataError after ``patience`` seconds without a sign of life: this machine does not see the cache.
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
