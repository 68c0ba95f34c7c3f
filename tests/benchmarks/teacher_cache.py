"""What a teacher's cache costs: bytes per token, tokens per second of ``teach`` and of reading, a step that reads it.

A student of the teacher's shape, bf16, 4,096 tokens per step. The time of a step is the median that Megatron's log
reports over a run, after the first steps. Limit of the upper end of the ratio of an offline step to a plain one: 1.05.
Samples are read in random order from memory-mapped files that this process has not read before; the files are in the
page cache, since they have just been written.

    python tests/benchmarks/teacher_cache.py [--pairs 10] [--json figures.json]
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.launch import launch, start  # noqa: E402
from megatron_prune.training.teacher_cache import open_cache  # noqa: E402
from tests import tiny  # noqa: E402
from tests.benchmarks import ratio  # noqa: E402
from tests.benchmarks.masked_training import BATCH, FLAGS, SEQUENCE  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus, step_milliseconds  # noqa: E402

LIMIT = 1.05


def measured(argv: list[str], log: Path, threads: str) -> str:
    """The output of a verb that succeeds."""
    code = launch(argv, log=log, env={"OMP_NUM_THREADS": threads})
    if code:
        raise SystemExit(f"{argv[0]} exited with {code}:\n{log.read_text()[-4000:]}")
    return log.read_text()


def reading(cache: Path) -> float:
    """Tokens per second of reading and checking every sample once, in random order."""
    found = open_cache(cache)
    first, end = found.taught.range
    order = np.random.default_rng(0).permutation(np.arange(first, end))
    began = time.perf_counter()
    for sample in order:
        found.read(int(sample))
    return found.taught.tokens / (time.perf_counter() - began)


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: 20)")
    parser.add_argument("--top-k", type=int, default=64, help="words per token (default: 64)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the model; the text has 379 (default: 4096)")
    args = parser.parse_args()
    threads = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, args.steps * BATCH * SEQUENCE)
        where = FLAGS.index(str(tiny.VOCABULARY))
        flags = [*FLAGS[:where], str(args.vocabulary), *FLAGS[where + 1 :]]
        stream = ["--train-data-path", str(corpus), "--data-cache-path", str(folder / "cache")]
        samples = args.steps * BATCH
        first = ["pretrain", *flags, *stream, "--stream-range", f"0:{BATCH}", "--save", str(folder / "teacher")]
        measured(first, folder / "teacher.log", threads)
        teach = ["teach", "--load", str(folder / "teacher"), *stream, "--seq-length", str(SEQUENCE)]
        teach += ["--stream-range", f"0:{samples}", "--top-k", str(args.top_k), "--output", str(folder / "taught")]
        said = measured([*teach, "--micro-batch-size", str(BATCH)], folder / "teach.log", threads)
        taught = open_cache(folder / "taught").taught
        stored = sum(path.stat().st_size for path in (folder / "taught").iterdir())
        speed = float(re.search(r"([\d,]+) tokens/s", said)[1].replace(",", ""))  # type: ignore[index]
        read = reading(folder / "taught")

        def measure(kind: str, *more: str) -> float:
            shutil.rmtree(folder / kind, ignore_errors=True)
            log = folder / f"{kind}.log"
            log.unlink(missing_ok=True)
            argv = ["pretrain", *flags, *stream, "--stream-range", f"0:{samples}", "--save", str(folder / kind), *more]
            return step_milliseconds(start(argv, log=log, env={"OMP_NUM_THREADS": threads}), log)

        found = ratio.interleaved(
            "step time, offline distillation / plain (ms)",
            lambda: measure("offline", "--objective", "distill", "--teacher-cache", str(folder / "taught")),
            lambda: measure("plain"),
            pairs=args.pairs,
            limit=LIMIT,
        )
    facts = {
        "bytes_per_token": taught.bytes_per_token, "stored_bytes_per_token": stored / taught.tokens,
        "teach_tokens_per_second": speed, "read_tokens_per_second": read,
    }  # fmt: skip
    print(", ".join(f"{name.replace('_', ' ')}: {value:,.4g}" for name, value in facts.items()))
    return ratio.finish(
        [found], args, flags=flags, steps=args.steps, threads=threads, top_k=args.top_k, vocabulary=args.vocabulary,
        **facts,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
