"""The cost per step of our ``pretrain`` over the shortest script around Megatron's own loop.

The same flags, model, tokens per step and machine; the time of a step is the median that Megatron's
log reports over a run, after the first steps. Limit of the upper end of the ratio: 1.03.

    python tests/benchmarks/pretrain_vs_bare.py [--pairs 10] [--json figures.json]
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.launch import Job, start, start_function  # noqa: E402
from tests import tiny  # noqa: E402
from tests.benchmarks import bare_pretrain, ratio  # noqa: E402

WARM_UP_STEPS = 5
BATCH, SEQUENCE = 4, 256
LIMIT = 1.03

FLAGS = [
    "--num-layers", "4", "--hidden-size", "256", "--ffn-hidden-size", "704", "--num-attention-heads", "8",
    "--group-query-attention", "--num-query-groups", "4", "--swiglu", "--normalization", "RMSNorm",
    "--disable-bias-linear", "--position-embedding-type", "rope", "--untie-embeddings-and-output-weights",
    "--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE),
    "--micro-batch-size", str(BATCH), "--global-batch-size", str(BATCH),
    "--tokenizer-type", "NullTokenizer", "--vocab-size", str(tiny.VOCABULARY),
    "--padded-vocab-size", str(tiny.VOCABULARY), "--attention-dropout", "0", "--hidden-dropout", "0",
    "--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine", "--weight-decay", "0.1",
    "--log-interval", "1", "--eval-iters", "0", "--eval-interval", "1000", "--save-interval", "1000",
]  # fmt: skip


def make_corpus(folder: Path, tokens: int) -> Path:
    """A tokenized corpus of at least ``tokens`` tokens of real text."""
    texts = tiny.documents(300)
    tiny.write_jsonl(folder / "text.jsonl", texts * (1 + tokens // 40_000))
    tiny.write_tokenizer(folder / "tokenizer", texts)
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", folder / "text.jsonl"]
    command += ["--output-prefix", folder / "corpus", "--tokenizer-type", "HuggingFaceTokenizer"]
    command += ["--tokenizer-model", folder / "tokenizer", "--append-eod", "--workers", "1"]
    subprocess.run([str(word) for word in command], check=True, stdin=subprocess.DEVNULL)
    return folder / "corpus"


def step_milliseconds(job: Job, log: Path) -> float:
    """Wait for a training run; the median time of its steps from Megatron's log."""
    with job:
        code = job.wait()
    text = log.read_text()
    if code:
        raise SystemExit(f"a run left with {code}:\n{text[-4000:]}")
    times = [float(found) for found in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)]
    return statistics.median(times[WARM_UP_STEPS:])


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=40, help="steps of each run (default: 40)")
    args = parser.parse_args()
    threads = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, args.steps * BATCH * SEQUENCE)
        flags = [*FLAGS, "--data-path", str(corpus), "--data-cache-path", str(folder / "cache")]
        environment = {"OMP_NUM_THREADS": threads}

        def ours() -> float:
            shutil.rmtree(folder / "ours", ignore_errors=True)
            log = folder / "ours.log"
            log.unlink(missing_ok=True)
            run = ["pretrain", *flags, "--stream-range", f"0:{args.steps * BATCH}", "--save", folder / "ours"]
            return step_milliseconds(start(run, log=log, env=environment), log)

        def bare() -> float:
            shutil.rmtree(folder / "bare", ignore_errors=True)
            log = folder / "bare.log"
            log.unlink(missing_ok=True)
            run = [*flags, "--train-iters", str(args.steps), "--save", str(folder / "bare")]
            work = functools.partial(bare_pretrain.main, run)
            return step_milliseconds(start_function(work, log=log, env=environment), log)

        found = ratio.interleaved("step time, ours / bare (ms)", ours, bare, pairs=args.pairs, limit=LIMIT)
    return ratio.finish([found], args, flags=FLAGS, steps=args.steps, threads=threads)


if __name__ == "__main__":
    sys.exit(main())
