"""Tokenized corpora on disk: open ``P.bin``/``P.idx``, describe them, and check that they fit a model.

A corpus is Megatron's ``IndexedDataset``: the concatenated tokens of all documents in ``P.bin``, their
lengths in ``P.idx``. ``preprocess`` also writes a sidecar ``P.json`` (tokenizer, documents, tokens, hash
of the ``.bin``). Corpora from other tools have no sidecar and work too.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from megatron_prune.artifacts import read_json
from megatron_prune.errors import DataError, MegatronPruneError
from megatron_prune.untrusted import check, explain, refuse_irregular

if TYPE_CHECKING:  # importing Megatron takes seconds, as long as tokenizing a small corpus
    from megatron.core.datasets.indexed_dataset import IndexedDataset


def open_indexed(prefix: str | Path, mmap_bin_files: bool = True) -> IndexedDataset:
    """Megatron's ``IndexedDataset`` at ``prefix``, its ``.bin`` memory-mapped or read through a file pointer.

    Raises DataError if a file is missing, is not an index, holds no tokens, or if the length of the
    ``.bin`` contradicts the ``.idx`` (truncated, or from another run).
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = str(prefix)
    paths = {suffix: Path(prefix + suffix) for suffix in (".bin", ".idx")}
    stamps = []
    for path in paths.values():
        if not path.is_file():
            raise DataError(f"{path} does not exist: a corpus is given by its prefix, without .bin and .idx")
        found = path.stat()
        if not found.st_size:
            raise DataError(f"{path} is empty: make the corpus again with megatron-prune preprocess")
        stamps.append((found.st_ino, found.st_size, found.st_mtime_ns))
    _check_files(paths[".bin"], paths[".idx"], tuple(stamps))
    try:
        return vetted(IndexedDataset(prefix, mmap=mmap_bin_files), prefix)
    except (AssertionError, ValueError, OSError) as error:
        raise DataError(f"{prefix} could not be opened: {error or 'its index contradicts itself'}") from error


def vetted(corpus: IndexedDataset, prefix: str | Path) -> IndexedDataset:
    """``corpus``, which from now on refuses every read with a token id outside the model's vocabulary."""
    corpus.bin_reader = _VettedReader(corpus.bin_reader, str(prefix))
    return corpus


class _VettedReader:
    """Reads a ``.bin`` as Megatron's own reader, and raises DataError for an id that is negative or not below the
    vocabulary that ``check_fits_model`` was given for the prefix."""

    def __init__(self, reader: Any, prefix: str) -> None:
        self._reader, self._prefix = reader, prefix

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        ids: np.ndarray = self._reader.read(dtype=dtype, count=count, offset=offset)
        if len(ids):
            _refuse_ids(self._prefix, int(ids.min()), int(ids.max()), _VOCABULARIES.get(self._prefix))
        return ids


_VOCABULARIES: dict[str, int] = {}  # of the models that read a corpus in this process, by the corpus's prefix


def limit(prefix: str | Path, vocabulary: int) -> None:
    """From now on, refuse ids outside ``vocabulary`` in all that this process reads of the corpus."""
    _VOCABULARIES[str(prefix)] = vocabulary


def _refuse_ids(prefix: str | Path, smallest: int, largest: int, vocabulary: int | None) -> None:
    if smallest < 0:
        raise DataError(
            f"{prefix} holds token id {smallest}, and ids are not negative: its index gives the tokens another type "
            "than they were written in; make the corpus again"
        )
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            f"{prefix}: expected token ids up to {vocabulary - 1}, the model's vocabulary, got {largest}: it was made "
            "with another tokenizer; tokenize the text with the model's own tokenizer"
        )


