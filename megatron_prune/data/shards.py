"""Resumable tokenizing: one part on disk per input, merged when all are finished.

``preprocess`` writes the tokens of every input (a file, or a shard of a dataset) to a part in a hidden
folder next to the output. A part is finished once its manifest exists. Its name is a hash of the input's
identity and of every setting, so a part of other text or another tokenizer is never reused. The merge
reads the parts in input order, so the result does not depend on interruptions.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune import artifacts
from megatron_prune.claims import owner, refusal
from megatron_prune.data.indexed import write_index
from megatron_prune.errors import DataError

COPY_BYTES = 1 << 22
SUFFIXES = (".bin", ".npz", ".json")  # in writing order: the manifest, last, marks the others complete


class Parts:
    """The parts of one output prefix, locked by one process at a time. Use it as a context manager.

    On exit, the folder is removed unless it holds finished parts that were not published.
    """

    def __init__(self, prefix: Path):
        self.prefix = prefix
        self.folder = prefix.parent / f".{prefix.name}.corpus{artifacts.PARTIAL}parts"

    def __enter__(self) -> Parts:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "a+b")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._lock.seek(0)
                held = self._lock.read(1 << 12)
                self._lock.close()
                raise DataError(refusal(self.prefix, self.folder / "lock", held, sure=True)) from error
            # Without file locks, it is up to the user not to run two processes with one prefix.
        self._lock.truncate(0)
        self._lock.write(owner())
        self._lock.flush()
        return self

    def __exit__(self, *_: object) -> None:
        if not any(self.folder.glob("*.json")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def keep(self, keys: Sequence[str]) -> set[str]:
        """The keys whose parts are finished. Removes all other files of earlier runs."""
        finished = {key for key in keys if self._is_whole(key)}
        for path in self.folder.iterdir():
            if path.name != "lock" and not (path.stem in finished and path.suffix in SUFFIXES):
                path.unlink()
        return finished

    def _is_whole(self, key: str) -> bool:
        try:
            manifest = artifacts.read_json(self.folder / f"{key}.json")
            return (self.folder / f"{key}.bin").stat().st_size == manifest["bytes"] and (
                self.folder / f"{key}.npz"
            ).is_file()
        except Exception:  # a damaged part is made again
            return False

    def manifest(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = artifacts.read_json(self.folder / f"{key}.json")
        return found

    def merge(self, keys: Sequence[str], dtype: str) -> str:
        """Join the parts, in this order, to ``merged.bin`` and ``merged.idx``; returns SHA-256 of the ``.bin``."""
        sequences, documents = [], []
        for key in keys:
            with np.load(self.folder / f"{key}.npz") as lengths:
                sequences.append(lengths["sequences"])
                documents.append(lengths["documents"])
        write_index(self.folder / "merged.idx", sequences, documents, dtype)
        if len(keys) == 1:
            os.rename(self.folder / f"{keys[0]}.bin", self.folder / "merged.bin")
            digest = str(self.manifest(keys[0])["sha256"])
        else:
            digest = self._join(keys)
        for suffix in (".bin", ".idx"):
            with open(self.folder / f"merged{suffix}", "rb") as handle:
                os.fsync(handle.fileno())
        return digest

    def _join(self, keys: Sequence[str]) -> str:
        digest = hashlib.sha256()
        with open(self.folder / "merged.bin", "wb") as joined:
            for key in keys:
                with open(self.folder / f"{key}.bin", "rb") as part:
                    while block := part.read(COPY_BYTES):
                        digest.update(block)
                        joined.write(block)
        return digest.hexdigest()

    def publish(self, sidecar: dict[str, Any]) -> None:
        """Replace the corpus at the prefix with the merged one, and delete the parts.

        The old index is removed first and the new one written after its ``.bin``, because a ``.bin`` without
        an ``.idx`` is not mistaken for a corpus.
        """
        artifacts.write_json(self.folder / "merged.sidecar", sidecar)
        for suffix in (".json", ".idx"):
            Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)
        for name, suffix in (("bin", ".bin"), ("idx", ".idx"), ("sidecar", ".json")):
            os.replace(self.folder / f"merged.{name}", f"{self.prefix}{suffix}")
        shutil.rmtree(self.folder)


class PartWriter:
    """Writes one part, which is complete after ``finish``."""

    def __init__(self, parts: Parts, key: str):
        self._stem = parts.folder / key
        self._file = open(f"{self._stem}.bin", "wb")
        self._digest = hashlib.sha256()
        self._sequences: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self.counts = {"documents": 0, "sequences": 0, "tokens": 0, "empty": 0, "raw_bytes": 0}

    def add(self, tokens: np.ndarray, sequences: np.ndarray, documents: np.ndarray, empty: int, raw_bytes: int) -> None:
        """Append documents: their tokens, the length of each sequence, the number of sequences per document."""
        payload = tokens.tobytes()
        self._file.write(payload)
        self._digest.update(payload)
        self._sequences.append(sequences.astype(np.int32))
        self._documents.append(documents.astype(np.int32))
        found = {"documents": len(documents), "sequences": len(sequences), "tokens": len(tokens)}
        for name, value in (found | {"empty": empty, "raw_bytes": raw_bytes}).items():
            self.counts[name] += value

    def finish(self) -> None:
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        payload = io.BytesIO()
        nothing = [np.empty(0, np.int32)]
        np.savez(
            payload,
            sequences=np.concatenate(self._sequences or nothing),
            documents=np.concatenate(self._documents or nothing),
        )
        artifacts.write_bytes(f"{self._stem}.npz", payload.getvalue())
        artifacts.write_json(f"{self._stem}.json", self.counts | {"bytes": size, "sha256": self._digest.hexdigest()})

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
            os.unlink(self._file.name)
