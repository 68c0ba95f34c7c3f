"""Raw text as records: JSON lines, Parquet, array_record and plain text, compressed or not, streamed in order.

A record is the bytes of one document: a JSON line, a value of a Parquet column, a record, or a piece of a text
file. ``text_of`` turns it into text, which is expensive and left to the worker processes. Files are
never held in memory as a whole, except a plain text file that is one document.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from megatron_prune.errors import DataError, UsageError
from megatron_prune.settings import either
from megatron_prune.untrusted import refuse_irregular, show_text
from megatron_prune.verbs import DOCUMENTS as DOCUMENTS
from megatron_prune.verbs import FORMATS as FORMATS

# The standard library's reader (or its backport). ``zstandard``'s treats a truncated file as complete, so half a shard
# would silently become a corpus; pyarrow's does not read ``zstd --long``.
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
ARRAY_RECORD_SUFFIXES = (".array_record", ".arrayrecord")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGIC = b"\x50\x2a\x4d\x18"  # to 5f…
LARGEST_WINDOW_LOG = 31  # `zstd --long=31`, which some published shards need
PARQUET_ROWS = 256  # decoded at a time
RECORDS = 256  # of an array_record file, read at a time
MOST_DOCUMENT_BYTES = 128 << 20
_MOST_FILE_BYTES = 1 << 50
_MOST_EXPANSION, _ANY_EXPANSION = 50, 1 << 20  # of compressed text, and what is never refused


class RawDocument(NamedTuple):
    """One document as stored on disk; ``origin`` locates it in error messages."""

    payload: bytes
    origin: str
    json_key: str | None  # None: the payload is the text itself


class RawText(Protocol):
    """A unit of input that is tokenized completely or not at all: a file, or a shard of a dataset."""

    def records(self) -> Iterator[RawDocument]: ...

    def describe(self) -> dict[str, Any]:
        """Its entry in the sidecar (JSON), the same on every run."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that must be unchanged for an earlier run's tokens to be reused (JSON)."""
        ...


@dataclass(frozen=True)
class File:
    """A file of documents; see ``records`` for what the settings mean."""

    path: Path
    json_key: str = "text"
    input_format: str = "auto"
    text_documents: str = "file"

    def records(self) -> Iterator[RawDocument]:
        return records(
            [self.path],
            json_key=self.json_key,
            input_format=self.input_format,
            text_documents=self.text_documents,
        )

    def describe(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.path.stat().st_size}

    def identity(self) -> dict[str, Any]:
        found = self.path.stat()
        return {
            "path": str(self.path.absolute()),
            "bytes": found.st_size,
            "modified_ns": found.st_mtime_ns,
            "settings": [self.json_key, self.input_format, self.text_documents],
        }


def format_of(path: Path, input_format: str = "auto") -> str:
    """``jsonl``, ``parquet`` or ``text``: from ``--input-format``, or from the suffix before .gz or .zst (any case).

    Raises UsageError for an unknown suffix: read as text, a shard of JSON lines would become one document.
    """
    if input_format != "auto":
        return input_format
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    for kind, suffixes in (
        ("jsonl", JSONL_SUFFIXES),
        ("parquet", PARQUET_SUFFIXES),
        ("array_record", ARRAY_RECORD_SUFFIXES),
        ("text", TEXT_SUFFIXES),
    ):
        if name.endswith(suffixes):
            return kind
    known = ", ".join((*JSONL_SUFFIXES, *PARQUET_SUFFIXES, *ARRAY_RECORD_SUFFIXES, *TEXT_SUFFIXES))
    raise UsageError(
        "--input-format", got=f"auto for {path}", expected=either(FORMATS[1:]),
        why=f"auto goes by the ending, {known}, and {', '.join(COMPRESSED_SUFFIXES)} after it",
    )  # fmt: skip


def size_of_text(source: RawText) -> int | None:
    """Bytes of the records of a source; None if unknown without reading it (compressed, Parquet, from the Hub)."""
    if not isinstance(source, File) or format_of(source.path, source.input_format) in ("parquet", "array_record"):
        return None
    with _open(source.path) as handle:
        return None if isinstance(handle, _Decoded) else source.path.stat().st_size


