"""The cost of an online teacher per training step: a distilled step over a plain one and the teacher's forward pass.

The same flags, samples and machine, 4,096 tokens per step, a teacher of the student's shape. A step is Megatron's
``train_step``, in processor seconds of one thread, which other work on the machine hardly changes; the teacher's
forward pass is measured inside the distilled step, up to its logits. Both runs go on at the same time; a pair is the
same step of both. What is left is the divergence and its gradient. Limit of the upper end of the ratio: 1.05.

    python tests/benchmarks/distillation.py [--pairs 10] [--json figures.json]
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.launch import Job  # noqa: E402
from tests.benchmarks import masked_training, ratio, step_seconds  # noqa: E402
from tests.benchmarks.masked_training import BATCH, SEQUENCE  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus  # noqa: E402
from tests.benchmarks.step_seconds import WARM_UP_STEPS  # noqa: E402

LIMIT = 1.05
FLAGS = [*masked_training.FLAGS, "--padded-vocab-size", "12288"]  # 32 times the hidden size, as Llama-3.1-8B's


def run(argv: list[str], times: Path) -> int:
    """``pretrain`` in this rank, which writes what each step took, and its teacher in it."""
    from megatron.training import training

    from megatron_prune.__main__ import main
    from megatron_prune.training.teacher import OnlineTeacher

    taught: list[float] = []

    def note(seconds: float) -> None:
        step_seconds.write(times, seconds, sum(taught))
        taught.clear()

    training.train_step = step_seconds.timed(training.train_step, note)
    OnlineTeacher.targets = step_seconds.timed(OnlineTeacher.targets, taught.append)  # type: ignore[method-assign]
    return main(["pretrain", *argv])


def main() -> int:
    args = ratio.arguments(__doc__).parse_args()
    steps = args.pairs + WARM_UP_STEPS
    from tests.benchmarks import distillation  # under a name by which a rank can import it

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, steps * BATCH * SEQUENCE)
        flags = [*FLAGS, "--data-path", str(corpus), "--data-cache-path", str(folder / "cache")]
        flags += ["--no-save-optim"]

        def begin(name: str, count: int, *more: str) -> Job:
            argv = [*flags, "--stream-range", f"0:{count * BATCH}", "--save", str(folder / name), *more]
            return step_seconds.begin(folder, name, functools.partial(distillation.run, argv))

        with begin("teacher", 1) as job:
            step_seconds.end(folder, "teacher", job)
        distilled = ["--objective", "distill", "--teacher", str(folder / "teacher"), "--distill-alpha", "0.5"]
        with begin("online", steps, *distilled) as online, begin("plain", steps) as plain:
            a, teacher = zip(*step_seconds.end(folder, "online", online), strict=True)
            b, _ = zip(*step_seconds.end(folder, "plain", plain), strict=True)
    expected = [sum(both) for both in zip(b, teacher, strict=True)]
    found = ratio.summarise(
        "processor time of a step, online teacher / (plain + teacher's forward) (s)", list(a), expected, LIMIT
    )
    return ratio.finish([found], args, flags=FLAGS, steps=steps, teacher=list(teacher))


if __name__ == "__main__":
    sys.exit(main())
