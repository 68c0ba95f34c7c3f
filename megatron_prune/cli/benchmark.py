"""``megatron-prune benchmark CKPT …``: what checkpoints cost to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune import verbs
from megatron_prune.cli.parser import Parser


def parser() -> Parser:
    return Parser(
        "benchmark",
        "Compares what checkpoints cost to run: parameters, FLOPs of a forward pass over 2,048 tokens, memory of "
        "weights and cache, and measured latency and throughput on this machine, in transformers. 2:4 models are "
        "measured where the GPU has kernels for them.",
        verbs.BenchmarkSettings,
        example="megatron-prune benchmark checkpoints/parent checkpoints/pruned --output efficiency.json",
    )


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    asked = verbs.BenchmarkSettings.of(parser().read(argv)[0])
    from rich.console import Console
    from rich.table import Table

    from megatron_prune.api.benchmarks import run

    found = run(asked)
    table = Table(title="FLOPs of a forward pass over 2,048 tokens; latency: median (least to most)")
    for head in ("", *(model["path"] for model in found["models"])):
        table.add_column(head, justify="right" if head else "left")
    columns = [rows(model) for model in found["models"]]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(table)
    if asked.output is not None:
        print(f"wrote {asked.output}")
    return 0


def rows(model: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of one model, by name."""
    packed = model["weight_bytes_packed"]
    shown = {
        "parameters": f"{model['parameters']:,}",
        "not zero": f"{model['parameters_nonzero']:,}",
        "FLOPs": f"{model['flops']:.3e}",
        "FLOPs of kept weights": f"{model['flops_kept']:.3e}",
        "weights, MB": f"{model['weight_bytes'] / 1e6:,.1f} ({model['dtype']})",
        **({} if packed is None else {"weights packed 2:4, MB": f"{packed / 1e6:,.1f} (theoretical)"}),
        "cache per token, kB": f"{model['cache_bytes'] / 1e3:,.2f}",
    }
    for kind, measured in model.get("measured", {}).items():
        if "why" in measured:
            shown[kind] = measured["why"]
            continue
        for phase, unit in (("prefill", "prompt"), ("decode", "token")):
            one = measured[phase]
            ms = [1e3 * one[key] for key in ("seconds", "least", "most")]
            shown[f"{phase}, {kind}: ms per {unit}"] = f"{ms[0]:.2f} ({ms[1]:.2f} to {ms[2]:.2f})"
            shown[f"{phase}, {kind}: tokens per second"] = f"{one['tokens_per_second']:,.0f}"
    return shown
