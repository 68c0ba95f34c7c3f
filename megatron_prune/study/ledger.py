"""ledger.jsonl: one line a finished cell, appended whole or not at all.

A line is written by one ``write`` on a descriptor opened for appending and is on disk before the
runner goes on. A kill in the middle of it can only tear the last line: a torn line is one that does
not end in a newline; it is cut off before the next append, and never read. Anything else that is
not a record is an error, since nobody but us writes here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_prune.errors import RunError


class Ledger:
    """The records of a study's finished cells, by cell."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(self) -> dict[str, dict[str, Any]]:
        """All whole records, in the order in which they were appended; a torn last line is left out."""
        whole, _ = self._split()
        records: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.decode(errors="replace").splitlines(), start=1):
            try:
                record = json.loads(line)
                cell = record["cell"]
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise RunError(
                    f"{self.path}, line {number} is not a record of a cell: it was changed by hand; "
                    "remove the file to have it made again from the cells"
                ) from error
            if cell in records:
                raise RunError(
                    f"{self.path}, line {number}: cell {cell} is there twice; remove the file to have "
                    "it made again from the cells"
                )
            records[cell] = record
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a cell's record; a torn last line is removed first."""
        whole, torn = self._split()
        line = (json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if torn:
                os.ftruncate(descriptor, len(whole))
            if os.write(descriptor, line) != len(line):
                raise RunError(f"{self.path}: the disk took only a part of a line; free some space and run again")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _split(self) -> tuple[bytes, bytes]:
        """The file up to its last newline, and what lies behind it."""
        if not self.path.exists():
            return b"", b""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        return content[:end], content[end:]
