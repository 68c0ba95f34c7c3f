"""The verbs that train and measure: ``pretrain``, ``teach``, ``learn-masks``, ``evaluate``, ``benchmark`` and
``latency-table``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune import verbs
from megatron_prune.cli.parser import (
    FP8,
    LAYOUT,
    LOAD,
    MODEL,
    PARALLEL_RESIDUAL,
    SHAPE_FROM,
    TOKENIZER,
    Parser,
    start_engine,
)
from megatron_prune.screen import say

RUN = "the run (Megatron's flags)"


def pretrain_parser() -> Parser:
    return Parser(
        "pretrain",
        "Trains with Megatron's own loop, from random weights, a pruned checkpoint or the run's own last "
        "save, and keeps an account of it. All of Megatron's flags work as usual; listed are our own, and the few "
        "Megatron flags that every run needs.",
        verbs.PretrainSettings,
        mentioned=(
            (RUN, "--save", "RUN", "where the run is saved, with its account.json; a run that it holds is continued"),
            (RUN, "--pretrained-checkpoint", "CKPT", "weights to start from, such as what apply wrote"),
            (RUN, "--data-path", "PREFIX …", "tokenized corpora, without .bin; or WEIGHT PREFIX …"),
            (RUN, "--seq-length", "S", "tokens per sample"),
            (RUN, "--global-batch-size", "B", "samples per step"),
            (RUN, "--micro-batch-size", "b", "samples per rank at a time"),
            (RUN, "--train-iters", "N", "steps; follows from --stream-range where that is given"),
            (RUN, "--lr", "LR", "learning rate; --lr-decay-style, --lr-warmup-fraction, --min-lr"),
            (RUN, "--seed", "N", "seed of initial weights and dropout"),
            *TOKENIZER, *LAYOUT, SHAPE_FROM, PARALLEL_RESIDUAL, FP8,
        ),
        example="""
torchrun --nproc-per-node 8 -m megatron_prune pretrain --pretrained-checkpoint checkpoints/pruned \\
    --save runs/retrained --data-path data/train --seq-length 2048 \\
    --global-batch-size 256 --micro-batch-size 4 --stream-range 0:256000 --lr 3e-4""",
    )  # fmt: skip


def pretrain_main(argv: list[str]) -> int:
    """Train; returns 0 if the run is complete, even if it already was."""
    options, words = pretrain_parser().read(argv)
    own = verbs.PretrainSettings.of(options)
    start_engine()
    from megatron_prune.training.pretrain import train

    return train(own, words)


def teach_parser() -> Parser:
    return Parser(
        "teach",
        "Runs a teacher once over a range of a token stream and writes its most probable next tokens to a cache, which "
        "every pretrain --teacher-cache on that range reads. A stopped run goes on with the same command.",
        verbs.TeachSettings,
        mentioned=(
            LOAD,
            (MODEL, "--train-data-path", "PREFIX …", "the corpora of the stream, as for pretrain"),
            (MODEL, "--seq-length", "S", "tokens per sample, as for pretrain"),
            (MODEL, "--micro-batch-size", "B", "samples per rank at a time (default: 1)"),
            *LAYOUT, FP8,
        ),
        example="""
torchrun --nproc-per-node 8 -m megatron_prune teach --load checkpoints/parent --train-data-path data/train \\
    --seq-length 2048 --stream-range 0:256000 --top-k 64 --output caches/parent""",
    )  # fmt: skip


def teach_main(argv: list[str]) -> int:
    """Write what a teacher says on a range of a stream, for every run that distils."""
    options, words = teach_parser().read(argv)
    own = verbs.TeachSettings.of(options)
    start_engine()
    from megatron_prune.training.teach import teach

    made = teach(own, words)
    if made.tokens:
        say(f"taught {made.tokens:,} tokens in {made.seconds:.1f} s, {made.tokens / made.seconds:,.0f} tokens/s")
        say(f"wrote {made.folder}")
    return 0


def learn_masks_parser() -> Parser:
    return Parser(
        "learn-masks",
        "Trains a checkpoint together with masks on its layers, heads and channels, until the unmasked part has "
        "the requested size. Writes the weights and learned_masks.safetensors, which plan reads. Every flag of "
        "pretrain but those of its objective works too.",
        verbs.LearnMasksSettings,
        mentioned=(
            (RUN, "--pretrained-checkpoint", "CKPT", "the parent, whose weights are trained too"),
            (RUN, "--use-checkpoint-args", None, "take the model's arguments from that checkpoint"),
            (RUN, "--save", "RUN", "where weights and masks are saved; a run that it holds is continued"),
            (RUN, "--data-path", "PREFIX …", "tokenized corpora, without .bin; or WEIGHT PREFIX …"),
            (RUN, "--seq-length", "S", "tokens per sample"),
            (RUN, "--global-batch-size", "B", "samples per step; the paper has few, and 3,200 steps"),
            (RUN, "--micro-batch-size", "b", "samples per rank at a time, under one draw of the masks"),
            (RUN, "--lr", "LR", "weights, 1e-4 in the paper; --lr-decay-style, --lr-warmup-fraction, --min-lr"),
            *LAYOUT,
        ),
        example="""
