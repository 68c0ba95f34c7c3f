"""Reading zstd files to their true end.

``zstandard``'s own stream reader takes a file that is cut off for a file that ends: half a shard would
become a corpus without a word. Here every frame must be whole.
"""

from __future__ import annotations

import io
from collections.abc import Buffer
from pathlib import Path
from typing import IO

ZSTD_MAGIC = 0xFD2FB528
SKIPPABLE_MAGIC = 0x184D2A50  # to …5F: a frame without content, as pzstd writes before each of its own
COMPRESSED_BYTES = 1 << 16  # that are read at a time; what they expand to is in memory
LARGEST_WINDOW = 1 << 31  # `zstd --long=31`, as some published shards need


def is_zstd(head: bytes) -> bool:
    """Whether a file that begins with these four bytes is one of zstd frames."""
    magic = int.from_bytes(head[:4], "little")
    return magic == ZSTD_MAGIC or magic & ~0xF == SKIPPABLE_MAGIC


class ZstdFile(io.RawIOBase):
    """The decompressed bytes of a file of one or more zstd frames; use ``ZstdFile.open``."""

    def __init__(self, path: str | Path):
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._file = open(path, "rb")
        self._frame = self._decompressor.decompressobj()
        self._inside = False  # a frame has begun and has not ended
        self._ready = memoryview(b"")

    @staticmethod
    def open(path: str | Path) -> IO[bytes]:
        """A buffered reader; it raises EOFError when the file ends inside a frame, OSError when it is broken."""
        return io.BufferedReader(ZstdFile(path), 1 << 20)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        while not self._ready:
            compressed = self._file.read(COMPRESSED_BYTES)
            if not compressed:
                if self._inside:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._ready = memoryview(self._decompress(compressed))
        view = memoryview(buffer).cast("B")
        size = min(len(view), len(self._ready))
        view[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _decompress(self, compressed: bytes) -> bytes:
        pieces = []
        try:
            while compressed:
                pieces.append(self._frame.decompress(compressed))
                self._inside, compressed = not self._frame.eof, b""
                if self._frame.eof:
                    compressed = self._frame.unused_data
                    self._frame = self._decompressor.decompressobj()
        except self._error as error:
            raise OSError(str(error)) from error
        return b"".join(pieces)

    def close(self) -> None:
        self._file.close()
        super().close()