def check_inputs(inputs: Sequence[str | Path], input_format: str = "auto") -> list[Path]:
    """The input files as paths. Raises UsageError if one is missing or of unknown format, or none is given."""
    paths = [Path(name) for name in inputs]
    if not paths:
        raise UsageError("--input", got="nothing", expected="at least one file")
    for path in paths:
        if not path.is_file():
            raise UsageError("--input", got=path, expected="existing files of JSON lines, Parquet or text")
        format_of(path, input_format)
    return paths


def records(
    inputs: Sequence[Path],
    *,
    json_key: str = "text",
    input_format: str = "auto",
    text_documents: str = "file",
) -> Iterator[RawDocument]:
    """Every record of the inputs, in order. Blank lines are skipped.

    ``json_key`` also names the column of a Parquet file. ``text_documents`` says whether a plain text file is one
    document (``file``), one per paragraph (separated by blank lines), or one per line. Raises DataError for a
    broken file.
    """
    for path in inputs:
        kind = format_of(path, input_format)
        if kind == "parquet":
            yield from _parquet(path, json_key)
            continue
        if kind == "array_record":
            yield from _array_record(path)
            continue
        try:
            with _open(path) as handle:
                if kind == "jsonl":
                    for number, line in enumerate(_lines(handle, path), start=1):
                        if line.strip():
                            yield RawDocument(line, f"{path}:{number}", json_key)
                else:
                    for number, piece in _pieces(handle, path, text_documents):
                        yield RawDocument(piece, f"{path}:{number}", None)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError, OSError) as error:
            raise DataError(f"cannot read {path} to its end: {error}") from error


def _open(path: Path) -> IO[bytes]:
    """Open a file; its magic number, not its name, says whether it is compressed."""
    refuse_irregular(path, _MOST_FILE_BYTES)
    with open(path, "rb") as handle:
        magic = handle.read(4)
    if magic.startswith(b"\x1f\x8b"):
        return _Decoded(path, lambda stored: gzip.GzipFile(fileobj=stored, mode="rb"))
    # pzstd files start with a skippable frame, whose magic number varies in the low four bits of its first byte.
    if magic == ZSTD_MAGIC or (magic[1:] == SKIPPABLE_MAGIC[1:] and magic[0] >> 4 == SKIPPABLE_MAGIC[0] >> 4):
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: LARGEST_WINDOW_LOG}
        return _Decoded(path, lambda stored: zstd.open(stored, "rb", options=options))
    return open(path, "rb")


class _Decoded(io.BufferedReader):
    """A compressed file as its decoded bytes. Raises DataError for one that decodes to absurdly many: a file of 13 MB
    could hold 13 GB of one letter."""

    def __init__(self, path: Path, decode: Callable[[IO[bytes]], Any]) -> None:
        self._stored = _SmallPieces(path)
        super().__init__(_Counted(path, self._stored, decode(self._stored)), 1 << 18)

    def close(self) -> None:
        super().close()
        self._stored.close()


class _SmallPieces(io.FileIO):
    """Gives at most 16 kB at a time, however much a decoder asks for: what was read says how much may be decoded."""

    def read(self, size: int | None = -1, /) -> Any:
        return super().read(size if size is None or size < 0 else min(size, 1 << 14))


class _Counted(io.RawIOBase):
    def __init__(self, path: Path, stored: io.FileIO, decoded: Any) -> None:
        self._path, self._stored, self._decoded, self._count = path, stored, decoded, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got: int = self._decoded.readinto(buffer)
        self._count += got
        if self._count > _MOST_EXPANSION * self._stored.tell() + _ANY_EXPANSION:
            raise DataError(
                f"{self._path}: expected text, which compresses to a tenth or so; its first {self._stored.tell():,} "
                f"bytes decode to {self._count:,}"
            )
        return got

    def close(self) -> None:
        self._decoded.close()
        super().close()


