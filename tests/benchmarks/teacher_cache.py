"""What a teacher's cache costs: bytes per token, tokens per second of ``teach`` and of reading, a step that reads it.

The same flags, samples and machine as in ``distillation.py``: 4,096 tokens per step, a teacher of the student's shape.
A step is Megatron's ``train_step`` in processor seconds of one thread, with ``--num-workers 0``, so that a sample's
targets are read and checked in it. A run that reads a cache and a plain one go on at the same time; a pair is the same
step of both. Limit of the upper end of the ratio: 1.05. Tokens per second are of one thread's processor time too; those
of ``teach`` are of its loop, with the loading of the model. Samples are read in random order from memory-mapped files
that this process has not read before; the files are in the page cache, since they have just been written.

    python tests/benchmarks/teacher_cache.py [--pairs 10] [--json figures.json]
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.launch import Job  # noqa: E402
from megatron_prune.training.teacher_cache import open_cache  # noqa: E402
from tests.benchmarks import ratio, step_seconds  # noqa: E402
from tests.benchmarks.distillation import FLAGS  # noqa: E402
from tests.benchmarks.masked_training import BATCH, SEQUENCE  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus  # noqa: E402
from tests.benchmarks.step_seconds import WARM_UP_STEPS  # noqa: E402

LIMIT = 1.05


def run(argv: list[str], times: Path) -> int:
    """``pretrain`` in this rank, which writes what each step took."""
    from megatron.training import training

    from megatron_prune.__main__ import main

    training.train_step = step_seconds.timed(training.train_step, functools.partial(step_seconds.write, times))
    return main(["pretrain", *argv])


def teach(argv: list[str], times: Path) -> int:
    """``teach`` in this rank, which writes what its samples took."""
    from megatron_prune.__main__ import main
    from megatron_prune.training import teach as verb

    verb._write = step_seconds.timed(verb._write, functools.partial(step_seconds.write, times))
    return main(["teach", *argv])


def reading(cache: Path) -> float:
    """Tokens per second of reading and checking every sample once, in random order."""
    found = open_cache(cache)
    first, end = found.taught.range
    order = np.random.default_rng(0).permutation(np.arange(first, end))
    began = time.process_time()
    for sample in order:
        found.read(int(sample))
    return found.taught.tokens / (time.process_time() - began)


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--top-k", type=int, default=64, help="words per token (default: 64)")
    args = parser.parse_args()
    steps = args.pairs + WARM_UP_STEPS
    from tests.benchmarks import teacher_cache  # under a name by which a rank can import it

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, steps * BATCH * SEQUENCE)
        stream = ["--train-data-path", str(corpus), "--data-cache-path", str(folder / "cache")]
        flags = [*FLAGS, *stream, "--no-save-optim", "--num-workers", "0"]

        def begin(name: str, count: int, *more: str) -> Job:
            argv = [*flags, "--stream-range", f"0:{count * BATCH}", "--save", str(folder / name), *more]
            return step_seconds.begin(folder, name, functools.partial(teacher_cache.run, argv))

        with begin("teacher", 1) as job:
            step_seconds.end(folder, "teacher", job)
        given = ["--load", str(folder / "teacher"), *stream, "--seq-length", str(SEQUENCE), "--top-k", str(args.top_k)]
        given += ["--stream-range", f"0:{steps * BATCH}", "--micro-batch-size", str(BATCH)]
        given += ["--output", str(folder / "taught")]
        with step_seconds.begin(folder, "teach", functools.partial(teacher_cache.teach, given)) as job:
            [[taught_in]] = step_seconds.end(folder, "teach", job, skip=0)
        taught = open_cache(folder / "taught").taught
        stored = sum(path.stat().st_size for path in (folder / "taught").iterdir())
        read = reading(folder / "taught")
        distilled = ["--objective", "distill", "--teacher-cache", str(folder / "taught"), "--distill-alpha", "0.5"]
        with begin("offline", steps, *distilled) as offline, begin("plain", steps) as plain:
            a, b = (
                [seconds for (seconds,) in step_seconds.end(folder, name, job)]
                for name, job in (("offline", offline), ("plain", plain))
            )
    found = ratio.summarise("processor time of a step, from a cache / plain (s)", a, b, LIMIT)
    facts = {
        "bytes_per_token": taught.bytes_per_token, "stored_bytes_per_token": stored / taught.tokens,
        "teach_tokens_per_second": taught.tokens / taught_in, "read_tokens_per_second": read,
    }  # fmt: skip
    print(", ".join(f"{name.replace('_', ' ')}: {value:,.4g}" for name, value in facts.items()))
    return ratio.finish([found], args, flags=FLAGS, steps=steps, top_k=args.top_k, **facts)


if __name__ == "__main__":
    sys.exit(main())
