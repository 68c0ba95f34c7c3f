"""How much of its text a training run has really seen: unique tokens of a range of a stream.

Within one epoch every sample is another piece of text, so nothing repeats. Over several epochs the
documents are shuffled and cut differently each time; then every token of the corpora is looked up in every
epoch that the range touches: was the sample that holds it taken? That is exact, and takes about 20 ns a
token and epoch.
"""

from __future__ import annotations

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_prune.data.streams import SampleRange

BLOCK = 1 << 22  # tokens that are looked up at a time


def unique_tokens(samples: SampleRange) -> int:
    """Number of different positions of the corpora among the input tokens of a range."""
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
    return sum(_covered(list(member), stream.seq_length) for member in zip(*taken, strict=True))


def _marks(dataset: GPTDataset, numbers: np.ndarray) -> np.ndarray:
    """Boolean [samples + 1] in text order; the entry past the end is the remainder that no sample holds."""
    marks = np.zeros(len(dataset) + 1, dtype=bool)
    marks[np.asarray(dataset.shuffle_index[numbers], dtype=np.int64)] = True
    return marks


def _covered(epochs: list[tuple[GPTDataset, np.ndarray]], seq_length: int) -> int:
    """Tokens of one corpus that lie in a marked sample of at least one epoch."""
    lengths = np.asarray(epochs[0][0].dataset.sequence_lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    places = []  # where each document begins in an epoch's joined text
    for dataset, _ in epochs:
        order = np.asarray(dataset.document_index)
        begins = np.empty(len(lengths), dtype=np.int64)
        begins[order] = np.cumsum(lengths[order]) - lengths[order]
        places.append(begins - (ends - lengths))  # shift from a token's number in the corpus
    total = 0
    for block in range(0, int(ends[-1]), BLOCK):
        tokens = np.arange(block, min(block + BLOCK, int(ends[-1])))
        documents = np.searchsorted(ends, tokens, side="right")
        found = np.zeros(len(tokens), dtype=bool)
        for (_, marks), shift in zip(epochs, places, strict=True):
            found |= marks[np.minimum((tokens + shift[documents]) // seq_length, len(marks) - 1)]
        total += int(found.sum())
    return total
