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
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.launch import Job, start_function  # noqa: E402
from tests.benchmarks import masked_training, ratio  # noqa: E402
from tests.benchmarks.masked_training import BATCH, SEQUENCE  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus  # noqa: E402

LIMIT, WARM_UP_STEPS = 1.05, 2
FLAGS = [*masked_training.FLAGS, "--padded-vocab-size", "12288"]  # 32 times the hidden size, as Llama-3.1-8B's


def run(argv: list[str], times: Path) -> int:
    """``pretrain`` in this rank, which writes what each step took, and its teacher in it."""
    from megatron.training import training

    from megatron_prune.__main__ import main
    from megatron_prune.training.teacher import OnlineTeacher

    train_step, targets = training.train_step, OnlineTeacher.targets
    taught = [0.0]

    @functools.wraps(targets)
    def timed_targets(*positional: Any, **named: Any) -> Any:
        began = time.process_time()
        found = targets(*positional, **named)
        taught[0] += time.process_time() - began
        return found

    @functools.wraps(train_step)
    def timed(*positional: Any, **named: Any) -> Any:
        taught[0], began = 0.0, time.process_time()
        found = train_step(*positional, **named)
        with open(times, "a") as file:
            print(time.process_time() - began, taught[0], file=file)
        return found

    training.train_step, OnlineTeacher.targets = timed, timed_targets  # type: ignore[method-assign]
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
            work = functools.partial(distillation.run, argv, folder / f"{name}.times")
            return start_function(work, log=folder / f"{name}.log", env={"OMP_NUM_THREADS": "1"})

        def end(name: str, job: Job) -> list[tuple[float, float]]:
            if code := job.wait():
                raise SystemExit(f"{name} exited with code {code}:\n{(folder / f'{name}.log').read_text()[-4000:]}")
            lines = (folder / f"{name}.times").read_text().splitlines()
            step, teacher = zip(*([float(word) for word in line.split()] for line in lines), strict=True)
            return list(zip(step, teacher, strict=True))[WARM_UP_STEPS:]

        with begin("teacher", 1) as job:
            end("teacher", job)
        distilled = ["--objective", "distill", "--teacher", str(folder / "teacher"), "--distill-alpha", "0.5"]
        with begin("online", steps, *distilled) as online, begin("plain", steps) as plain:
            a, b = end("online", online), end("plain", plain)
    expected = [one + teacher for (one, _), (_, teacher) in zip(b, a, strict=True)]
    found = ratio.summarise(
        "processor time of a step, online teacher / (plain + teacher's forward) (s)", [one for one, _ in a], expected,
        LIMIT,
    )  # fmt: skip
    return ratio.finish([found], args, flags=FLAGS, steps=steps, teacher=[teacher for _, teacher in a])


if __name__ == "__main__":
    sys.exit(main())
