"""Token streams and sample ranges: sample *i* has the same tokens in every run (docs/pages/concepts.md).

A stream is a corpus, or a blend of corpora at fixed weights, with a seed and a sequence length.
It uses Megatron's datasets: each prefix is a ``GPTDataset`` of exactly one epoch, whose order does not
depend on the number of samples requested; ``BlendedDataset`` interleaves them. This module adds:

* the identity of a stream (``Stream.id``), which depends on content, not on paths;
* index caches that are atomic and never stale, because they are stored under the stream's id;
* an end: a stream stops before a member of its blend is exhausted, and does not wrap around;
* epochs: E epochs are E one-epoch streams with derived seeds, one after another;
* ``StreamRange``: the samples [start, end) of a stream that a training run consumes.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_prune import artifacts
from megatron_prune.data import indexed
from megatron_prune.data.blend import Corpus, blend_length, members, parse_blend, shares
from megatron_prune.errors import DataError, UsageError

SEEDS = 2**32  # number of seeds of numpy.random.RandomState, with which Megatron shuffles
TEACHER_PREFIX = "teacher_"  # of the names of what a teacher adds to a sample
ABANDONED = 24 * 3600  # seconds after which an unfinished cache is no longer in use by another process


class _Tokens:
    """The minimal tokenizer interface of GPTDataset. Nothing is padded: a stream has no partial samples."""

    vocab_size = None
    pad = -1
    unique_identifiers: OrderedDict[str, Any] = OrderedDict()

    def __init__(self, eod: int | None):
        self.eod = eod


class Stream:
    """A finite sequence of samples, made by ``Stream.build``.

    ``stream[i]`` is GPTDataset's dict: ``tokens``, ``labels``, ``position_ids`` (int64 [S]), ``loss_mask``
    (float32 [S]), and for a blend ``dataset_id``.
    """

    def __init__(self, corpora: Sequence[Corpus], seq_length: int, seed: int, epochs: int):
        self.corpora, self.seq_length, self.seed, self.epochs = tuple(corpora), seq_length, seed, epochs
        self._weights = shares(corpora)
        self.id = artifacts.sha256_json(
            {
                "stream": 1,
                "corpora": [c.fingerprint for c in corpora],
                "weights": self._weights,
                "seq_length": seq_length,
                "seed": seed,
                "epochs": epochs,
            }
        )
        self.parts: list[GPTDataset | BlendedDataset] = []  # one per epoch

    @staticmethod
    def build(
        blend: str | Sequence[str],
        seq_length: int,
        seed: int,
        epochs: int = 1,
        cache_path: str | Path | None = None,
        *,
        eod: int | None = None,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
        create_attention_mask: bool = False,
        mmap_bin_files: bool = True,
    ) -> Stream:
        """Open a stream; builds its index caches first if they do not exist.

        ``blend`` is a value of Megatron's ``--data-path``: prefixes, or alternating weights and prefixes
        (``["30", "A", "70", "B"]``). Without weights, members are drawn in proportion to their lengths.
        Caches are stored under ``cache_path``, by default ``<first prefix>.streams/``. With
        torch.distributed this is a collective call: rank 0 builds, all ranks wait, then load.

        Raises DataError (missing, broken or repeated corpora; a corpus shorter than a sample; caches that
        this rank cannot see) and UsageError (sizes, seed, flags that need an ``eod``).
        """
        for flag, given, allowed in (
            ("--seq-length", seq_length, range(1, 2**31)),
            ("--stream-seed", seed, range(SEEDS)),
            ("--stream-epochs", epochs, range(1, 2**15)),
        ):
            if given not in allowed:
                raise UsageError(flag, got=given, expected=f"{allowed.start} to {allowed.stop - 1}")
        if eod is None and (reset_position_ids or reset_attention_mask or eod_mask_loss):
            raise UsageError(
                "--reset-position-ids, --reset-attention-mask, --eod-mask-loss",
                got="one without it",
                expected="a tokenizer with an end-of-document id",
            )
        stream = Stream(members(parse_blend(blend)), seq_length, seed, epochs)
        for corpus in stream.corpora:
            length = indexed.tokens(indexed.open_indexed(corpus.prefix))
            if length <= seq_length:
                raise DataError(
                    f"{corpus.prefix} holds {length} tokens, one sample needs {seq_length + 1}: "
                    "give more text or a shorter --seq-length"
                )
        flags = {
            "tokenizer": _Tokens(eod),
            "reset_position_ids": reset_position_ids,
            "reset_attention_mask": reset_attention_mask,
            "eod_mask_loss": eod_mask_loss,
            "create_attention_mask": create_attention_mask,
            "mmap_bin_files": mmap_bin_files,
        }
        cache = stream.cache(cache_path)
        distributed = torch.distributed.is_initialized()
        # Only rank 0 looks before the barrier: a network file system may cache that a file does not exist.
        if not (distributed and torch.distributed.get_rank()) and not cache.is_dir():
            stream._build_cache(cache, flags)
        if distributed:
            torch.distributed.barrier()
        if not cache.is_dir():
            raise DataError(
                f"rank 0 built the index caches {cache}, but this machine ({os.uname().nodename}) "
                "does not see them: put --data-cache-path on a file system that all nodes share"
            )
        stream.parts = stream._open(cache, flags)
        return stream

    def cache(self, cache_path: str | Path | None = None) -> Path:
        """The directory of the stream's index caches, built or not."""
        caches = Path(cache_path or f"{self.corpora[0].prefix}.streams").absolute()
        return caches / f"stream-{self.id[:16]}"

    def _build_cache(self, cache: Path, flags: dict[str, Any]) -> None:
        """Build in a scratch directory and rename it; of concurrent builds, the first to finish wins."""
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            for left_over in cache.parent.glob(f".{glob.escape(cache.name)}{artifacts.PARTIAL}*"):
                if time.time() - left_over.stat().st_mtime > ABANDONED:
                    shutil.rmtree(left_over, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(dir=cache.parent, prefix=f".{cache.name}{artifacts.PARTIAL}"))
        except OSError as error:
            raise DataError(f"cannot write index caches: {error}; choose a --data-cache-path") from error
        try:
            artifacts.share_directory(scratch)
            self._open(scratch, flags)
            artifacts.write_json(scratch / "stream.json", self.describe())
            os.rename(scratch, cache)
        except OSError:
            if not cache.is_dir():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _open(self, cache: Path, flags: dict[str, Any]) -> list[GPTDataset | BlendedDataset]:
        """Megatron's datasets, one per epoch, with their indices in ``cache`` (built if missing)."""
        corpora = [indexed.open_indexed(c.prefix, flags["mmap_bin_files"]) for c in self.corpora]
        parts: list[GPTDataset | BlendedDataset] = []
        for epoch in range(self.epochs):
            config = GPTDatasetConfig(
                random_seed=epoch_seed(self.seed, epoch),
                sequence_length=self.seq_length,
                blend=([c.prefix for c in self.corpora], None),
                split="1,0,0",
                path_to_cache=str(cache),
                **flags,
            )
            datasets = []
            for corpus, opened in zip(self.corpora, corpora, strict=True):
                documents = np.arange(len(opened), dtype=np.int32)
                # The "path" only names the cache files, which must not depend on the location of the data.
                datasets.append(GPTDataset(opened, corpus.fingerprint, documents, None, Split.train, config))
            parts.append(datasets[0] if len(datasets) == 1 else self._blend(datasets, config))
        return parts

    def _blend(self, datasets: list[GPTDataset], config: GPTDatasetConfig) -> BlendedDataset:
        lengths = [len(dataset) for dataset in datasets]
        if self._weights is None:
            return BlendedDataset(datasets, lengths, None, config)
        path = Path(config.path_to_cache or "") / f"blend-{config.random_seed}.json"
        if not path.is_file():
            artifacts.write_json(path, {"samples": blend_length(self._weights, lengths)})
        return BlendedDataset(datasets, self._weights, artifacts.read_json(path)["samples"], config)

    @property
    def members(self) -> list[GPTDataset]:
        """The corpora of a stream of one epoch, each with its own samples in its own order."""
        (part,) = self.parts
        return list(part.datasets) if isinstance(part, BlendedDataset) else [part]

    @property
    def samples_per_epoch(self) -> int:
        """Samples per epoch, the same for all epochs: it depends on token counts, not on their order."""
        return len(self.parts[0])

    def __len__(self) -> int:
        return self.samples_per_epoch * self.epochs

    def __getitem__(self, sample: int) -> dict[str, Any]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of a stream of {len(self)}")
        epoch, position = divmod(int(sample), self.samples_per_epoch)
        found: dict[str, Any] = self.parts[epoch][position]
        return found

    def ranges(self, start: int, end: int) -> list[list[int]] | None:
        """By corpus, which of its own samples the samples [start, end) are; None for one corpus or several epochs."""
        part = self.parts[0]
        if self.epochs > 1 or not isinstance(part, BlendedDataset):
            return None
        until, before = (np.bincount(part.dataset_index[:n], minlength=len(self.corpora)) for n in (end, start))
        return [list(pair) for pair in zip(before.tolist(), until.tolist(), strict=True)]

    def describe(self) -> dict[str, Any]:
        """The description of the stream in an account (JSON); includes ``samples`` once the stream is built."""
        described: dict[str, Any] = {
            "id": self.id,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "epochs": self.epochs,
            "blend": [[c.weight, c.prefix] for c in self.corpora],
            "corpora": [c.fingerprint for c in self.corpora],
        }
        return described | ({"samples": len(self)} if self.parts else {})


