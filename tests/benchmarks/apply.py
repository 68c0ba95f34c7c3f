"""``apply`` on a synthetic 4 GB checkpoint: its time against ``cp``, and its memory.

Two cuts alternate with ``cp -r`` of the parent, each in its own process and written to the disk
(a ``sync`` follows ``cp``, since ``apply`` ends with one): half of the linears by width, and about a
tenth (every weight changes and nearly all of it is kept: the most work that a plan can ask for).
Limits: 2.5 times the time of ``cp`` for the half (the tenth is only reported), and 1.5 GB of anonymous
and shared memory for both (RssAnon + RssShmem of /proc/self/status, sampled every 10 ms). The start of
Python and torch counts in the time of ``apply``.

    python tests/benchmarks/apply.py [--gigabytes 4] [--pairs 6] [--folder DIR]
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import rmtree

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prune import methods
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.methods.options import RandomOptions
from megatron_prune.structured import plan
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.target import Target
from tests.benchmarks import ratio
from tests.benchmarks.calibration import write_random
from tests.benchmarks.resident import timed

TIME_LIMIT = 2.5
MEMORY_LIMIT = 1.5e9


def main() -> int:
    parser = ratio.arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the parent (default: 4)")
    parser.add_argument("--folder", help="where to work; needs three times the size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        parent = write_random(folder / "parent", shape_of(options.gigabytes), torch.bfloat16)
        plans = {"half": cut_half(parent), "tenth": cut_a_tenth(parent)}
        size = sum(path.stat().st_size for path in parent.rglob("*") if path.is_file())
        print(f"parent: {size / 1e9:.2f} GB; load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
        memory: dict[str, list[float]] = {name: [] for name in plans}

        def apply(name: str) -> float:
            words = [sys.executable, "-m", "megatron_prune", "apply", "--load", parent]
            words += ["--plan", folder / f"{name}.json", "--save", folder / "pruned"]
            seconds, peak = timed([str(word) for word in words], every=0.01)
            memory[name].append(peak)
            rmtree(folder / "pruned")
            return seconds

        def copy() -> float:
            words = ["sh", "-c", 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +', "sh"]
            seconds, _ = timed([*words, str(parent), str(folder / "copy")], every=0.01)
            rmtree(folder / "copy")
            return seconds

        measured = []
        for name, made in plans.items():
            made.write(folder / f"{name}.json")
            limit = TIME_LIMIT if name == "half" else None
            found = ratio.interleaved(
                f"apply, {name} / cp", partial(apply, name), copy, pairs=options.pairs, limit=limit
            )
            measured.append(found)
    peaks = {name: max(values) for name, values in memory.items()}
    for name, peak in peaks.items():
        print(f"apply, {name}: at most {peak / 1e9:.3f} GB of anonymous and shared memory; limit {MEMORY_LIMIT / 1e9}")
    print(f"load {os.getloadavg()[0]:.1f}")
    code = ratio.finish(measured, options, bytes=size, memory=peaks, memory_limit=MEMORY_LIMIT)
    return code or int(max(peaks.values()) > MEMORY_LIMIT)


def shape_of(gigabytes: float) -> ModelShape:
    """A Llama-shaped model of that size in bf16, by its depth."""
    one = ModelShape(1, 2048, 32, 8, 64, 8192, 32768, tied=False)
    layer = replace(one, num_layers=2).parameters() - one.parameters()
    return replace(one, num_layers=max(1, round((gigabytes * 1e9 / 2 - one.parameters()) / layer) + 1))


def cut_half(parent: Path) -> plan.PruningPlan:
    """A random width plan that removes half of the linears' parameters: the smallest ratio of the paper."""
    checkpoint = open_checkpoint(parent)
    target = Target({}, ratio=0.5).choose(checkpoint.shape, methods.get("random"), {"axis": "width"})
    return random_plan(checkpoint, target)


def cut_a_tenth(parent: Path) -> plan.PruningPlan:
    """A random plan that keeps 15/16 of hidden and FFN channels and 3 of 4 heads in every group."""
    checkpoint = open_checkpoint(parent)
    source = checkpoint.shape
    target = replace(
        source,
        hidden_size=source.hidden_size * 15 // 16,
        ffn_hidden_size=source.ffn_hidden_size * 15 // 16,
        num_attention_heads=source.num_query_groups * 3,
    )
    return random_plan(checkpoint, target)


def random_plan(parent: Checkpoint, target: ModelShape) -> plan.PruningPlan:
    question = Question("random", RandomOptions(), parent.shape, (target,), parent.fingerprint(), seed=0)
    return plan.make(question, ratio=None, ratio_of="linears")


if __name__ == "__main__":
    sys.exit(main())
