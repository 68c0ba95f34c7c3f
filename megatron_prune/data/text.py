"""Raw text on disk as records: JSONL and plain text, gzip or not, read in order and without decoding.

A record is the bytes of one document: a JSON line, or a piece of a text file. ``text_of`` turns it into
text; that is the expensive half, left to the worker processes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_prune.errors import DataError, UsageError

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
FORMATS = ("auto", "jsonl", "text")
DOCUMENTS = ("file", "paragraph", "line")


@dataclass(frozen=True)
class Record:
    """One document as it lies on disk; ``origin`` says where, for error messages."""

    payload: bytes
    origin: str
    json_key: str | None  # None for plain text


def is_jsonl(path: Path, input_format: str) -> bool:
    """Whether a file holds JSON lines: as ``--input-format`` says, or by its name before ``.gz``."""
    if input_format != "auto":
        return input_format == "jsonl"
    return path.name.removesuffix(".gz").endswith(JSONL_SUFFIXES)


def check_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """The input files as paths; UsageError when one is missing or none is given."""
    paths = [Path(name) for name in inputs]
    if not paths:
        raise UsageError("--input", given="nothing", allowed="one or more files")
    for path in paths:
        if not path.is_file():
            raise UsageError("--input", given=path, allowed="existing files of JSON lines or text")
    return paths


def records(
    inputs: Sequence[Path],
    *,
    json_key: str = "text",
    input_format: str = "auto",
    text_documents: str = "file",
) -> Iterator[Record]:
    """Every record of the inputs, in order. Blank lines are no records.

    A plain text file is one document (``file``), or one a paragraph (separated by blank lines), or one
    a line. Raises DataError for a broken gzip file.
    """
    for path in inputs:
        try:
            with _open(path) as handle:
                if is_jsonl(path, input_format):
                    for number, line in enumerate(handle, start=1):
                        if line.strip():
                            yield Record(line, f"{path}:{number}", json_key)
                else:
                    for number, piece in _pieces(handle, text_documents):
                        yield Record(piece, f"{path}:{number}", None)
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise DataError(f"cannot read {path} to its end: {error}") from error


def _open(path: Path) -> IO[bytes]:
    """The magic number decides, not the name."""
    with open(path, "rb") as handle:
        zipped = handle.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else open(path, "rb")  # type: ignore[return-value]


def _pieces(handle: IO[bytes], text_documents: str) -> Iterator[tuple[int, bytes]]:
    if text_documents == "file":
        yield 1, handle.read()
        return
    collected: list[bytes] = []
    start = 1
    for number, line in enumerate(handle, start=1):
        if text_documents == "line":
            if line.strip():
                yield number, line.rstrip(b"\r\n")
        elif line.strip():
            if not collected:
                start = number
            collected.append(line)
        elif collected:
            yield start, b"".join(collected)
            collected = []
    if collected:
        yield start, b"".join(collected)


def text_of(record: Record) -> str:
    """The text of a record; DataError names the file and line when it is not what it should be."""
    try:
        if record.json_key is None:
            return record.payload.decode()
        value = json.loads(record.payload)
    except UnicodeDecodeError as error:
        raise DataError(f"{record.origin} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{record.origin} is not JSON: {error}") from error
    text = value.get(record.json_key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = f"its keys: {', '.join(sorted(value))}" if isinstance(value, dict) else "it is not an object"
        raise DataError(f"{record.origin} has no text under '{record.json_key}' ({found}): see --json-keys")
    if b"\\u" in record.payload:  # the one way to smuggle half a surrogate pair in; no tokenizer takes it
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
