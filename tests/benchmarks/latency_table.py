"""Predicted latency against measured: shapes that are not on the grid of a table, with and without equal layers.

    python tests/benchmarks/latency_table.py [--rounds N] [--processor-time] [--json FILE]

The parent is a random Llama. Every round times all models of its table once (what ``latency-table`` does in one repeat)
and then runs ``benchmark`` once on a checkpoint of every shape, so that a machine whose speed drifts slows both.
Compared are the medians over the rounds. ``--processor-time``: of this process's thread in place of the wall clock, for
a machine that others use too. Run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_prune import artifacts, screen, verbs  # noqa: E402
from megatron_prune.api.checkpoints import benchmark  # noqa: E402
from megatron_prune.checkpoint.reader import open_checkpoint  # noqa: E402
from megatron_prune.convert.huggingface import import_hf  # noqa: E402
from megatron_prune.evaluation import efficiency  # noqa: E402
from megatron_prune.evaluation.latency import PHASES  # noqa: E402
from megatron_prune.evaluation.latency_measurement import prepare  # noqa: E402
from megatron_prune.methods.base import Selection  # noqa: E402
from tests.structured import layered  # noqa: E402

LAYERS, HIDDEN, GROUPS, PER_GROUP, HEAD, FFN = 8, 384, 4, 2, 48, 1024
# Layers, hidden size, and the groups, heads per group and FFN of all layers, or of each (0: the layer has none).
SHAPES: dict[str, tuple[int, list[tuple[int, int, int]]]] = {
    "8 layers, hidden 320, 8 heads in 4 groups, FFN 832": (320, [(4, 2, 832)] * 8),
    "8 layers, hidden 192, 8 heads in 4 groups, FFN 512": (192, [(4, 2, 512)] * 8),
    "8 layers, hidden 320, 6 heads in 3 groups, FFN 448": (320, [(3, 2, 448)] * 8),
    "8 layers, hidden 384, 3 heads in 3 groups, FFN 896": (384, [(3, 1, 896)] * 8),
    "6 layers, hidden 320, 8 heads in 4 groups, FFN 1024": (320, [(4, 2, 1024)] * 6),
    "3 layers, hidden 384, 8 heads in 4 groups, FFN 768": (384, [(4, 2, 768)] * 3),
    "layers that differ, hidden 320": (
        320, [(4, 2, 832), (0, 0, 448), (3, 2, 0), (2, 2, 960), (4, 2, 384), (3, 2, 704), (4, 2, 0), (1, 2, 576)],
    ),
}  # fmt: skip


def write_parent(folder: Path) -> Path:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=GROUPS * PER_GROUP, num_key_value_heads=GROUPS, head_dim=HEAD, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "parent")
    return folder / "parent"


def write_shape(parent: Path, folder: Path, hidden: int, layers: list[tuple[int, int, int]]) -> Path:
    """A checkpoint that keeps the first of everything."""
    heads = [[g * PER_GROUP + h for g in range(groups) for h in range(each)] for groups, each, _ in layers]
    kept = Selection(
        tuple(range(len(layers))), hidden=tuple(range(hidden)), heads=tuple(map(tuple, heads)),
        ffn=tuple(tuple(range(ffn)) for _, _, ffn in layers),
    )  # fmt: skip
    layered.apply.apply_plan(parent, layered.plan(open_checkpoint(parent), kept), folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.processor_time:
        efficiency.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[assignment]
    work = {"batch": 1, "prompt": 128, "new": 16, "warmup": 1}
    begun, loads = time.process_time(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parent = write_parent(folder)
        made = {
            name: write_shape(parent, folder / str(number), *sizes)
            for number, (name, sizes) in enumerate(SHAPES.items())
        }
        asked = verbs.LatencyTableSettings(checkpoint=str(parent), output="", repeats=options.rounds, **work)
        measurement = prepare(asked)
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in made}
        repeats = []
        for _ in screen.progress(range(options.rounds), options.rounds, "measuring", "round"):
            repeats.append(measurement.once())
            for name, checkpoint in made.items():
                (model,) = benchmark(checkpoint, repeats=1, **work)["models"]
                measured[name].append({phase: model["measured"]["dense"][phase]["seconds"] for phase in PHASES})
            loads.append(os.getloadavg()[0])
        table = measurement.table(repeats)
        rows: list[dict[str, Any]] = []
        for name, checkpoint in made.items():
            predicted = table.predict(open_checkpoint(checkpoint).shape)
            row: dict[str, Any] = {"shape": name}
            for phase in PHASES:
                times = [one[phase] for one in measured[name]]
                expected, found = getattr(predicted, phase), statistics.median(times)
                row[phase] = {"predicted": expected, "measured": found, "least": min(times), "most": max(times)}
                row[phase]["error"] = expected / found - 1
            rows.append(row)
            print(name + "".join(
                f"; {phase} {1e3 * row[phase]['predicted']:.2f} predicted, {1e3 * row[phase]['measured']:.2f} measured "
                f"({1e3 * row[phase]['least']:.2f} to {1e3 * row[phase]['most']:.2f}) ms, {row[phase]['error']:+.1%}"
                for phase in PHASES
            ))  # fmt: skip
    print(
        f"{len(measurement.configs)} models in the table, {options.rounds} rounds, "
        f"{time.process_time() - begun:.0f} s of processor time, load {min(loads):.1f} to {max(loads):.1f}"
    )
    if options.json:
        artifacts.write_json(options.json, {"rows": rows, "load": loads, "device": artifacts.device()})


if __name__ == "__main__":
    main()