@functools.lru_cache(maxsize=1024)
def _check_files(tokens_file: Path, path: Path, stamps: tuple[Any, ...]) -> None:
    """Raises DataError for a corpus on which Megatron's reader would fail later, or read what is no document: foreign,
    truncated, of another type, with lengths, places or document ends that do not follow one another. ``stamps`` of the
    files are part of the question, so that unchanged files are checked once."""
    dtype, sequences, ends = _header(path)
    found = tokens_file.stat().st_size
    if not sequences:
        raise DataError(f"{path}: expected a corpus with documents, got none; give text to megatron-prune preprocess")
    lengths = np.memmap(path, np.int32, "r", HEADER.size, sequences)
    pointers = np.memmap(path, np.int64, "r", HEADER.size + 4 * sequences, sequences)
    bounds = np.memmap(path, np.int64, "r", HEADER.size + 12 * sequences, ends)
    expected = 0  # bytes of the sequences so far; Windows read them as one slice, so they must be contiguous
    for start in range(0, sequences, CHECKED_AT_ONCE):
        part = lengths[start : start + CHECKED_AT_ONCE].astype(np.int64)
        sizes = part * dtype.itemsize
        places = np.cumsum(sizes) - sizes + expected
        if int(part.min()) < 0 or not np.array_equal(places, pointers[start : start + CHECKED_AT_ONCE]):
            raise DataError(
                f"{path} is damaged: the lengths and places of its sequences do not follow one another; "
                "make the corpus again"
            )
        expected += int(sizes.sum())
    if not expected:
        raise DataError(f"{str(path).removesuffix('.idx')} holds no tokens")
    if found != expected:
        raise DataError(
            f"{tokens_file}: expected {expected} bytes, as {path} describes, got {found}: "
            "one of the two is truncated or comes from another run; make the corpus again"
        )
    last = 0
    for start in range(0, ends, CHECKED_AT_ONCE):
        part = bounds[start : start + CHECKED_AT_ONCE]
        if int(part[0]) < last or (np.diff(part) < 0).any() or (start == 0 and part[0] != 0):
            raise DataError(f"{path} is damaged: the ends of its documents do not ascend from 0; make the corpus again")
        last = int(part[-1])
    if last != sequences:
        raise DataError(f"{path} is damaged: its documents end at sequence {last}, but it has {sequences}")


def _open(path: Path) -> IO[bytes]:
    """Open a file of a corpus. Raises DataError unless it is a regular file that can be read."""
    try:
        refuse_irregular(path, _MOST_BYTES)
        return open(path, "rb")
    except (OSError, MegatronPruneError) as error:
        raise DataError(explain(error, path, "read") if isinstance(error, OSError) else str(error)) from error


def _header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Token type, number of sequences, and of document ends, of an index that is long enough to hold them."""
    with _open(path) as handle:
        header = handle.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(
            f"{path}: expected a Megatron index, got another file; make the corpus with megatron-prune preprocess"
        )
    _, version, code, sequences, ends = HEADER.unpack(header)
    names = {number: name for name, number in TOKEN_TYPES.items()}
    if version != 1 or code not in names:
        raise DataError(
            f"{path} is a Megatron index of unknown kind (version {version}, token type {code}): "
            f"expected version 1 with integers"
        )
    expected = HEADER.size + sequences * (4 + 8) + ends * 8  # lengths, pointers; document ends
    found = path.stat().st_size
    if found < expected:
        raise DataError(
            f"{path} is a truncated Megatron index: expected {expected} bytes, got {found}; make the corpus again"
        )
    return np.dtype(names[code]), sequences, ends


def tokens(corpus: IndexedDataset) -> int:
    """Number of tokens of all documents."""
    return int(corpus.sequence_lengths.sum(dtype=np.int64))


def sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """The sidecar that ``preprocess`` wrote next to the corpus; None if another tool made the corpus."""
    path = Path(f"{prefix}.json")
    return check(_Sidecar, read_json(path), str(path), DataError) if path.is_file() else None  # type: ignore[return-value]


class _Sidecar(TypedDict):
    tokenizer: _SidecarTokenizer


class _SidecarTokenizer(TypedDict):
    vocab_size: NotRequired[int]
    fingerprint: NotRequired[str]


def check_fits_model(prefix: str | Path, vocabulary: int) -> None:
    """Raises DataError for a corpus with token ids outside a model's ``vocabulary`` (size without padding).

    Checks the sidecar's vocabulary, if there is one, the type of the tokens, and the ids in evenly spaced blocks. From
    then on, all that this process reads of the corpus is checked (``vetted``).
    """
    described = sidecar(prefix)
    size = vocabulary
    if described:
        size = described["tokenizer"].get("vocab_size", vocabulary)
        if size > vocabulary:
            raise DataError(
                f"{prefix}: expected at most the model's vocabulary of {vocabulary} tokens, got {size}: "
                "tokenize the text with the model's own tokenizer"
            )
    corpus = open_indexed(prefix)
    held = np.iinfo(corpus.index.dtype).max + 1
    if held < size:
        raise DataError(
            f"{prefix} holds tokens of type {np.dtype(corpus.index.dtype)}, which has {held} ids, but the vocabulary "
            f"has {size}: its index gives the tokens another type than they were written in, or it was made for "
            "another model"
        )
    limit(prefix, vocabulary)
    ids = np.memmap(f"{prefix}.bin", dtype=corpus.index.dtype, mode="r")
    length = BLOCK_BYTES // ids.itemsize
    for block in {block * max(len(ids) - length, 0) // (BLOCKS - 1) for block in range(BLOCKS)}:
        part = ids[block : block + length]
        _refuse_ids(prefix, int(part.min()), int(part.max()), vocabulary)


# Megatron's ``.idx`` files (``megatron.core.datasets.indexed_dataset``), read and written without a Python loop over
# sequences. The tests compare the bytes with Megatron's own builder.


MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, sequences, document ends
CHECKED_AT_ONCE = 1 << 20  # sequences
_MOST_BYTES = 1 << 60
TOKEN_TYPES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def token_type(vocab_size: int | None) -> str:
    """Megatron's token type for a vocabulary: uint16 below 65500 ids, else int32."""
    return "uint16" if vocab_size is not None and vocab_size < 65500 else "int32"


