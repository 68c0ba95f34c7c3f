"""Limits of latency: which shapes are left, which one wins, what the plan says, and every refusal.

The table is made up: its times are linear in every size, so that the expected ones can be written out.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_prune import verbs
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.pruning_commands import plan_main
from megatron_prune.cli.pruning_tables import show_plan
from megatron_prune.convert.families.model_family import told_apart
from megatron_prune.errors import UsageError
from megatron_prune.evaluation.latency import SizeGrid
from megatron_prune.methods import options
from megatron_prune.structured import choice as choices
from megatron_prune.structured import limits, plan
from megatron_prune.structured.candidate import with_scores
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics, tensor_shapes
from tests.evaluation.made_up_latencies import table_of

SMALL = ModelShape(6, 96, 12, 6, 8, 192, 384, tied=True)
GRID = SizeGrid((16, 96), (1, 6), (1, 2), (8, 192))
STEP = {
    "ends": lambda hidden: 1e-3 * (2 + hidden / 16),
    "attention": lambda hidden, groups, per_group: 1e-3 * (0.5 + hidden * groups * (per_group + 1) / 1000),
    "mlp": lambda hidden, ffn: 1e-3 * (0.1 + hidden * ffn / 9000),
}
AXES = {
    "minitron-width": options.MinitronWidthOptions(search=("hidden", "ffn", "groups", "depth")),
    "minitron-depth": options.MinitronDepthOptions(),
    "shortgpt": options.NoOptions(),
}


def step_of(shape: ModelShape) -> float:
    """Milliseconds of a step, written out for equal layers."""
    hidden, groups, per_group = shape.hidden_size, shape.num_query_groups, shape.heads_per_group
    layer = 0.5 + hidden * groups * (per_group + 1) / 1000 + 0.1 + hidden * shape.ffn_hidden_size / 9000
    return 2 + hidden / 16 + shape.num_layers * layer


def write_table(path: Path, source: ModelShape = SMALL, grid: SizeGrid = GRID, **changes: Any) -> str:
    """Reading the prompts takes 50 times as long as a step."""
    prompt = {part: lambda *sizes, one=one: 50 * one(*sizes) for part, one in STEP.items()}
    table_of(source, grid, prefill=prompt, decode=STEP, **changes).write(path)
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write_table(tmp_path / "latency.json")


def asked(method: str = "minitron-width", own: Any = None, **target: Any) -> choices.Choice:
    target = {"ratio": 0.5, "divisible_by": 8} | target
    return choices.choose(method, verbs.TargetSettings.read(target), own or AXES[method])


def test_the_shapes_that_keep_to_a_limit_are_left(file: str) -> None:
    every = asked().shapes(SMALL)
    most = sorted(map(step_of, every))[len(every) // 3]
    within = tuple(shape for shape in every if step_of(shape) <= most)
    assert 0 < len(within) < len(every)
    assert asked(latency_table=file, at_most=[f"latency={most + 1e-6:.6f}ms"]).shapes(SMALL) == within
    assert asked(latency_table=file, at_most=[f"prefill={50e3 * most + 1e-3:.3f}us"]).shapes(SMALL) == within
    # With another limit, a shape keeps to both.
    cache = sorted(shape.num_layers * shape.num_query_groups * 32 for shape in every)[len(every) // 2]
    both = asked(latency_table=file, at_most=[f"cache={cache}", f"latency={most + 1e-6:.6f}ms"]).shapes(SMALL)
    assert both == tuple(shape for shape in within if shape.num_layers * shape.num_query_groups * 32 <= cache)
    assert len(both) < len(within)
    least = min(map(step_of, every)) - 0.01
    with pytest.raises(UsageError, match="--at-most: expected a shape within latency=.*ms, got a shape with a predic"):
        asked(latency_table=file, at_most=["cache=1M", f"latency={least:.6f}ms"]).shapes(SMALL)


def test_the_rule_for_widths_takes_the_first_shape_within_a_limit(file: str) -> None:
    rule, search = options.MinitronWidthOptions(), options.MinitronWidthOptions(search=("hidden", "ffn"))
    every = asked(own=search).shapes(SMALL)
    assert asked(own=rule).shapes(SMALL) == every[:1]
    for limit in (step_of(every[0]) + 1e-6, step_of(every[0]) - 0.01):
        first = next(shape for shape in every if step_of(shape) <= limit)
        assert asked(own=rule, latency_table=file, at_most=[f"latency={limit:.6f}ms"]).shapes(SMALL) == (first,)
    assert first != every[0]


@pytest.mark.parametrize("method", ["minitron-depth", "shortgpt"])
def test_a_shape_that_a_rule_makes_is_refused_with_its_prediction(method: str, file: str) -> None:
    (shape,) = asked(method).shapes(SMALL)
    time = step_of(shape)
    assert asked(method, latency_table=file, at_most=[f"latency={time + 1e-6:.6f}ms"]).shapes(SMALL) == (shape,)
    said = f"within latency={time - 0.01:.6g}ms, got a shape with a predicted latency of {time:.6g}ms"
    with pytest.raises(UsageError, match=said):
        asked(method, latency_table=file, at_most=[f"latency={time - 0.01:.6g}ms"]).shapes(SMALL)
    with pytest.raises(UsageError, match=f"within prefill=1ms, got .* predicted prefill of {50 * time:.6g}ms"):
        asked(method, latency_table=file, at_most=["latency=1s", "prefill=1000us"]).shapes(SMALL)


def statistics(shape: ModelShape, parent: str = "parent", **more: Any) -> Statistics:
    generator = torch.Generator().manual_seed(0)
    sizes = tensor_shapes(shape, **more)
    tensors = {name: torch.rand(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    run = {"prefix": "p", "corpus": "c", "sampling": "sequential", "seed": None, "windows": [0, 1, 2]}
    return Statistics(tensors, shape, parent, 5, 3, 30.0, (run,))


def winner(choice: choices.Choice) -> plan.PruningPlan:
    """The plan, where the slowest shapes have the lowest loss."""
    question = Question("minitron-width", choice.settings, SMALL, choice.shapes(SMALL), "parent")
    found = statistics(SMALL)
    while (run := question.next_run(found)) is not None:
        losses = [9 - step_of(one.target) / 10 for one in run.candidates]
        found = with_scores(found, run.candidates, losses, run.windows)
    return choice.make(question, found)


def test_a_limit_changes_the_winner_and_the_plan_says_the_prediction(file: str, tmp_path: Path) -> None:
    own = options.MinitronWidthOptions(search=("hidden", "ffn", "groups"))
    free = winner(asked(own=own))
    times = sorted({step_of(shape) for shape in asked(own=own).shapes(SMALL)})
    assert step_of(free.target) == times[-1] and free.latency is None and "latency" not in free._json()
    limited = winner(asked(own=own, latency_table=file, at_most=[f"latency={times[-1] - 1e-4:.6f}ms"]))
    assert step_of(limited.target) == times[-2] and limited.target != free.target
    assert len(limited.candidates) < len(free.candidates)
    assert limited.latency is not None and limited.latency.decode == pytest.approx(1e-3 * times[-2])
    assert limited.latency.prefill == pytest.approx(0.05 * times[-2])
    limited.write(tmp_path / "plan.json")
    assert plan.read(tmp_path / "plan.json") == limited
    shown = io.StringIO()
    show_plan(limited, Console(file=shown, width=200))
    said = f"predicted: {times[-2]:.6g}ms per step, prefill {50 * times[-2]:.6g}ms (a chip, batch 2, prompt 9; table "
    assert said + limited.latency.table[:16] in shown.getvalue()


def test_a_table_that_cannot_tell_is_refused(file: str, tmp_path: Path) -> None:
    limit = {"at_most": ["latency=1s"]}
    # Of the shapes near the target, some have an FFN below the table's smallest.
    narrow = write_table(tmp_path / "narrow.json", grid=replace(GRID, ffn=(96, 192)))
    with pytest.raises(UsageError, match="--latency-table: expected a shape with FFN 96 to 192, .* got FFN "):
        asked(latency_table=narrow, **limit).shapes(SMALL)
    for source in (replace(SMALL, padded_vocab_size=512), replace(SMALL, tied=False)):
        with pytest.raises(UsageError, match="--latency-table: expected a table of a model with (padded_vocab|tied)"):
            asked(latency_table=file, **limit).shapes(source)
    # flap adds biases, which the table's models do not have.
    with pytest.raises(UsageError, match="a table of a model with linear_bias=True, got one with linear_bias=False"):
        asked("flap", options.FlapOptions(), latency_table=file, **limit).shapes(SMALL)
    asked("flap", options.FlapOptions(compensate=False), latency_table=file, **limit).shapes(SMALL)
    with pytest.raises(UsageError, match="--latency-table: expected a table that predicts latency, got nothing; meas"):
        asked(**limit)
    for words in ([], ["cache=1M"]):
        with pytest.raises(UsageError, match="--at-most: expected latency= or prefill= with --latency-table, got "):
            asked(latency_table=file, at_most=words)
    for wrong in ("latency=0ms", "latency=5", "latency=5min", "latency=-1ms", "latency=1ms latency=2ms", "decode=1ms"):
        with pytest.raises(UsageError, match="--at-most: expected memory=BYTES@TOKENS, .*latency=12ms"):
            asked(latency_table=file, at_most=wrong.split())


@pytest.mark.parametrize(
    ("text", "time"), [("12ms", 0.012), ("0.3s", 0.3), ("800us", 0.0008), ("2s", 2.0), ("1.5ms", 0.0015)]
)
def test_times_have_units(text: str, time: float) -> None:
    assert limits.seconds(text) == time


def test_layers_that_differ_keep_to_the_limits_too(tiny_parent: Path, tmp_path: Path) -> None:
    """A layer that stays wide takes far longer than the mean of the layers, by which the target is chosen."""
    parent = open_checkpoint(tiny_parent)
    own = options.LLMPrunerOptions(allocation="global")
    (even,) = asked("llm-pruner", own, divisible_by=4, ratio=0.4).shapes(parent.shape)
    sums = statistics(parent.shape, parent.fingerprint(), gradients=True)
    for name in ("qkv.first", "proj.first", "fc1.first", "fc2.first"):
        sums.tensors[name] *= torch.arange(1, 5)[:, None]  # the first layers matter least
    ffn = even.ffn_hidden_size
    parts = {
        "ends": lambda hidden: 1.0,
        "attention": lambda hidden, groups, per_group: 1.0,
        "mlp": lambda hidden, size: {4: 1.0, ffn: 1.0, 192: 101.0}[size],
    }
    grid = SizeGrid((96,), (1, 6), (1, 2), (4, ffn, 192))
    args = told_apart(parent.args)
    table_of(parent.shape, grid, prefill=parts, decode=parts, arguments=args).write(tmp_path / "latency.json")

    def made(limit: str) -> plan.PruningPlan:
        file = str(tmp_path / "latency.json")
        choice = asked("llm-pruner", own, divisible_by=4, ratio=0.4, latency_table=file, at_most=[f"latency={limit}"])
        return choice.make(choice.question(parent), sums)

    found = made("1000s")
    assert isinstance(found.target, HeterogeneousShape) and found.latency is not None
    sizes = [layer.ffn_hidden_size for layer in found.target.layers if layer.ffn_hidden_size]
    expected = 1 + sum(1 + 100 * max(0, size - ffn) / (192 - ffn) for size in sizes)
    expected += sum(layer.num_attention_heads > 0 for layer in found.target.layers)
    assert found.latency.decode == pytest.approx(expected) and expected > 10
    with pytest.raises(UsageError, match=f"expected a shape within latency=10000ms, got .* of {1e3 * expected:.6g}ms"):
        made("10s")


def test_the_verb_reads_the_table_of_its_parent(tiny_parent: Path, tmp_path: Path, capsys: Any) -> None:
    parent = open_checkpoint(tiny_parent)
    own = {"arguments": told_apart(parent.args)}
    table = write_table(tmp_path / "latency.json", parent.shape, **own)
    words = [
        "--load",
        str(tiny_parent),
        "--output",
        str(tmp_path / "plan.json"),
        "--method",
        "random",
        "--axis",
        "depth",
    ]
    words += ["--ratio", "0.5", "--at-most", "latency=1s", "--latency-table"]
    assert plan_main([*words, table]) == 0
    found = plan.read(tmp_path / "plan.json").latency
    assert found is not None and found.decode == pytest.approx(1e-3 * step_of(replace(parent.shape, num_layers=2)))
    assert "predicted: " in capsys.readouterr().out
    half = write_table(tmp_path / "half.json", parent.shape, dtype="bfloat16", **own)
    with pytest.raises(UsageError, match="with dtype='float32', got one with dtype='bfloat16'"):
        plan_main([*words, half])
    other = write_table(tmp_path / "other.json", parent.shape, arguments=own["arguments"] | {"qk_layernorm": True})
    with pytest.raises(UsageError, match="with qk_layernorm=False, got one with qk_layernorm=True"):
        plan_main([*words, other])
