"""Split one source of text, by document, into text for calibration, evaluation (held out) and training.

The hash of a document decides whether it is held out (one in ten). This depends on the text alone, so that perplexities
of pruning runs with other settings are on the same text. Repeated documents are kept once. Held-out documents that are
nearly equal to a document of another part (``contamination``) are dropped.

    FOLDER/{calibration,held_out,train}.jsonl           the documents
    FOLDER/{calibration,held_out,train}.bin .idx .json  the same, tokenized
    FOLDER/text.json                                    what was read and what is in each; written last
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_prune import artifacts
from megatron_prune.data import contamination, hub, local_text, readers
from megatron_prune.data.preprocess import preprocess
from megatron_prune.data.tokenizers import Tokenizer
from megatron_prune.errors import DataError

CALIBRATION, HELD_OUT, TRAIN = "calibration", "held_out", "train"
ONE_OF = 10  # one of this many documents is held out
BATCH = 64  # documents tokenized at a time
DONE = "text.json"


@dataclass(frozen=True)
class Texts:
    """A source of documents: a name to display, an identity (JSON), and the documents in order."""

    name: str
    identity: Any
    documents: Callable[[], Iterator[str]]


def of_files(paths: Sequence[str | Path], json_key: str = "text", text_documents: str = "file") -> Texts:
    """JSON lines, Parquet or plain text, also compressed. Raises UsageError for a missing or unknown file."""
    files = [readers.File(path, json_key, "auto", text_documents) for path in readers.check_inputs(paths)]

    def documents() -> Iterator[str]:
        return (readers.text_of(record) for file in files for record in file.records())

    name = ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return Texts(name, [file.identity() for file in files], documents)


def of_dataset(dataset: str, split: str = "train", column: str = "text") -> Texts:
    """``NAME[:CONFIG]`` on the Hugging Face Hub, or a local folder, streamed. Raises UsageError and DataError."""
    shards = hub.shards(dataset, split, column)

    def documents() -> Iterator[str]:
        return (readers.text_of(record) for shard in shards for record in shard.records())

    return Texts(f"data set {dataset} ({split})", [shard.identity() for shard in shards], documents)


def of_this_machine() -> Texts:
    """English text on this machine: Python's manual, documentation and docstrings of installed packages."""

    def documents() -> Iterator[str]:
        return (found.text for found in local_text.clean(local_text.gather(local_text.TextPlaces()), Counter()))

    name = "English text of this machine (Python's manual, documentation and docstrings of installed packages)"
    return Texts(name, "this machine", documents)


def prepare(
    texts: Texts, folder: Path, tokenizer: Tokenizer, wanted: Mapping[str, int], *, workers: int = 1
) -> dict[str, Any]:
    """Split and tokenize; returns the content of ``text.json``. ``wanted``: tokens per part, at which reading ends.

    A part with no wanted tokens is not made. Too few tokens are not an error: see ``tokens`` of each part. A killed
    run starts again from the beginning. Raises DataError if a part would be empty.
    """
    if (folder / DONE).is_file():
        found: dict[str, Any] = artifacts.read_json(folder / DONE)
        return found
    folder.mkdir(parents=True, exist_ok=True)
    divided = _divide(texts, folder, tokenizer, wanted)
    for part in divided["parts"]:
        _tokenize(folder, part, tokenizer, workers)
    alike = _alike(folder, [part for part in divided["parts"] if part != HELD_OUT])
    if alike:
        _drop(folder / f"{HELD_OUT}.jsonl", alike)
        (folder / f"{HELD_OUT}.json").unlink()
        _tokenize(folder, HELD_OUT, tokenizer, workers)
    sidecars = {part: artifacts.read_json(folder / f"{part}.json") for part in divided["parts"]}
    made = {
        "version": 1,
        "name": texts.name,
        "read": divided["read"],
        "left_out": {"repeated": divided["repeated"], "held_out_but_alike": len(alike)},
        "parts": {part: {key: found[key] for key in ("documents", "tokens")} for part, found in sidecars.items()},
    }
    artifacts.write_json(folder / DONE, made)
    return made


def is_held_out(text: str) -> bool:
    """Whether a document is held out, independent of its position."""
    return _digest(text)[0] < -(-256 // ONE_OF)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _divide(texts: Texts, folder: Path, tokenizer: Tokenizer, wanted: Mapping[str, int]) -> dict[str, Any]:
    """Write the documents of each part: held-out ones by hash, the others to calibration until it has its tokens."""
    parts = [part for part in (CALIBRATION, HELD_OUT, TRAIN) if wanted.get(part)]
    tokens = dict.fromkeys(parts, 0)
    end = int(tokenizer.eod is not None)
    read = repeated = 0
    seen: set[bytes] = set()
    documents = texts.documents()
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[str]] = {
            part: stack.enter_context(open(folder / f"{part}.jsonl", "w", encoding="utf-8")) for part in parts
        }
        while any(tokens[part] < wanted[part] for part in parts):
            batch = list(itertools.islice(documents, BATCH))
            if not batch:
                break
            read += len(batch)
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                if not len(ids):
                    continue
                digest = _digest(text)
                if digest in seen:
                    repeated += 1
                    continue
                seen.add(digest)
                part = HELD_OUT if is_held_out(text) else _next(parts, tokens, wanted)
                if part in files:
                    tokens[part] += len(ids) + end
                    files[part].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    if empty := [part for part in parts if not tokens[part]]:
        raise DataError(
            f"{texts.name}: {read - repeated} different documents are too few: none is left for "
            f"{' and '.join(name.replace('_', '-') for name in empty)}; provide more text (one document in {ONE_OF} is "
            "held out), or split plain text files into documents with --text-documents paragraph"
        )
    return {"parts": parts, "read": read, "repeated": repeated}


def _next(parts: Sequence[str], tokens: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    """The part for a document that is not held out: calibration first, then training; "" if both are full."""
    for part in (CALIBRATION, TRAIN):
        if part in parts and tokens[part] < wanted[part]:
            return part
    return ""


def _tokenize(folder: Path, part: str, tokenizer: Tokenizer, workers: int) -> None:
    append_eod = tokenizer.eod is not None
    preprocess([folder / f"{part}.jsonl"], folder / part, tokenizer, append_eod=append_eod, workers=workers)


def _alike(folder: Path, others: Sequence[str]) -> set[int]:
    """Numbers of the held-out documents with an exact or near duplicate in another part."""
    held = folder / HELD_OUT
    found: set[int] = set()
    for part in others:
        found |= {twin for _, twin in contamination.shared_documents(folder / part, held)}
        found |= {pair.held_out for pair in contamination.near_duplicates(folder / part, held)}
    return found


def _drop(path: Path, numbers: set[int]) -> None:
    """Remove documents from a JSON Lines file, by number. Raises DataError if none would be left."""
    lines = path.read_bytes().splitlines(keepends=True)  # bytes: str.splitlines also splits at other characters
    kept = [line for number, line in enumerate(lines) if number not in numbers]
    if not kept:
        raise DataError(
            f"expected held-out documents that are not in the calibration text, got near duplicates of it in all "
            f"{len(lines)}: provide other text"
        )
    artifacts.write_bytes(path, b"".join(kept))