def _lines(handle: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file. Raises DataError for one that is longer than any document."""
    while line := handle.readline(MOST_DOCUMENT_BYTES + 1):
        _refuse_long(len(line), path)
        yield line


def _refuse_long(size: int, path: Path) -> None:
    if size > MOST_DOCUMENT_BYTES:
        raise DataError(
            f"{path}: expected documents of at most {MOST_DOCUMENT_BYTES >> 20} MB, got a longer one: split it "
            "(--text-documents line or paragraph splits plain text)"
        )


def _parquet(path: Path, column: str) -> Iterator[RawDocument]:
    """One record per row, empty for null, with a few hundred rows in memory. Messages count rows from 1."""
    import pyarrow
    import pyarrow.parquet
    from pyarrow import types

    try:
        # With a buffer but no pre-buffering, a row group is streamed and not held in memory.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"{path}: expected the column '{column}' of --json-keys, got {', '.join(names)}")
            kind = file.schema_arrow.field(column).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            # A column of nulls only has the type null.
            if not any(is_(kind) for is_ in (types.is_string, types.is_large_string, types.is_null)):
                raise DataError(f"{path}: column '{column}': expected strings, got {kind}; see --json-keys")
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                sizes = [group.column(place) for place in range(group.num_columns)]
                decoded = sum(
                    one.total_uncompressed_size for one in sizes if one.path_in_schema.split(".")[0] == column
                )
                if decoded > _MOST_EXPANSION * path.stat().st_size + _ANY_EXPANSION:
                    raise DataError(f"{path}: row group {number} decodes to {decoded:,} bytes, which no text does")
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    yield RawDocument(value or b"", f"{path}:{row}", None)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} to its end: {error}") from error


def _array_record(path: Path) -> Iterator[RawDocument]:
    """Every record of an array_record file: the bytes of a text, or of token ids. Messages count from 1."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise UsageError(
            "--input", got=path, expected="no array_record files without their library, which is not installed",
            do="pip install 'megatron_prune[array-record]'",
        ) from error  # fmt: skip
    reader = ArrayRecordReader(str(path))
    try:
        count = reader.num_records()
        for first in range(0, count, RECORDS):
            for number, payload in enumerate(reader.read(first, min(first + RECORDS, count)), start=first + 1):
                yield RawDocument(payload, f"{path}:{number}", None)
        reader.close()  # raises what was wrong, if anything was
    except (RuntimeError, IndexError) as error:
        raise DataError(f"cannot read {path} to its end: {' '.join(str(error).split())}") from error


def _pieces(handle: IO[bytes], path: Path, text_documents: str) -> Iterator[tuple[int, bytes]]:
    collected: list[bytes] = []
    size = 0
    if text_documents == "file":
        while block := handle.read(1 << 20):
            collected.append(block)
            size += len(block)
            _refuse_long(size, path)
        yield 1, b"".join(collected)
        return
    start = 1
    for number, line in enumerate(_lines(handle, path), start=1):
        if text_documents == "line":
            if line.strip():
                yield number, line.rstrip(b"\r\n")
        elif line.strip():
            if not collected:
                start, size = number, 0
            collected.append(line)
            size += len(line)
            _refuse_long(size, path)
        elif collected:
            yield start, b"".join(collected)
            collected = []
    if collected:
        yield start, b"".join(collected)


def text_of(record: RawDocument) -> str:
    """The text of a record, empty for null. Raises DataError, naming file and line, if the record is invalid."""
    try:
        if record.json_key is None:
            return record.payload.decode()
        value = json.loads(record.payload)
    except UnicodeDecodeError as error:
        raise DataError(f"{record.origin}: expected UTF-8, got other bytes: {error}") from error
    except (ValueError, RecursionError) as error:  # also numbers with too many digits, or too deep nesting
        raise DataError(f"{record.origin}: expected JSON, got something else: {error}") from error
    text = value.get(record.json_key) if isinstance(value, dict) else None
    if text is None and isinstance(value, dict) and record.json_key in value:
        return ""  # null, which some datasets use for empty text
    if not isinstance(text, str):
        names = ", ".join(show_text(key) for key in sorted(value)[:8]) if isinstance(value, dict) else ""
        found = f"the keys {names}" if isinstance(value, dict) else "something that is not an object"
        raise DataError(f"{record.origin}: expected text under '{record.json_key}', got {found}; see --json-keys")
    if b"\\u" in record.payload:  # only escapes can encode half a surrogate pair, which tokenizers reject
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
