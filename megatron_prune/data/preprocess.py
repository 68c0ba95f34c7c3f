"""Tokenize text: ``P.bin`` and ``P.idx`` in Megatron's format, and the sidecar ``P.json``.

This process reads (``readers``, ``hub``) and writes (``shards``), in order; worker processes parse, split
and tokenize batches of records. Batches return in the order of the input and never span two inputs, so the
files do not depend on the number of workers or on interruptions. A run that is started again skips the
inputs that an earlier one finished.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from megatron_prune import artifacts, screen
from megatron_prune.data.chunks import SentenceSplitter
from megatron_prune.data.indexed import token_type
from megatron_prune.data.readers import File, RawDocument, RawText, check_inputs, format_of, size_of_text, text_of
from megatron_prune.data.shards import Parts, PartWriter
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.errors import DataError, RunError, UsageError

BATCH_BYTES = 512 * 1024  # of raw text: tens of milliseconds of work, so that the cost of sending it is negligible
BATCHES_AHEAD = 4  # per worker, so that memory is bounded


@dataclass(frozen=True)
class Summary:
    """The result of ``preprocess`` and its speed."""

    sidecar: dict[str, Any]
    seconds: float
    raw_bytes: int  # tokenized by this run
    tokens: int  # made by this run
    resumed: int  # inputs that an earlier run had finished

    def __str__(self) -> str:
        s = self.sidecar
        before = f", {self.resumed} of {len(s['inputs'])} inputs from before" if self.resumed else ""
        return (
            f"{s['documents']} documents, {s['tokens']} tokens ({s['dtype']}), {s['empty_documents']} empty "
            f"ones skipped{before}, {self.raw_bytes / 1e6:.1f} MB in {self.seconds:.1f} s: "
            f"{self.tokens / self.seconds:.0f} tokens/s"
        )


def preprocess(
    inputs: Sequence[str | Path | RawText],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    json_key: str = "text",
    input_format: str = "auto",
    text_documents: str = "file",
    append_eod: bool = False,
    splitter: SentenceSplitter | None = None,
    token_ids: str | None = None,
    workers: int = 1,
) -> Summary:
    """Tokenize files and datasets into ``output_prefix``.bin/.idx/.json; existing files are replaced at the end.

    The token type is Megatron's (uint16 for vocabularies below 65500, else int32). With a ``splitter``, each
    sentence of a document is a sequence. ``token_ids``: the records of the (array_record) files are ids of this
    type. Raises UsageError, DataError and RunError; inputs that were finished
    before an error are kept for the next run.
    """
    paths = [name for name in inputs if isinstance(name, str | Path)]
    if paths or not inputs:
        check_inputs(paths, input_format)
    sources: list[RawText] = [
        File(Path(name), json_key, input_format, text_documents) if isinstance(name, str | Path) else name
        for name in inputs
    ]
    if append_eod and tokenizer.eod is None:
        raise UsageError(
            "--append-eod",
            got=f"{tokenizer.model}, which has none",
            expected="a tokenizer with an end-of-document token",
        )
    if token_ids is not None:
        others = [str(path) for path in paths if format_of(Path(path), input_format) != "array_record"]
        if others or len(paths) < len(inputs) or splitter is not None:
            got = others[0] if others else "sentences" if splitter is not None else "a data set"
            raise UsageError("--input-tokens", got=got, expected="whole records of array_record files")
    workers = artifacts.bound_workers("--workers", workers)
    begun = monotonic()
    encoder = Encoder(tokenizer, append_eod, splitter, token_type(tokenizer.vocab_size), token_ids)
    settings = encoder.describe()
    keys = [artifacts.sha256_json({"part": 1, "input": s.identity(), "settings": settings}) for s in sources]
    with Parts(Path(output_prefix).absolute()) as parts:
        finished = parts.keep(keys)
        todo = {key: source for key, source in zip(keys, sources, strict=True) if key not in finished}
        try:
            _tokenize(parts, todo, encoder, workers)
            merged = parts.merge(keys, encoder.dtype)
        except OSError as error:
            refusal = artifacts.disk_refusal(error)
            if refusal is None:
                raise
            what, remedy = artifacts.describe_refusal(refusal, "writing", Path(output_prefix))
            raise RunError(
                f"{what}: finished inputs are kept; {remedy} (the merge needs as much again as the corpus) and run the "
                "same command again"
            ) from error
        manifests = [parts.manifest(key) for key in keys]
        total = {name: sum(found[name] for found in manifests) for name in ("documents", "sequences", "tokens")}
        empty = sum(found["empty"] for found in manifests)
        if not total["documents"]:
            for key in keys:  # empty parts are not worth keeping
                (parts.folder / f"{key}.json").unlink(missing_ok=True)
            none = f"none of the {empty} documents of the input holds any text"
            raise DataError(none if empty else "the input holds no documents")
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
            "sentences": splitter and {"language": splitter.name, "keep_newlines": splitter.keep_newlines},
            **total,
            "empty_documents": empty,
            "dtype": encoder.dtype,
            "bin_sha256": merged,
            "inputs": [source.describe() for source in sources],
            "versions": artifacts.versions(),
        }
        new = [found for key, found in zip(keys, manifests, strict=True) if key in todo]
        raw_bytes, tokens = (sum(found[name] for found in new) for name in ("raw_bytes", "tokens"))
        parts.publish(sidecar)
    resumed = sum(key in finished for key in keys)
    return Summary(sidecar, max(monotonic() - begun, 1e-9), raw_bytes, tokens, resumed)


@dataclass(frozen=True)
class RecordBatch:
    """The tokens of a batch of records, as returned by a worker."""

    tokens: np.ndarray  # of the corpus's type, all documents concatenated
    sequences: np.ndarray  # int64, length of each sequence, including the end-of-document id
    documents: np.ndarray  # int64, number of sequences of each document
    empty: int  # records without tokens
    raw_bytes: int


@dataclass(frozen=True)
class Encoder:
    """Turns records into tokens; holds every setting that affects them."""

    tokenizer: Tokenizer
    append_eod: bool
    splitter: SentenceSplitter | None
    dtype: str
    token_ids: str | None = None  # type of the ids that records consist of, little-endian; None for text

    def describe(self) -> dict[str, Any]:
        """Identity of the settings (JSON): encoders with equal descriptions give equal tokens."""
        return {
            "tokenizer": [self.tokenizer.type, self.tokenizer.digest(), self.tokenizer.eod],
            "append_eod": self.append_eod,
            "sentences": self.splitter and self.splitter.digest(),
            "dtype": self.dtype,
            **({} if self.token_ids is None else {"token_ids": self.token_ids}),
        }

    def __call__(self, batch: list[RawDocument]) -> RecordBatch:
        """Tokenize a batch of records, dropping sentences and records without tokens. Raises DataError."""
        texts = [text_of(record) for record in batch] if self.token_ids is None else []
        raw_bytes = sum(len(record.payload) for record in batch)
        if self.token_ids is not None:
            ids = [found for record in batch if len(found := _ids_of(record, self.token_ids))]
            documents = np.ones(len(ids), dtype=np.int64)
        elif self.splitter is None:
            ids = [found for found in self.tokenizer.encode_batch(texts) if len(found)]
            documents = np.ones(len(ids), dtype=np.int64)
        else:
            split = [self.splitter.split(text) for text in texts]
            encoded = iter(self.tokenizer.encode_batch([sentence for sentences in split for sentence in sentences]))
            kept = [[f for f in itertools.islice(encoded, len(sentences)) if len(f)] for sentences in split]
            documents = np.array([len(found) for found in kept if found], dtype=np.int64)
            ids = [found for sentences in kept for found in sentences]
        sequences = np.array([len(found) for found in ids], dtype=np.int64)
        tokens = np.concatenate([np.empty(0, np.int32), *ids])
        if self.append_eod:
            last = np.cumsum(documents) - 1  # sequences that end a document
            tokens = np.insert(tokens, np.cumsum(sequences)[last], self.tokenizer.eod)  # type: ignore[arg-type]
            sequences[last] += 1
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            size = self.tokenizer.vocab_size
            made = (
                f"{self.tokenizer.model} returned"
                if self.token_ids is None
                else f"the input holds, as {self.token_ids},"
            )
            raise DataError(f"{made} an id outside the tokenizer's vocabulary of {size}")
        tokens = tokens.astype(self.dtype)
        return RecordBatch(tokens, sequences, documents, len(batch) - len(documents), raw_bytes)


def _ids_of(record: RawDocument, kind: str) -> np.ndarray:
    """The ids of a record; DataError if it does not consist of whole ones."""
    dtype = np.dtype(kind).newbyteorder("<")
    if len(record.payload) % dtype.itemsize:
        raise DataError(
            f"{record.origin} has {len(record.payload)} bytes, expected whole ids of type {kind}: see --input-tokens"
        )
    return np.frombuffer(record.payload, dtype)


def _tokenize(parts: Parts, todo: dict[str, RawText], encoder: Encoder, workers: int) -> None:
    """Tokenize the inputs in ``todo``, each into its part."""
    encoded = _encode_all(_batches(todo), encoder, workers)
    writer: PartWriter | None = None
    try:
        sizes = [size_of_text(source) for source in todo.values()]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        with screen.Bar(total, "tokenizing", "B") as bar:
            for key, batch in encoded:
                writer = writer or PartWriter(parts, key)
                if batch is None:
                    writer.finish()
                    writer = None
                else:
                    writer.add(batch.tokens, batch.sequences, batch.documents, batch.empty, batch.raw_bytes)
                    bar.advance(batch.raw_bytes)
    finally:
        encoded.close()
        if writer is not None:
            writer.abandon()


def _batches(todo: dict[str, RawText]) -> Iterator[tuple[str, list[RawDocument] | None]]:
    """(key of the input, records), and (key, None) at the end of each input."""
    for key, source in todo.items():
        batch: list[RawDocument] = []
        size = 0
        for record in source.records():
            batch.append(record)
            size += len(record.payload)
            if size >= BATCH_BYTES:
                yield key, batch
                batch, size = [], 0
        if batch:
            yield key, batch
        yield key, None


_in_worker: Encoder


def _start_worker(encoder: Encoder, parent: int) -> None:
    global _in_worker
    _in_worker = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    artifacts.end_with_parent(parent)


def _work(batch: list[RawDocument]) -> RecordBatch:
    return _in_worker(batch)


def _finished(key: str, future: Future[RecordBatch] | None) -> tuple[str, RecordBatch | None]:
    return key, None if future is None else future.result()


def _encode_all(
    batches: Iterator[tuple[str, list[RawDocument] | None]], encoder: Encoder, workers: int
) -> Generator[tuple[str, RecordBatch | None]]:
    """Encoded batches in the order of the input, from this process or from ``workers`` others."""
    if workers == 1:
        for key, batch in batches:
            yield key, None if batch is None else encoder(batch)
        return
    # Forked workers share the loaded tokenizer; loading one can take seconds.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, _start_worker, (encoder, os.getpid())) as pool:
        waiting: deque[tuple[str, Future[RecordBatch] | None]] = deque()
        try:
            for key, batch in batches:
                waiting.append((key, None if batch is None else pool.submit(_work, batch)))
                if len(waiting) >= workers * BATCHES_AHEAD:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        except BrokenProcessPool as error:
            raise RunError(
                "a worker process died, possibly for lack of memory: run the same command again with fewer --workers"
            ) from error
        finally:
            for _, future in waiting:
                if future is not None:
                    future.cancel()
