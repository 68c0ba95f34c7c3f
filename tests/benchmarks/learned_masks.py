"""The cost of learning masks per training step: ``learn-masks`` over the ``pretrain`` of the same model.

The same flags, samples and machine, 4096 tokens per step, masks of layers, query groups, heads, FFN and hidden
channels. A step is Megatron's ``train_step``, in processor seconds of one thread, which other work on the machine
hardly changes. Both runs go on at the same time; a pair is the same step of both. Limit of the upper end of the ratio:
1.25.

    python tests/benchmarks/learned_masks.py [--pairs 10] [--json figures.json]
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.launch import Job, start_function  # noqa: E402
from tests.benchmarks import ratio  # noqa: E402
from tests.benchmarks.masked_training import BATCH, FLAGS, SEQUENCE  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus  # noqa: E402

LIMIT, WARM_UP_STEPS = 1.25, 2
TARGET = [
    "--target-num-layers", "4", "--target-hidden-size", "256", "--target-num-attention-heads", "2",
    "--target-num-query-groups", "2", "--target-ffn-hidden-size", "640",
]  # fmt: skip


def run(verb: str, argv: list[str], times: Path) -> int:
    """The verb in this rank, which writes what each step took."""
    from megatron.training import training

    from megatron_prune.__main__ import main

    train_step = training.train_step

    @functools.wraps(train_step)
    def timed(*positional: Any, **named: Any) -> Any:
        began = time.process_time()
        found = train_step(*positional, **named)
        with open(times, "a") as file:
            print(time.process_time() - began, file=file)
        return found

    training.train_step = timed
    return main([verb, *argv])


def main() -> int:
    args = ratio.arguments(__doc__).parse_args()
    steps = args.pairs + WARM_UP_STEPS
    from tests.benchmarks import learned_masks  # under a name by which a rank can import it

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, steps * BATCH * SEQUENCE)
        flags = [*FLAGS, "--data-path", str(corpus), "--data-cache-path", str(folder / "cache")]
        flags += ["--stream-range", f"0:{steps * BATCH}", "--no-save-optim"]

        def begin(verb: str, *more: str) -> Job:
            work = functools.partial(
                learned_masks.run, verb, [*flags, "--save", str(folder / verb), *more], folder / f"{verb}.times"
            )
            return start_function(work, log=folder / f"{verb}.log", env={"OMP_NUM_THREADS": "1"})

        def end(verb: str, job: Job) -> list[float]:
            if code := job.wait():
                raise SystemExit(f"{verb} exited with code {code}:\n{(folder / f'{verb}.log').read_text()[-4000:]}")
            found = [float(line) for line in (folder / f"{verb}.times").read_text().splitlines()]
            assert len(found) == steps
            return found[WARM_UP_STEPS:]

        with begin("learn-masks", *TARGET) as learning, begin("pretrain") as plain:
            a, b = end("learn-masks", learning), end("pretrain", plain)
    found = ratio.summarise("processor time of a step, learn-masks / pretrain (s)", a, b, LIMIT)
    return ratio.finish([found], args, flags=FLAGS, target=TARGET, steps=steps)


if __name__ == "__main__":
    sys.exit(main())