class StreamRange(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples [start, end) of a stream, in stream order or, with a seed, in a fixed permutation of it.

    The permutation depends only on the seed and ``end - start``, so two arms of a comparison with the same
    range and replicate seed see the same samples in the same order. Raises UsageError if the range is
    empty, exceeds the stream, or is not a whole number of global batches.
    """

    def __init__(
        self,
        stream: Stream,
        start: int,
        end: int,
        permutation_seed: int | None = None,
        global_batch_size: int = 1,
    ):
        given = f"{start}:{end}"
        if not 0 <= start < end:
            raise UsageError("--stream-range", got=given, expected="START:END in samples, with 0 <= START < END")
        if end > len(stream):
            raise UsageError(
                "--stream-range",
                got=given,
                expected=f"an end of at most {len(stream)}",
                why=f"the stream has {len(stream)} samples of {stream.seq_length} tokens in {stream.epochs} "
                "epoch(s) and does not wrap",
                do="give more text, or declare more epochs with --stream-epochs",
            )
        if (end - start) % global_batch_size:
            raise UsageError(
                "--stream-range",
                got=given,
                expected=f"a multiple of --global-batch-size {global_batch_size} samples",
                why=f"{end - start} samples leave a rest of {(end - start) % global_batch_size}",
            )
        self.stream, self.start, self.end, self.permutation_seed = stream, start, end, permutation_seed
        self._order: np.ndarray | None = None
        if permutation_seed is not None:
            self._order = np.arange(end - start, dtype=np.uint32 if end - start < SEEDS else np.int64)
            # RandomState, not Generator: NumPy guarantees that its numbers never change.
            np.random.RandomState(permutation_seed).shuffle(self._order)

    def __len__(self) -> int:
        return self.end - self.start

    def sample(self, position: int) -> int:
        """The stream's sample number at ``position`` of this range."""
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of a range of {len(self)}")
        return self.start + int(position if self._order is None else self._order[position])

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.stream[self.sample(position)]


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of an epoch: the stream's seed for the first, derived from it with SHA-256 for the others."""
    if not epoch:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:4], "big")


