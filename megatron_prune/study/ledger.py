"""ledger.jsonl: one line a finished cell, appended whole or not at all.

A line is written by one ``write`` on a descriptor opened for appending and is on disk before the
runner goes on. A kill in the middle of it can only tear the last line: a torn line is one that does
not end in a newline; it is cut off before the next append, and never read. Anything else that is
not a record is an error, since nobody but us writes here.

The ledger is a diary, not the source: what a report shows is read from the artifacts of the cells each time
(``evidence``), and a line that says something else is named. A cell that was made again has a line each time; the
last one counts, and the others stay as a trace.
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
        """The last record of every cell, in the order in which the cells were first appended."""
        return {record["cell"]: record for record in self.lines()}

    def replaced(self) -> list[dict[str, Any]]:
        """Records of cells that have been made again since."""
        lines = self.lines()
        last = {record["cell"]: number for number, record in enumerate(lines)}
        return [record for number, record in enumerate(lines) if number != last[record["cell"]]]

    def lines(self) -> list[dict[str, Any]]:
        """All whole records, in the order in which they were appended; a torn last line is left out."""
        whole, _ = self._split()
        records: list[dict[str, Any]] = []
        for number, line in enumerate(whole.decode(errors="replace").splitlines(), start=1):
            try:
                record = json.loads(line)
                _ = record["cell"]
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise RunError(
                    f"{self.path}, line {number} is not a record of a cell: it was changed by hand; "
                    "remove the file to have it made again from the cells"
                ) from error
            records.append(record)
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