def write_index(path: str | Path, sequences: Sequence[np.ndarray], documents: Sequence[np.ndarray], dtype: str) -> None:
    """Write an index. ``sequences``: lengths in tokens; ``documents``: sequences per document. Both are lists of
    arrays, which are concatenated."""
    lengths = np.concatenate([np.empty(0, np.int32), *sequences]).astype(np.int32)
    ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *documents]), dtype=np.int64)
    pointers = np.cumsum(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    with open(path, "wb") as handle:
        handle.write(HEADER.pack(MAGIC, 1, TOKEN_TYPES[dtype], len(lengths), len(ends)))
        handle.write(lengths.tobytes())
        handle.write(np.concatenate([np.zeros(1, np.int64), pointers])[: len(lengths)].tobytes())
        handle.write(ends.tobytes())


def document_tokens(path: str | Path) -> np.ndarray:
    """Tokens per document of an index, int64 [documents]. Raises DataError if the file is not an index."""
    where = Path(path)
    _, sequences, ends = _header(where)
    lengths = np.fromfile(where, np.int32, sequences, offset=HEADER.size).astype(np.int64)
    bounds = np.fromfile(where, np.int64, ends, offset=HEADER.size + 12 * sequences)
    if len(bounds) and not (0 <= int(bounds.min()) and int(bounds.max()) <= sequences):
        raise DataError(f"{path} is damaged: its documents end outside of its {sequences} sequences")
    return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])[bounds])


# The identity of a corpus depends on its content, not on its path: it is the same on every machine, and changes if the
# corpus is made again from other text. A file of up to BLOCKS * BLOCK_BYTES is hashed whole, a larger one at evenly
# spaced blocks, because every rank computes the fingerprint of corpora that can have terabytes.
BLOCKS = 256
BLOCK_BYTES = 64 * 1024


def fingerprint(prefix: str | Path) -> str:
    """Identity of a corpus's content, 64 hex digits: sizes and evenly spaced blocks of both files.

    Reads at most 32 MB. Small corpora are hashed whole. In a large corpus, a change of a few tokens can
    go unnoticed; the sidecar's ``bin_sha256`` covers all of it.
    """
    digest = hashlib.sha256(b"megatron_prune corpus 1")
    for suffix in (".idx", ".bin"):
        path = Path(f"{prefix}{suffix}")
        size = path.stat().st_size
        digest.update(f"{suffix} {size}\n".encode())
        with _open(path) as handle:
            if size <= BLOCKS * BLOCK_BYTES:
                digest.update(handle.read())
                continue
            for block in range(BLOCKS):
                handle.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()