torchrun --nproc-per-node 8 -m megatron_prune learn-masks --pretrained-checkpoint checkpoints/parent \\
    --use-checkpoint-args --save runs/masked --ratio 0.5 --data-path data/train --seq-length 4096 \\
    --global-batch-size 32 --micro-batch-size 4 --stream-range 0:102400 --lr 1e-4 --min-lr 1e-5 --adam-beta2 0.95""",
    )  # fmt: skip


def learn_masks_main(argv: list[str]) -> int:
    """Learn masks; 0 when the run is complete, also when it was so before."""
    options, words = learn_masks_parser().read(argv)
    own = verbs.LearnMasksSettings.of(options)
    start_engine()
    from megatron_prune.pruning.learn_masks import learn_masks

    return learn_masks(own, words)


def evaluate_parser() -> Parser:
    return Parser(
        "evaluate",
        "Scores a checkpoint on fixed windows of tokenized corpora, the same for every checkpoint and layout, and "
        "writes losses and perplexities. With --tasks it also runs lm-eval tasks, with the model loaded once.",
        verbs.EvaluateSettings,
        mentioned=(
            LOAD,
            (MODEL, "--data-path", "PREFIX …", "tokenized corpora, without .bin"),
            (MODEL, "--seq-length", "S", "tokens per window"),
            (MODEL, "--micro-batch-size", "B", "windows per batch (default: 1)"),
            *TOKENIZER, *LAYOUT, FP8,
        ),
        example="""
megatron-prune evaluate --load checkpoints/pruned --seq-length 2048 \\
    --data-path data/validation data/test --labels validation test --output scores.json""",
    )  # fmt: skip


def evaluate_main(argv: list[str]) -> int:
    """Loss and perplexity of a checkpoint on fixed windows; lm-eval's tasks."""
    options, words = evaluate_parser().read(argv)
    own = verbs.EvaluateSettings.of(options)
    start_engine()
    from megatron_prune.evaluation.evaluate import evaluate

    scores = evaluate(own, words)
    for label, found in scores["corpora"].items():
        say(
            f"{label}: loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f} "
            f"over {found['predictions']:,} predictions"
        )
    say(f"wrote {own.output}")
    return 0


def benchmark_parser() -> Parser:
    return Parser(
        "benchmark",
        "Compares what checkpoints cost to run: parameters, FLOPs of a forward pass over 2,048 tokens, memory of "
        "weights and cache, and measured latency and throughput on this machine, in transformers. 2:4 models are "
        "measured where the GPU has kernels for them.",
        verbs.BenchmarkSettings,
        example="megatron-prune benchmark checkpoints/parent checkpoints/pruned --output efficiency.json",
    )


def benchmark_main(argv: list[str]) -> int:
    """What checkpoints cost to run."""
    asked = verbs.BenchmarkSettings.of(benchmark_parser().read(argv)[0])
    from rich.console import Console
    from rich.table import Table

    from megatron_prune.api.checkpoints import run_benchmark

    found = run_benchmark(asked)
    table = Table(title="FLOPs of a forward pass over 2,048 tokens; latency: median (least to most)")
    for head in ("", *(model["path"] for model in found["models"])):
        table.add_column(head, justify="right" if head else "left")
    columns = [benchmark_rows(model) for model in found["models"]]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(table)
    if asked.output is not None:
        print(f"wrote {asked.output}")
    return 0


def benchmark_rows(model: Mapping[str, Any]) -> dict[str, str]:
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


def latency_table_parser() -> Parser:
    return Parser(
        "latency-table",
        "Measures how long the parts of a model take on this machine, at a few sizes up to those of a parent, as "
        "benchmark measures checkpoints. From the table that it writes, plan, prune and studies predict the latency of "
        "every shape that a search tries: --at-most latency=TIME --latency-table FILE. Nothing else should run.",
        verbs.LatencyTableSettings,
        example="megatron-prune latency-table checkpoints/parent --output latency.json --batch 8 --prompt 2048",
    )


def latency_table_main(argv: list[str]) -> int:
    """Measure what predicts the latency of shapes."""
    asked = verbs.LatencyTableSettings.of(latency_table_parser().read(argv)[0])
    from megatron_prune.evaluation.latency_measurement import measure_table

    table = measure_table(asked)
    whole = table.predict(table.architecture)
    sizes = "; ".join(f"{name} {', '.join(map(str, found))}" for name, found in table.grid.sizes.items())
    say(f"measured at {sizes}")
    say(f"predicts of the parent: {1e3 * whole.decode:.2f} ms per step, prefill {1e3 * whole.prefill:.2f} ms")
    say(f"wrote {asked.output}")
    return 0