def parse_range(text: str, flag: str = "--stream-range") -> tuple[int, int]:
    """``"1000:2000"`` → (1000, 2000), in samples."""
    start, _, end = text.partition(":")
    if not (start.isdecimal() and end.isdecimal() and int(start) < int(end)):
        raise UsageError(flag, got=text, expected="START:END in samples, END excluded, such as 1000:2000")
    return int(start), int(end)


def refuse_overlap(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Raise DataError if two uses of text may share tokens.

    Each use is ``{"stream": describe(), "range": [start, end]}``, as in an account. On one stream the ranges
    must be disjoint. Two streams that share a corpus are refused, because sample numbers of different orders
    cannot be compared.
    """
    a, b = first["stream"], second["stream"]
    (a_start, a_end), (b_start, b_end) = first["range"], second["range"]
    if a["id"] == b["id"]:
        per_epoch = a["samples"] // a["epochs"]
        both = max(a_start, b_start), min(a_end, b_end)
        if both[0] < both[1]:
            raise DataError(
                f"{names[0]} takes samples {a_start}:{a_end} and {names[1]} takes {b_start}:{b_end} "
                f"of the same stream: both would see {both[0]}:{both[1]}; choose disjoint ranges"
            )
        if len({sample // per_epoch for sample in (a_start, a_end - 1, b_start, b_end - 1)}) > 1:
            raise DataError(
                f"{names[0]} ({a_start}:{a_end}) and {names[1]} ({b_start}:{b_end}) take samples of "
                f"different epochs of one stream ({per_epoch} samples each), which repeat each other: "
                "put both into one epoch"
            )
    elif shared := set(a["corpora"]) & set(b["corpora"]):
        paths = [prefix for (_, prefix), c in zip(a["blend"], a["corpora"], strict=True) if c in shared]
        raise DataError(
            f"{names[0]} and {names[1]} read {', '.join(paths)} as different streams (seeds {a['seed']} and "
            f"{b['seed']}, lengths {a['seq_length']} and {b['seq_length']}), so that their samples may "
            "overlap: use one stream and disjoint ranges"
        )
