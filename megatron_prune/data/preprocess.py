"""Text → tokens: ``P.bin`` and ``P.idx`` in Megatron's format, and the sidecar ``P.json``.

Reading (``text.records``) and writing happen here, in order; JSON and tokenizing in worker processes,
one batch of records at a time. Batches come back in the order they were sent, so the files do not
depend on the number of workers. All three files are finished in a scratch directory first.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_prune import artifacts
from megatron_prune.data.text import Record, check_inputs, records, text_of
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.errors import DataError, RunError, UsageError

BATCH_BYTES = 512 * 1024  # of raw text: some tens of milliseconds of work, so that sending it costs nothing
BATCHES_AHEAD = 4  # a worker, so that memory stays bounded however large the input is


@dataclass(frozen=True)
class Batch:
    """What comes back from a worker."""

    tokens: np.ndarray  # int32, all documents joined
    lengths: np.ndarray  # int64, one a document, end-of-document id included
    empty: int  # records without any token
    raw_bytes: int


@dataclass(frozen=True)
class Summary:
    """What was made, how fast."""

    sidecar: dict[str, Any]
    seconds: float
    raw_bytes: int

    def __str__(self) -> str:
        s = self.sidecar
        return (
            f"{s['documents']} documents, {s['tokens']} tokens ({s['dtype']}), {s['empty_documents']} empty "
            f"ones skipped, {self.raw_bytes / 1e6:.1f} MB in {self.seconds:.1f} s: "
            f"{s['tokens'] / self.seconds:.0f} tokens/s"
        )


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    json_key: str = "text",
    input_format: str = "auto",
    text_documents: str = "file",
    append_eod: bool = False,
    workers: int = 1,
    progress: bool | None = None,
) -> Summary:
    """Tokenize files into ``output_prefix``.bin/.idx/.json; existing ones are replaced at the very end.

    The type of a token is Megatron's choice for the vocabulary (uint16 below 65500, else int32). A
    progress bar is shown on a terminal, or as ``progress`` says. Raises UsageError and DataError.
    """
    paths = check_inputs(inputs)
    if append_eod and tokenizer.eod is None:
        raise UsageError("--append-eod", given="a tokenizer without </s>", allowed="one that ends documents")
    if workers < 1:
        raise UsageError("--workers", given=workers, allowed="1 or more")
    begun = monotonic()
    prefix = Path(output_prefix).absolute()
    with _scratch(prefix) as scratch:
        found = records(paths, json_key=json_key, input_format=input_format, text_documents=text_documents)
        encoded = _encode_all(_batches(found), tokenizer, append_eod, workers)
        counts = _write(scratch, encoded, tokenizer.vocab_size, progress)
        sidecar: dict[str, Any] = {
            "version": 1,
            "tokenizer": {
                "type": tokenizer.type,
                "model": tokenizer.model,
                "fingerprint": tokenizer.fingerprint(),
                "vocab_size": tokenizer.vocab_size,
                "eod": tokenizer.eod,
            },
            "append_eod": append_eod,
            "documents": counts["documents"],
            "empty_documents": counts["empty"],
            "tokens": counts["tokens"],
            "dtype": counts["dtype"],
            "bin_sha256": artifacts.sha256_file(scratch / "P.bin"),
            "inputs": [{"path": str(path), "bytes": path.stat().st_size} for path in paths],
            "versions": artifacts.versions(),
        }
        artifacts.write_json(scratch / "P.json", sidecar)
        # The index goes first and comes last but one: a .bin without its .idx is not taken for a corpus.
        for suffix in (".json", ".idx"):
            Path(f"{prefix}{suffix}").unlink(missing_ok=True)
        for suffix in (".bin", ".idx", ".json"):
            os.replace(scratch / f"P{suffix}", f"{prefix}{suffix}")
    return Summary(sidecar, max(monotonic() - begun, 1e-9), counts["raw_bytes"])


@contextlib.contextmanager
def _scratch(prefix: Path) -> Iterator[Path]:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    pattern = f".{prefix.name}.corpus{artifacts.PARTIAL}"
    for left_over in prefix.parent.glob(f"{pattern}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=prefix.parent, prefix=pattern))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _batches(found: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in found:
        batch.append(record)
        size += len(record.payload)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(batch: list[Record], tokenizer: Tokenizer, append_eod: bool) -> Batch:
    """Tokenize a batch of records; those without a token are counted and left out."""
    texts = [text_of(record) for record in batch]
    ids = [found for found in tokenizer.encode_batch(texts) if found]
    if append_eod:
        for found in ids:
            found.append(tokenizer.eod)  # type: ignore[arg-type]
    lengths = np.array([len(found) for found in ids], dtype=np.int64)
    tokens = np.fromiter((i for found in ids for i in found), dtype=np.int32, count=int(lengths.sum()))
    return Batch(tokens, lengths, len(batch) - len(ids), sum(len(record.payload) for record in batch))


_in_worker: Callable[[list[Record]], Batch]


def _start_worker(tokenizer: Tokenizer, append_eod: bool) -> None:
    global _in_worker
    _in_worker = lambda batch: encode(batch, tokenizer, append_eod)  # noqa: E731


def _work(batch: list[Record]) -> Batch:
    return _in_worker(batch)


def _encode_all(
    batches: Iterator[list[Record]], tokenizer: Tokenizer, append_eod: bool, workers: int
) -> Iterator[Batch]:
    """Encoded batches in the order of the input, from this process or from ``workers`` others."""
    if workers == 1:
        for batch in batches:
            yield encode(batch, tokenizer, append_eod)
        return
    # Forked, so that workers have the tokenizer already: loading one can take seconds.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, _start_worker, (tokenizer, append_eod)) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                if len(waiting) >= workers * BATCHES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RunError("a worker process died (out of memory?): try fewer --workers") from error
        finally:
            for future in waiting:
                future.cancel()


def _write(scratch: Path, encoded: Iterator[Batch], vocab_size: int, progress: bool | None) -> dict[str, Any]:
    first = next(encoded, None)  # the workers are at it while Megatron is imported, which takes seconds
    if first is None:
        raise DataError("the input holds no documents")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(scratch / "P.bin"), dtype)
    counts = {"documents": 0, "empty": 0, "tokens": 0, "raw_bytes": 0, "dtype": np.dtype(dtype).name}
    show = sys.stderr.isatty() if progress is None else progress
    with tqdm(unit="B", unit_scale=True, desc="tokenizing", disable=not show) as bar:
        for batch in itertools.chain([first], encoded):
            for document in np.split(batch.tokens, np.cumsum(batch.lengths))[:-1]:
                builder.add_document(document, [len(document)])
            counts["documents"] += len(batch.lengths)
            counts["empty"] += batch.empty
            counts["tokens"] += len(batch.tokens)
            counts["raw_bytes"] += batch.raw_bytes
            bar.update(batch.raw_bytes)
    if not counts["documents"]:
        raise DataError(f"none of the {counts['empty']} documents of the input holds any text")
    builder.finalize(str(scratch / "P.idx"))
    for name in ("P.bin", "P.idx"):
        with open(scratch / name, "rb") as handle:
            os.fsync(handle.fileno())
    return counts
