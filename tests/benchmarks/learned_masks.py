"""The cost of learning masks per training step: ``learn-masks`` over the ``pretrain`` of the same model.

The same flags, samples and machine, 4096 tokens per step, masks of layers, query groups, heads, FFN and hidden
channels. A step is Megatron's ``train_step``, in processor seconds of one thread, which other work on the machine
hardly changes; a run counts with the median of its steps after the first. Limit of the upper end of the ratio: 1.25.

    python tests/benchmarks/learned_masks.py [--pairs 10] [--steps 8] [--json figures.json]
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
from tests.benchmarks import ratio  # noqa: E402
from tests.benchmarks.masked_training import BATCH, FLAGS, SEQUENCE  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus  # noqa: E402

LIMIT = 1.25
TARGET = [
    "--target-num-layers", "4", "--target-hidden-size", "256", "--target-num-attention-heads", "2",
    "--target-num-query-groups", "2", "--target-ffn-hidden-size", "640",
]  # fmt: skip
STEP = "processor seconds of a step:"


def run(verb: str, argv: list[str]) -> int:
    """The verb in this rank, which says what each step took."""
    from megatron.training import training

    from megatron_prune.__main__ import main

    train_step = training.train_step

    @functools.wraps(train_step)
    def timed(*positional: Any, **named: Any) -> Any:
        began = time.process_time()
        found = train_step(*positional, **named)
        print(STEP, time.process_time() - began, flush=True)
        return found

    training.train_step = timed
    return main([verb, *argv])


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=8, help="steps of each run (default: 8)")
    args = parser.parse_args()
    from tests.benchmarks import learned_masks  # under a name by which a rank can import it

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, args.steps * BATCH * SEQUENCE)
        flags = [*FLAGS, "--data-path", str(corpus), "--data-cache-path", str(folder / "cache")]
        flags += ["--stream-range", f"0:{args.steps * BATCH}", "--no-save-optim"]

        def measure(verb: str, *more: str) -> float:
            shutil.rmtree(folder / verb, ignore_errors=True)
            log = folder / f"{verb}.log"
            log.unlink(missing_ok=True)
            work = functools.partial(learned_masks.run, verb, [*flags, "--save", str(folder / verb), *more])
            with start_function(work, log=log, env={"OMP_NUM_THREADS": "1"}) as running:
                code = running.wait()
            text = log.read_text()
            if code:
                raise SystemExit(f"a run left with {code}:\n{text[-4000:]}")
            steps = [float(line.removeprefix(STEP)) for line in text.splitlines() if line.startswith(STEP)]
            assert len(steps) == args.steps
            return statistics.median(steps[1:])

        found = ratio.interleaved(
            "processor time of a step, learn-masks / pretrain (s)",
            lambda: measure("learn-masks", *TARGET),
            lambda: measure("pretrain"),
            pairs=args.pairs,
            limit=LIMIT,
        )
    return ratio.finish([found], args, flags=FLAGS, target=TARGET, steps=args.steps)


if __name__ == "__main__":
    sys.exit(main())
