"""Reading the index of a large checkpoint: processor seconds of one thread, and the memory that it takes at its peak.

An 8B model at TP2 x DP64 has an optimizer of about 31,000 shards, a 70B model at TP8 x DP64 of about 250,000. Each row
is a new process: our opener (which checks the index), and after it Megatron's reader of the same index, which torch
calls once per load. Memory is what the process takes more than before.

    python tests/benchmarks/large_index.py [SHARDS ...] [--real]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def measure(root: Path, megatron: bool) -> None:
    """Print what opening the checkpoint ``root``, and Megatron's reading of it, takes in this process."""
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.engine import safe_loading

    safe_loading.install_index_reader(setattr)
    safe_loading._planning()  # imports Megatron
    reads = [lambda: open_checkpoint(root)] + [lambda: FileSystemReader(root / "release").read_metadata()] * megatron
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    held, before, took = [], _status("VmRSS"), []
    for read in reads:
        began = time.thread_time()
        held.append(read())
        took.append(time.thread_time() - began)
    print(
        f"{' and '.join(f'{seconds:.1f} s' for seconds in took)}, {(_status('VmHWM') - before) / 2**20:,.0f} MiB",
        flush=True,
    )


def _status(field: str) -> int:
    """A line of this process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) << 10


def main() -> None:
    from tests.checkpoint import many_shards

    counts = [int(word) for word in sys.argv[1:] if word != "--real"] or [31_000, 250_000]
    for shards in counts:
        with tempfile.TemporaryDirectory() as folder:
            root = many_shards.write(Path(folder, "checkpoint"), shards, real="--real" in sys.argv)
            size = (root / "release" / ".metadata").stat().st_size
            print(f"{shards:,} shards, an index of {size / 2**20:.1f} MiB", flush=True)
            for megatron in (False, True):
                print("  opened" + " and loaded" * megatron, end=": ", flush=True)
                subprocess.run([sys.executable, __file__, "--measure", str(root), str(int(megatron))], check=True)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(Path(sys.argv[2]), sys.argv[3] == "1")
    else:
        main()
