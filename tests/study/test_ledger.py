"""The ledger: after a kill, whole records stay and a partial last line is dropped."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from megatron_prune import artifacts
from megatron_prune.errors import RunError
from megatron_prune.study.evidence import Ledger

RECORDS = [{"cell": f"c{n}", "loss": n / 3, "name": "grün"} for n in range(3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "study" / "ledger.jsonl"  # neither folder is there
    for record in RECORDS:
        Ledger(path).append(record)
    return path


def test_reads_what_was_appended_in_order(path: Path) -> None:
    assert list(Ledger(path).read().values()) == RECORDS
    assert Ledger(path.parent / "none.jsonl").read() == {}


def test_any_torn_last_line_is_dropped_and_mended(path: Path) -> None:
    whole = path.read_bytes()
    last = whole[: whole[:-1].rfind(b"\n") + 1]
    for length in range(len(last), len(whole)):
        path.write_bytes(whole[:length])
        assert list(Ledger(path).read().values()) == RECORDS[:2]
        Ledger(path).append(RECORDS[2])
        assert path.read_bytes() == whole


def test_appending_never_rewrites_earlier_lines(path: Path) -> None:
    before = path.read_bytes()
    Ledger(path).append({"cell": "c3"})
    assert path.read_bytes().startswith(before)


def test_what_a_full_disk_refuses_is_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write, tries = path.read_bytes(), os.write, []

    def half(descriptor: int, line: bytes) -> int:
        tries.append(line)
        return write(descriptor, line[: len(line) // 2] if len(tries) < full else line)

    monkeypatch.setattr(artifacts, "BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(os, "write", half)
    full = 3
    Ledger(path).append({"cell": "c3"})
    assert path.read_bytes() == before + b'{"cell": "c3"}\n' and len(tries) == 3
    full, tries[:] = 99, []
    with pytest.raises(RunError, match="could not be written: .*free some space.*; the record of c4 is in"):
        Ledger(path).append({"cell": "c4"})
    assert list(Ledger(path).read()) == ["c0", "c1", "c2", "c3"] and len(tries) == artifacts.TRIES


def test_a_loss_that_is_not_finite_is_not_written(path: Path) -> None:
    """JSON has no word for it: another program could not read the line."""
    before = path.read_bytes()
    with pytest.raises(ValueError):
        Ledger(path).append({"cell": "c3", "loss": math.nan})
    assert path.read_bytes() == before


def test_a_cell_that_is_made_again_has_a_line_each_time_and_the_last_counts(path: Path) -> None:
    Ledger(path).append({"cell": "c1", "loss": 7.0})
    assert list(Ledger(path).read()) == ["c0", "c1", "c2"] and Ledger(path).read()["c1"]["loss"] == 7.0
    assert Ledger(path).replaced() == [RECORDS[1]]


@pytest.mark.parametrize(
    "line",
    [b"{oops\n", b"[]\n", b'{"loss": 1}\n', b'{"cell": 7}\n', b'{"cell": "c", "tokens": "7"}\n', b"\xff\n",
     b'{"cell": "c", "test_loss": NaN}\n', b'{"cell": "c", "seconds": []}\n', b"[" * 100_000 + b"\n",
     b'{"cell": "c", "flops": ' + b"9" * 5000 + b"}\n"],
)  # fmt: skip
def test_a_line_that_is_not_ours_is_an_error(path: Path, line: bytes) -> None:
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(RunError, match=r"ledger\.jsonl, line 4"):
        Ledger(path).read()
