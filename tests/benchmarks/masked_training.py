"""The cost of holding zeros per training step: ``pretrain --masks`` over the dense run of the same shape.

The same flags, model, samples and machine, 4096 tokens per step, half of every linear's weights removed. The time of a
step is the median that Megatron's log reports over a run, after the first steps. Limit of the upper end of the
ratio: 1.05. Memory: the size of the masks on a rank (limit: 1 byte per parameter), and how much more is resident once
model and optimizer are set up. Peaks during steps come from activations and vary by more than that.

    python tests/benchmarks/masked_training.py [--pairs 10] [--json figures.json]
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.checkpoint.layout import ModelShape, weights  # noqa: E402
from megatron_prune.engine.launch import start_function  # noqa: E402
from megatron_prune.masks import write_single  # noqa: E402
from tests import tiny  # noqa: E402
from tests.benchmarks import ratio  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import make_corpus, step_milliseconds  # noqa: E402

BATCH, SEQUENCE = 16, 256
LIMIT = 1.05
SHAPE = ModelShape(
    num_layers=6, hidden_size=384, num_attention_heads=6, num_query_groups=3, kv_channels=64, ffn_hidden_size=1024,
    padded_vocab_size=tiny.VOCABULARY, tied=False,
)  # fmt: skip
FLAGS = [
    "--num-layers", "6", "--hidden-size", "384", "--ffn-hidden-size", "1024", "--num-attention-heads", "6",
    "--group-query-attention", "--num-query-groups", "3", "--kv-channels", "64", "--swiglu",
    "--normalization", "RMSNorm", "--disable-bias-linear", "--position-embedding-type", "rope",
    "--untie-embeddings-and-output-weights", "--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE),
    "--micro-batch-size", str(BATCH), "--global-batch-size", str(BATCH),
    "--padded-vocab-size", str(tiny.VOCABULARY), "--attention-dropout", "0", "--hidden-dropout", "0",
    "--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine", "--weight-decay", "0.1",
    "--log-interval", "1", "--eval-iters", "0", "--bf16",
]  # fmt: skip
RESIDENT = "resident after set-up (bytes):"


def write_masks(folder: Path, pattern: str) -> Path:
    """Random masks for every linear of SHAPE, half of the weights removed."""
    numbers = np.random.default_rng(0)

    def kept(out: int, inputs: int) -> torch.Tensor:
        if pattern == "unstructured":
            return torch.from_numpy(numbers.random((out, inputs)) < 0.5)
        order = numbers.random((out, inputs // 4, 4)).argsort(-1)
        return torch.from_numpy((order < 2).reshape(out, inputs))

    write_single(folder, SHAPE, [(w.name, kept(*w.shape), pattern) for w in weights(SHAPE) if w.is_linear])
    return folder


def run(argv: list[str]) -> int:
    """The verb in this rank, which reports its memory before its first step."""
    from megatron.training import training

    from megatron_prune.__main__ import main

    set_up = training.setup_model_and_optimizer

    @functools.wraps(set_up)
    def set_up_and_say(*positional: Any, **named: Any) -> Any:
        found = set_up(*positional, **named)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(RESIDENT, pages * os.sysconf("SC_PAGE_SIZE"), flush=True)
        return found

    training.setup_model_and_optimizer = set_up_and_say
    return main(["pretrain", *argv])


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: 20)")
    parser.add_argument("--pattern", default="2:4", choices=["2:4", "unstructured"])
    args = parser.parse_args()
    from tests.benchmarks import masked_training  # under a name by which a rank can import it

    threads = str(len(os.sched_getaffinity(0)))
    resident: dict[str, list[int]] = {"masked": [], "dense": []}
    said = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, args.steps * BATCH * SEQUENCE)
        masks = write_masks(folder / "masks", args.pattern)
        flags = [*FLAGS, "--data-path", str(corpus), "--data-cache-path", str(folder / "cache")]
        flags += ["--stream-range", f"0:{args.steps * BATCH}"]

        def measure(kind: str, *more: str) -> float:
            nonlocal said
            shutil.rmtree(folder / kind, ignore_errors=True)
            log = folder / f"{kind}.log"
            log.unlink(missing_ok=True)
            work = functools.partial(masked_training.run, [*flags, "--save", str(folder / kind), *more])
            found = step_milliseconds(start_function(work, log=log, env={"OMP_NUM_THREADS": threads}), log)
            text = log.read_text()
            resident[kind].append(int(text.rpartition(RESIDENT)[2].split()[0]))
            holding = re.search(r"holding .*", text)
            said = holding[0] if holding else said
            return found

        found = ratio.interleaved(
            "step time, masked / dense (ms)",
            lambda: measure("masked", "--masks", str(masks)),
            lambda: measure("dense"),
            pairs=args.pairs,
            limit=LIMIT,
        )
    print(said)
    more = (statistics.median(resident["masked"]) - statistics.median(resident["dense"])) / SHAPE.parameters()
    print(f"resident after set-up, masked - dense: {more:.2f} bytes a parameter of {SHAPE.parameters():,}")
    return ratio.finish(
        [found], args, flags=FLAGS, steps=args.steps, threads=threads, pattern=args.pattern, holding=said,
        resident_bytes_a_parameter=more,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
