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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.launch import Job  # noqa: E402
from tests.benchmarks import ratio, step_seconds  # noqa: E402
from tests.benchmarks.masked_training import BATCH, FLAGS, SEQUENCE  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus  # noqa: E402
from tests.benchmarks.step_seconds import WARM_UP_STEPS  # noqa: E402

LIMIT = 1.25
TARGET = [
    "--target-num-layers", "4", "--target-hidden-size", "256", "--target-num-attention-heads", "2",
    "--target-num-query-groups", "2", "--target-ffn-hidden-size", "640",
]  # fmt: skip


def run(verb: str, argv: list[str], times: Path) -> int:
    """The verb in this rank, which writes what each step took."""
    from megatron.training import training

    from megatron_prune.__main__ import main

    training.train_step = step_seconds.timed(training.train_step, functools.partial(step_seconds.write, times))
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
            argv = [*flags, "--save", str(folder / verb), *more]
            return step_seconds.begin(folder, verb, functools.partial(learned_masks.run, verb, argv))

        with begin("learn-masks", *TARGET) as learning, begin("pretrain") as plain:
            [a] = zip(*step_seconds.end(folder, "learn-masks", learning), strict=True)
            [b] = zip(*step_seconds.end(folder, "pretrain", plain), strict=True)
    assert len(a) == len(b) == args.pairs
    found = ratio.summarise("processor time of a step, learn-masks / pretrain (s)", list(a), list(b), LIMIT)
    return ratio.finish([found], args, flags=FLAGS, target=TARGET, steps=steps)


if __name__ == "__main__":
    sys.exit(main())
