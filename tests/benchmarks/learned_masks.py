"""The cost of learning masks per training step: ``learn-masks`` over the ``pretrain`` of the same model.

The same flags, samples and machine, 4096 tokens per step, masks of layers, query groups, heads, FFN and hidden
channels. The time of a step is the median that Megatron's log reports over a run, after the first steps. Limit of the
upper end of the ratio: 1.25.

    python tests/benchmarks/learned_masks.py [--pairs 10] [--json figures.json]
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.launch import start  # noqa: E402
from tests.benchmarks import ratio  # noqa: E402
from tests.benchmarks.masked_training import BATCH, FLAGS, SEQUENCE  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus, step_milliseconds  # noqa: E402

LIMIT = 1.25
TARGET = [
    "--target-num-layers", "4", "--target-hidden-size", "256", "--target-num-attention-heads", "2",
    "--target-num-query-groups", "2", "--target-ffn-hidden-size", "640",
]  # fmt: skip


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: 20)")
    args = parser.parse_args()
    threads = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, args.steps * BATCH * SEQUENCE)
        flags = [*FLAGS, "--data-path", str(corpus), "--data-cache-path", str(folder / "cache")]
        flags += ["--stream-range", f"0:{args.steps * BATCH}"]

        def measure(verb: str, *more: str) -> float:
            shutil.rmtree(folder / verb, ignore_errors=True)
            log = folder / f"{verb}.log"
            log.unlink(missing_ok=True)
            run = [verb, *flags, "--save", str(folder / verb), *more]
            return step_milliseconds(start(run, log=log, env={"OMP_NUM_THREADS": threads}), log)

        found = ratio.interleaved(
            "step time, learn-masks / pretrain (ms)",
            lambda: measure("learn-masks", *TARGET),
            lambda: measure("pretrain"),
            pairs=args.pairs,
            limit=LIMIT,
        )
    return ratio.finish([found], args, flags=FLAGS, target=TARGET, steps=args.steps, threads=threads)


if __name__ == "__main__":
    sys.exit(main())
