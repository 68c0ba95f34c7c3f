"""On a GPU: tokens per second and peak memory of BF16 and of every FP8 preset, and of bare Megatron in BF16.

    bash tests/run.sh --gpu               # builds Transformer Engine, runs tests/gpu and this
    .venv-te/bin/python tests/benchmarks/gpu_training.py [--layers 16] [--pairs 6] [--json FILE]

The model is as wide as Llama-3.1-8B and has fewer layers, so that it fits one GPU with its optimizer. A ratio above
one means that the first of the two is faster. Figures belong in examples/llama3.1_8b/RESULTS.md, with the card.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_prune.engine.fp8 import PRESETS  # noqa: E402
from tests.benchmarks import ratio  # noqa: E402
from tests.benchmarks.pretrain_vs_bare import WARM_UP_STEPS, make_corpus  # noqa: E402

SEQUENCE, BATCH, STEPS = 4096, 8, 25


def flags(layers: int, corpus: Path, folder: Path) -> list[str]:
    return (
        f"--num-layers {layers} --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --kv-channels 128 "
        "--group-query-attention --num-query-groups 8 --swiglu --normalization RMSNorm --disable-bias-linear "
        "--position-embedding-type rope --untie-embeddings-and-output-weights --padded-vocab-size 32768 "
        f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --micro-batch-size 1 "
        f"--global-batch-size {BATCH} --tokenizer-type NullTokenizer --vocab-size 32767 --lr 1e-4 "
        "--attention-dropout 0 --hidden-dropout 0 "
        "--recompute-activations --use-distributed-optimizer --log-interval 1 --eval-iters 0 --eval-interval 1000 "
        f"--transformer-impl transformer_engine --data-path {corpus} --data-cache-path {folder / 'cache'}"
    ).split()


def run(command: list[str]) -> tuple[float, float]:
    """(tokens per second, peak memory in GB) of a run, from Megatron's log."""
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    times = [float(found) for found in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)]
    if done.returncode or len(times) < STEPS:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-4000:]}")
    memory = [float(found) for found in re.findall(r"max allocated: ([\d.]+)", text)]
    return 1000 * BATCH * SEQUENCE / statistics.median(times[WARM_UP_STEPS:]), max(memory, default=0.0) / 1000


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--layers", type=int, default=16, help="of the model (default: 16)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU is visible")
    card = torch.cuda.get_device_name()
    print(f"{card}, {args.layers} layers of Llama-3.1-8B's width, {BATCH * SEQUENCE} tokens a step")
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = flags(args.layers, make_corpus(folder, (STEPS + 1) * BATCH * SEQUENCE), folder)

        def ours(arm: str, more: list[str]) -> float:
            shutil.rmtree(folder / "ours", ignore_errors=True)
            words = ["-m", "megatron_prune", "pretrain", *common, *more, "--stream-range", f"0:{STEPS * BATCH}"]
            speed, memory[arm] = run(words)
            return speed

        def bare() -> float:
            script = str(ROOT / "tests" / "benchmarks" / "bare_pretrain.py")
            speed, memory["bare"] = run([script, *common, "--bf16", "--train-iters", str(STEPS)])
            return speed

        def bf16() -> float:
            return ours("bf16", ["--bf16"])

        found = [ratio.interleaved("tokens a second, ours / bare Megatron, BF16", bf16, bare, pairs=args.pairs)]
        for preset in PRESETS:

            def fp8(preset: str = preset) -> float:
                return ours(preset, ["--fp8-preset", preset, "--fp8-param-gather"])

            found.append(ratio.interleaved(f"tokens a second, {preset} / BF16", fp8, bf16, pairs=args.pairs))
    for arm, peak in memory.items():
        print(f"peak memory, {arm}: {peak:.1f} GB")
    return ratio.finish(found, args, card=card, layers=args.layers, peak_gigabytes=memory)


if __name__ == "__main__":
    sys.exit(main())
