"""Calibration (all statistics, for every method and ratio) against a plain forward over the same tokens.

One process, one model: forward passes with and without the hooks alternate, over the same windows,
through the same engine. The limit is a ratio of 1.2.

    python tests/benchmarks/calibration.py [--dtype bf16] [--gradients] [--processor-time] [--pairs 10] [--load CKPT]

With ``--gradients``: the calibration with a backward pass, against a training step over the same windows, which is the
same passes with gradients of every parameter, clipping and torch's AdamW.

Without ``--load`` the model is a random Llama of 18.9 million parameters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.writer import CheckpointWriter
from tests.benchmarks import ratio

LIMIT = 1.2
SHAPE = ModelShape(8, 384, 6, 6, 64, 1024, 8192, tied=False)


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--load", help="measure on this checkpoint")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the computation")
    parser.add_argument("--gradients", action="store_true", help="with a backward pass, against a training step")
    parser.add_argument(
        "--processor-time", action="store_true", help="of this process, where others share the processor"
    )
    parser.add_argument("--sequences", type=int, default=2, help="of a measurement (default: 2)")
    parser.add_argument("--seq-length", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        load = options.load or write_random(Path(folder) / "parent", SHAPE)
        return measure(options, str(load))


def measure(options: argparse.Namespace, load: str) -> int:
    from megatron_prune.engine import cpu, runtime

    cpu.prepare()

    def complete(args: Any, argv: list[str]) -> None:
        args.seq_length, args.micro_batch_size = options.seq_length, 1

    precision = ["--bf16"] if options.dtype == "bf16" else []
    argv = ["--load", load, *precision]
    args = runtime.start("calibrate", argv, complete=complete)
    runtime.initialize(args)
    model = runtime.load_model(args)

    from megatron_prune.calibration.gradients import GradientRecorder
    from megatron_prune.calibration.run import ActivationRecorder
    from megatron_prune.engine import forward, outliers

    shape = ModelShape.from_args(vars(args))
    generator = torch.Generator().manual_seed(0)
    size = (options.sequences, options.seq_length + 1)
    windows = list(torch.randint(shape.padded_vocab_size, size, generator=generator))

    clock = time.process_time if options.processor_time else time.perf_counter

    def plain() -> float:
        started = clock()
        forward.run(model, windows)
        torch.cuda.synchronize()
        return clock() - started

    def calibrating() -> float:
        started = clock()
        with ActivationRecorder(model[0], shape) as recorder:
            losses = forward.run(model, windows)
            assert losses is not None
            tensors, _ = recorder.gather(sum(losses))
        outliers.counts(model[0], shape, tensors)
        return clock() - started

    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.0) if options.gradients else None

    def training() -> float:
        assert optimizer is not None
        started = clock()
        forward.run_backward(model, windows)
        torch.nn.utils.clip_grad_norm_(model[0].parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return clock() - started

    def with_gradients() -> float:
        started = clock()
        with ActivationRecorder(model[0], shape) as recorder, GradientRecorder(model[0], shape) as of_gradients:
            losses = forward.run_backward(model, windows)
            assert losses is not None
            recorder.gather(sum(losses))
            of_gradients.gather(len(windows))
        return clock() - started

    if options.gradients:
        name = f"calibration with gradients / training step, {options.dtype}"
        measured = ratio.interleaved(name, with_gradients, training, pairs=options.pairs, limit=LIMIT)
    else:
        name = f"calibration / plain forward, {options.dtype}"
        measured = ratio.interleaved(name, calibrating, plain, pairs=options.pairs, limit=LIMIT)
    facts = {"tokens": options.sequences * options.seq_length, "parameters": shape.parameters()}
    code = ratio.finish([measured], options, **facts, threads=torch.get_num_threads())
    torch.distributed.destroy_process_group()
    return code


def write_random(path: Path, shape: ModelShape, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of random weights of a Llama of this shape."""
    args = shape.to_args() | {
        "padded_vocab_size": shape.padded_vocab_size,
        "untie_embeddings_and_output_weights": not shape.tied,
        "swiglu": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "max_position_embeddings": 8192,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(path, args=args, dtype=dtype) as writer:
        for weight in weights(shape):
            rows = max(1, (64 << 20) // (4 * weight.shape[-1]))
            sizes = [min(rows, weight.shape[0] - start) for start in range(0, weight.shape[0], rows)]
            blocks = (torch.randn(size, *weight.shape[1:], generator=generator) * 0.02 for size in sizes)
            if "norm" in weight.name:
                blocks = (block + 1 for block in blocks)
            writer.add(weight.name, weight.shape, blocks)
    return path


if __name__ == "__main__":
    sys.exit(main())
