"""Files written past the page cache are complete, wherever buffers end and whatever the file system supports."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_prune.checkpoint import record

BUFFER = 8192


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BUFFER_BYTES", BUFFER)


def write(path: Path, lengths: tuple[int, ...]) -> bytes:
    file, given = record.DirectFile(path), [os.urandom(length) for length in lengths]
    for segment in given:
        file.write(memoryview(segment))
    file.close()
    return b"".join(given)


@pytest.mark.parametrize("lengths", [(), (1,), (BUFFER,), (0, BUFFER - 1, 2), (5, 3 * BUFFER, 7), (4096, 100000)])
def test_the_file_holds_what_was_written(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        record.DirectFile(tmp_path / "file")
    expected = write(tmp_path / "new", lengths)
    assert (tmp_path / "new").read_bytes() == expected


@pytest.mark.parametrize("when", ["asked", "written"])
def test_a_file_system_without_direct_writes_gets_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real_control, real_write, refused = record.fcntl.fcntl, os.write, []

    def control(handle: int, command: int, flags: int = 0) -> int:
        if when == "asked" and command == record.fcntl.F_SETFL and flags & os.O_DIRECT:
            refused.append(flags)
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real_control(handle, command, flags)

    def write_some(handle: int, data: memoryview) -> int:
        if when == "written" and real_control(handle, record.fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real_write(handle, data[:5000])  # and shorter than its input

    monkeypatch.setattr(record.fcntl, "fcntl", control)
    monkeypatch.setattr(os, "write", write_some)
    expected = write(tmp_path / "new", (3, 5 * BUFFER, 77))
    assert refused and (tmp_path / "new").read_bytes() == expected


def test_a_failed_write_is_raised_and_everything_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = len(os.listdir("/proc/self/fd"))
    files = record.RecordFiles(tmp_path)
    monkeypatch.setattr(os, "write", full)
    files.append(record.object_record, {"a": os.urandom(3 * BUFFER)})
    with pytest.raises(OSError, match="No space left"):
        files.close()
    files.shutdown()
    assert not files.hashes and len(os.listdir("/proc/self/fd")) == before
