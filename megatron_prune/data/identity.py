"""A corpus's identity: the content decides, not the path, so it is the same on every machine, and a corpus that was
made anew under an old name is another corpus. Nothing here imports Megatron.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

# A file of up to BLOCKS * BLOCK_BYTES is hashed whole, a larger one at evenly spaced blocks: what
# is asked of a fingerprint is to tell corpora apart in milliseconds on terabytes, on every rank.
BLOCKS = 256
BLOCK_BYTES = 64 * 1024


def fingerprint(prefix: str | Path) -> str:
    """Identity of a corpus's content, 64 hex digits: sizes and evenly spaced blocks of both files.

    Reads at most 32 MB. Small corpora are hashed whole; in a large one a change of a few tokens can
    go unseen (the sidecar's ``bin_sha256`` is there for that), another corpus cannot.
    """
    digest = hashlib.sha256(b"megatron_prune corpus 1")
    for suffix in (".idx", ".bin"):
        path = Path(f"{prefix}{suffix}")
        size = path.stat().st_size
        digest.update(f"{suffix} {size}\n".encode())
        with open(path, "rb") as handle:
            if size <= BLOCKS * BLOCK_BYTES:
                digest.update(handle.read())
                continue
            for block in range(BLOCKS):
                handle.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()
