"""A training step without a GPU: ``--attention-backend fused`` over Megatron's local attention.

The parent of ``examples/miniature``: 8 layers of 80, 8,192 tokens per step in micro-batches of 16 sequences of 256,
bf16, one thread. The time of a step is the processor time of the process; its median over a run counts, after the first
steps. Limit of the upper end of the ratio: 1.

    python tests/benchmarks/cpu_attention.py [--pairs 10] [--steps 20] [--json figures.json]
"""

from __future__ import annotations

import functools
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.launch import start_function  # noqa: E402
from tests import tiny  # noqa: E402
from tests.benchmarks import ratio  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus  # noqa: E402

SEQUENCE, BATCH = 256, 32
FLAGS = (
    "--num-layers 8 --hidden-size 80 --ffn-hidden-size 208 --num-attention-heads 2 --kv-channels 40 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    f"--untie-embeddings-and-output-weights --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} "
    f"--micro-batch-size 16 --global-batch-size {BATCH} --padded-vocab-size {tiny.VOCABULARY} --attention-dropout 0 "
    "--hidden-dropout 0 --lr 1e-3 --log-interval 100 --eval-iters 0 --bf16"
).split()
SKIPPED = 5  # steps
MEDIAN = "median seconds of a step:"


def run(argv: list[str]) -> int:
    """The verb in this rank, which says how much processor time its steps took."""
    from megatron.training import training

    from megatron_prune.__main__ import main

    step, took = training.train_step, list[float]()

    @functools.wraps(step)
    def timed(*positional: Any, **named: Any) -> Any:
        began = time.process_time()
        found = step(*positional, **named)
        took.append(time.process_time() - began)
        return found

    training.train_step = timed
    ended = main(["pretrain", *argv])
    print(MEDIAN, statistics.median(took[SKIPPED:]), flush=True)
    return ended


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: 20)")
    args = parser.parse_args()
    from tests.benchmarks import cpu_attention  # under a name by which a rank can import it

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, args.steps * BATCH * SEQUENCE)
        flags = [*FLAGS, "--data-path", str(corpus), "--data-cache-path", str(folder / "cache")]
        flags += ["--stream-range", f"0:{args.steps * BATCH}"]

        def measure(backend: str) -> float:
            shutil.rmtree(folder / backend, ignore_errors=True)
            log = folder / f"{backend}.log"
            log.unlink(missing_ok=True)
            more = ["--save", str(folder / backend), "--attention-backend", backend]
            work = functools.partial(cpu_attention.run, [*flags, *more])
            if start_function(work, log=log, env={"OMP_NUM_THREADS": "1"}).wait():
                raise SystemExit(f"a run failed:\n{log.read_text()[-2000:]}")
            return 1000 * float(log.read_text().rpartition(MEDIAN)[2].split()[0])

        found = ratio.interleaved(
            "processor time of a step, fused / unfused (ms)", lambda: measure("fused"), lambda: measure("unfused"),
            pairs=args.pairs, limit=1.0,
        )  # fmt: skip
    return ratio.finish([found], args, flags=FLAGS, steps=args.steps)


if __name__ == "__main__":
    sys.exit(main())
