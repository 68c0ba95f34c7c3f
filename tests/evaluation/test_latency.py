"""Predicted latency: by hand, against numpy's interpolation, against times made of known parts; and one real table."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune import artifacts, verbs
from megatron_prune.__main__ import main
from megatron_prune.checkpoint.layer_shapes import LayerShape
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.families import gpt2 as gpt2_family
from megatron_prune.errors import MegatronPruneError, UsageError
from megatron_prune.evaluation import efficiency, latency, latency_measurement
from megatron_prune.evaluation.efficiency import Workload
from megatron_prune.evaluation.latency import LatencyTable, PartSeconds, SizeGrid
from tests.evaluation import made_up_latencies

SOURCE = ModelShape(6, 96, 12, 6, 12, 192, 384, tied=False)
GRID = SizeGrid((24, 56, 96), (1, 3, 6), (1, 2), (64, 130, 192))


def table(parts: dict[str, PartSeconds], grid: SizeGrid = GRID, **changes: Any) -> LatencyTable:
    return made_up_latencies.table(SOURCE, grid, parts, **changes)


def drawn(grid: SizeGrid = GRID, seed: int = 0) -> dict[str, PartSeconds]:
    """Times without any order in them."""
    draw = np.random.default_rng(seed)
    return {
        phase: PartSeconds(
            **{part: draw.uniform(1, 2, list(map(len, axes))).tolist() for part, axes in grid.axes.items()}
        )
        for phase in latency.PHASES
    }


def test_a_prediction_by_hand() -> None:
    grid = SizeGrid((64, 96), (2, 6), (2,), (100, 192))
    attention = [[[3.0], [7.0]], [[5.0], [13.0]]]
    of_step = PartSeconds([10.0, 18.0], attention, [[1.0, 2.0], [2.0, 6.0]])
    of_prompt = PartSeconds(
        [100.0, 180.0], [[[x * 10 for x in row] for row in rows] for rows in attention], [[1, 1]] * 2
    )
    made = table({"prefill": of_prompt, "decode": of_step}, grid)
    assert made.predict(SOURCE).decode == 18 + 6 * (13 + 6)
    # Hidden 72, a quarter of the way: ends 12; 4 groups, half of it: attention 5 and 9, so 6; FFN 123, a quarter: 1.25
    # and 3, so 1.6875.
    shape = replace(
        SOURCE, num_layers=4, hidden_size=72, num_query_groups=4, num_attention_heads=8, ffn_hidden_size=123
    )
    found = made.predict(shape)
    assert found.decode == pytest.approx(12 + 4 * (6 + 1.6875), rel=1e-12)
    assert found.prefill == pytest.approx(120 + 4 * (60 + 1), rel=1e-12)
    assert (found.table, found.device, found.batch, found.prompt) == (made.hash, "a chip", 2, 9)
    # The sum is over layers, also where they differ or lack a part.
    whole, half = LayerShape(12, 6, 192), LayerShape(4, 2, 100)
    layers = [whole, half, replace(whole, ffn_hidden_size=0), LayerShape(0, 0, 192), half]
    found = made.predict(SOURCE.with_layers(layers))
    assert found.decode == pytest.approx(18 + (13 + 6) + 2 * (5 + 2) + 13 + 6, rel=1e-12)


def along_each_axis(axes: Any, values: Any, sizes: Any) -> float:
    """numpy's linear interpolation, one axis after the other."""
    found = np.array(values, float)
    for axis, size in zip(axes, sizes, strict=True):
        found = np.apply_along_axis(lambda line, axis=axis, size=size: np.interp(size, axis, line), 0, found)
    return float(found)


@pytest.mark.parametrize("seed", range(5))
def test_predictions_are_numpys_interpolation(seed: int) -> None:
    parts, draw = drawn(seed=seed), random.Random(seed)
    made = table(parts)
    for _ in range(40):
        hidden, ffn = draw.randint(24, 96), draw.randint(64, 192)
        groups, per_group, layers = draw.randint(1, 6), draw.randint(1, 2), draw.randint(1, 40)
        shape = replace(
            SOURCE, num_layers=layers, hidden_size=hidden, num_query_groups=groups,
            num_attention_heads=groups * per_group, ffn_hidden_size=ffn,
        )  # fmt: skip
        sizes = {"ends": (hidden,), "attention": (hidden, groups, per_group), "mlp": (hidden, ffn)}
        for phase in latency.PHASES:
            ends, attention, mlp = (
                along_each_axis(GRID.axes[part], getattr(parts[phase], part), sizes[part]) for part in sizes
            )
            assert getattr(made.predict(shape), phase) == pytest.approx(ends + layers * (attention + mlp), rel=1e-12)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden_size": 23}, "expected a shape with hidden size 24 to 96, as the table has them, got hidden size 23"),
        ({"hidden_size": 97}, "hidden size 24 to 96, .* got hidden size 97"),
        ({"ffn_hidden_size": 63}, "FFN 64 to 192, .* got FFN 63; measure a table with a smaller --smallest"),
        ({"num_attention_heads": 21, "num_query_groups": 7}, "query groups 1 to 6, .* got query groups 7"),
        ({"num_attention_heads": 18}, "heads per query group 1 to 2, .* got heads per query group 3"),
        ({"padded_vocab_size": 512}, "expected a table of a model with padded_vocab_size=512, got one .*=384"),
        ({"kv_channels": 8}, "kv_channels=8"),
        ({"tied": True}, "tied=True"),
        ({"linear_bias": True, "qkv_bias": True}, "linear_bias=True"),
    ],
)
def test_nothing_is_predicted_beyond_the_table(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"--latency-table: .*{said}"):
        table(drawn()).predict(replace(SOURCE, **sizes))


def test_another_family_or_type_of_weights_is_refused() -> None:
    made = table(drawn())
    made.refuse_other_model({"swiglu": True, "window_size": None}, "float32")
    for arguments, dtype, said in (
        ({"swiglu": False, "window_size": None}, "float32", "swiglu=False, got one with swiglu=True"),
        ({"swiglu": True, "window_size": [7, 0]}, "float32", r"window_size=\[7, 0\]"),
        ({"swiglu": True, "window_size": None}, "bfloat16", "dtype='bfloat16', got one with dtype='float32'"),
    ):
        with pytest.raises(UsageError, match=said):
            made.refuse_other_model(arguments, dtype)


def additive(ends: Callable[[int], float], attention: Callable[..., float], mlp: Callable[..., float]) -> Any:
    """The seconds of a shape that are made of these parts."""

    def seconds(shape: ModelShape) -> float:
        found = ends(shape.hidden_size)
        for layer in shape.by_layer():
            if layer.num_attention_heads:
                found += attention(shape.hidden_size, layer.num_query_groups, layer.heads_per_group)
            if layer.ffn_hidden_size:
                found += mlp(shape.hidden_size, layer.ffn_hidden_size)
        return found

    return seconds


MODEL = (
    lambda hidden: 2.0 + math.sqrt(hidden),
    lambda hidden, groups, per_group: 0.3 + hidden * groups * (2 * per_group + 2) / 900,
    lambda hidden, ffn: 0.1 + math.sqrt(hidden * ffn) / 7,
)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("depth", [2, 5])
def test_parts_are_those_that_the_times_are_made_of(depth: int, apart: bool) -> None:
    of_shape, (ends, attention, mlp) = additive(*MODEL), MODEL
    timed = latency_measurement.shapes_to_time(SOURCE, GRID, depth, apart)
    # One and several layers per hidden size, two other FFN sizes, five other kinds of attention, one without MLPs.
    assert len(timed) == len(set(timed)) == 3 * (2 + 2 + 5 + apart)
    seconds = {shape: of_shape(shape) for shape in timed}
    found = latency_measurement.parts_of(seconds, SOURCE, GRID, depth, apart)
    assert found.ends == pytest.approx([ends(h) for h in GRID.hidden])
    of_attention = {h: attention(h, 6, 2) for h in GRID.hidden}
    for (i, h), (j, f) in itertools.product(enumerate(GRID.hidden), enumerate(GRID.ffn)):
        assert found.mlp[i][j] == pytest.approx(mlp(h, f) + (0 if apart else of_attention[h]))
    for (i, h), (j, g), (k, p) in itertools.product(*map(enumerate, (GRID.hidden, GRID.groups, GRID.heads_per_group))):
        assert found.attention[i][j][k] == pytest.approx(attention(h, g, p) - (0 if apart else of_attention[h]))
    # Either way, whole models on the grid are predicted exactly, of any number of layers.
    made = table(dict.fromkeys(latency.PHASES, found), apart=apart)
    shape = replace(
        SOURCE, num_layers=31, hidden_size=56, num_query_groups=3, num_attention_heads=3, ffn_hidden_size=130
    )
    assert made.predict(shape).decode == pytest.approx(of_shape(shape))
    layered = SOURCE.with_layers([LayerShape(12, 6, 192), LayerShape(0, 0, 64), LayerShape(12, 6, 0)])
    if apart:
        assert made.predict(layered).decode == pytest.approx(of_shape(layered))
    else:
        with pytest.raises(UsageError, match="cannot tell attention and MLP apart"):
            made.predict(layered)


def test_the_grid_reaches_from_the_smallest_size_to_the_parents() -> None:
    def grid(source: ModelShape = SOURCE, axes: str = "hidden ffn heads groups", **changes: Any) -> SizeGrid:
        given = {"points": 3, "smallest": 0.25, "divisible_by": 8} | changes
        return latency_measurement.grid_of(source, axes.split(), **given)

    assert grid() == SizeGrid((24, 56, 96), (1, 3, 6), (1, 2), (48, 120, 192))
    assert grid(points=2) == SizeGrid((24, 96), (1, 6), (1, 2), (48, 192))
    assert grid(axes="ffn") == SizeGrid((96,), (6,), (2,), (48, 120, 192))
    assert grid(smallest=0.01, divisible_by=64).hidden == (64, 96)
    mha = replace(SOURCE, num_query_groups=12)
    assert grid(mha, "heads") == grid(mha, "groups") == SizeGrid((96,), (1, 6, 12), (1,), (192,))
    llama = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, tied=False)
    assert grid(llama, divisible_by=64) == SizeGrid((1024, 2560, 4096), (1, 4, 8), (1, 2, 4), (3584, 8960, 14336))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    made, path = table(drawn()), tmp_path / "latency.json"
    made.write(path)
    assert latency.read(path) == made and latency.read(path).hash == made.hash
    content = json.loads(path.read_text())

    def damaged(
        change: Callable[[dict[str, Any]], None], said: str, kind: type[Exception] = MegatronPruneError
    ) -> None:
        other = json.loads(path.read_text())
        change(other)
        artifacts.write_json(tmp_path / "damaged.json", other)
        with pytest.raises(kind, match=said):
            latency.read(tmp_path / "damaged.json")

    damaged(lambda one: one["grid"].update(ffn=[64, 64, 192]), "grid.ffn: expected ascending sizes")
    damaged(lambda one: one["seconds"]["decode"]["mlp"].pop(), "seconds.decode.mlp: expected finite numbers for every")
    damaged(lambda one: one["seconds"]["decode"]["mlp"][0].pop(), "seconds.decode.mlp: expected finite numbers")
    damaged(lambda one: one["seconds"]["decode"].update(ends=[1.0, -1.0, 1.0]), "decode, ends: expected times above 0")
    damaged(lambda one: one["least"]["prefill"].update(ends="x"), "damaged: least.prefill.ends: .* got 'x'")
    damaged(lambda one: one["architecture"].update(num_layers=0), "damaged: num_layers: expected at least 1")
    damaged(lambda one: one["workload"].update(batch=3), "expected the content that its hash says")
    damaged(lambda one: one.update(version=2), "--latency-table: expected a file of version 1", UsageError)
    artifacts.write_json(tmp_path / "plan.json", {"version": 1, "method": "x"})
    with pytest.raises(UsageError, match="--latency-table: expected a file of version 1 that latency-table wrote"):
        latency.read(tmp_path / "plan.json")
    assert content["device"]["name"] == "a chip" and content["workload"]["repeats"] == 4


def test_the_medians_are_over_the_repeats() -> None:
    one = PartSeconds([1.0], [[[2.0]]], [[3.0]])
    found = [one, replace(one, ends=[9.0]), replace(one, ends=[4.0], mlp=[[1.0]])]
    assert latency_measurement._over(found, np.median) == PartSeconds([4.0], [[[2.0]]], [[3.0]])
    assert latency_measurement._over(found, np.min).mlp == [[1.0]]


# -- real models --------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Models run as they do, but their times follow from their weights: a second per thousand in a linear layer."""
    real, models = efficiency.time_once, []

    def time_once(model: Any, work: Workload) -> tuple[float, float]:
        assert all(seconds > 0 for seconds in real(model, work))
        models.append(model.config)
        names = dict(model.named_parameters())
        weights = sum(one.numel() for name, one in names.items() if "_proj" in name or "embed" in name)
        return 1e-3 * weights, 1e-6 * weights

    monkeypatch.setattr(efficiency, "time_once", time_once)
    return models


def test_a_table_is_measured_on_models_of_the_parents_architecture(tiny_parent, counted, tmp_path, capsys) -> None:
    output = tmp_path / "latency.json"
    words = ["latency-table", str(tiny_parent), "--output", str(output), "--batch", "2", "--prompt", "9", "--new", "3"]
    sizes = ["--points", "2", "--smallest", "0.5", "--divisible-by", "8", "--depth", "2"]
    assert main([*words, *sizes, "--repeats", "2", "--warmup", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {output}" in printed and "measured at hidden 48, 96; groups 1, 6; heads per group 1, 2" in printed
    made, parent = latency.read(output), open_checkpoint(tiny_parent)
    assert made.architecture == parent.shape and made.apart and made.dtype == "float32"
    # For two hidden sizes: one layer, two, two of which one has no MLP, another FFN, three other kinds of attention.
    # Each warms up and is measured in each of two repeats.
    assert len(counted) == 2 * (1 + 1 + 1 + 1 + 3) * 2 * 2
    assert made.device == artifacts.device() and made.workload == Workload(2, 9, 3, 2, 1)
    # Weights are linear in each size, so that every shape between the sizes is predicted exactly.
    whole = parent.shape
    few = LayerShape(8, 4, 120)
    for shape in (
        whole,
        replace(whole, num_layers=7, hidden_size=72, num_query_groups=3, num_attention_heads=6, ffn_hidden_size=100),
        replace(whole, hidden_size=56).with_layers([few, LayerShape(12, 6, 0), LayerShape(0, 0, 96), few]),
    ):
        embedded = 379 * shape.hidden_size
        assert made.predict(shape).prefill == pytest.approx(1e-3 * (shape.linear_parameters() + embedded))
        assert made.predict(shape).decode == pytest.approx(1e-6 * (shape.linear_parameters() + embedded))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--points", "1"], "--points: expected at least 2, got 1"),
        (["--depth", "1"], "--depth: expected at least 2, got 1"),
        (["--smallest", "1"], "--smallest: expected a number between 0 and 1"),
        (["--divisible-by", "0"], "--divisible-by: expected an integer of at least 1"),
        (["--new", "0"], "--new: expected at least 1"),
        (["--axes", "depth"], "--axes: expected one of hidden, ffn, heads, groups, got depth"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str, tiny_parent, tmp_path, capsys) -> None:
    assert main(["latency-table", str(tiny_parent), "--output", str(tmp_path / "latency.json"), *words]) == 2
    assert said in capsys.readouterr().err


def test_families_that_cannot_say_every_shape(tiny_parent, monkeypatch) -> None:
    """No Qwen2 lacks an MLP; GPT-2's heads make up its hidden size; a parent with RoPE in some layers is refused."""

    def prepared(axes: tuple[str, ...], **args: Any) -> latency_measurement.TableMeasurement:
        parent = open_checkpoint(tiny_parent)
        parent.args = {**parent.args, **args}
        parent.shape = ModelShape.from_args(parent.args)
        monkeypatch.setattr(latency_measurement, "open_checkpoint", lambda _: parent)
        asked = {"checkpoint": "x", "output": "y", "axes": axes, "points": 2, "divisible_by": 8}
        return latency_measurement.prepare(verbs.LatencyTableSettings(**asked))

    assert prepared(("ffn",)).apart and len(prepared(("ffn",)).configs) == 4
    qwen2 = prepared(("hidden", "ffn"), add_qkv_bias=True)
    assert not qwen2.apart and len(qwen2.configs) == 2 * 3
    assert {config["model_type"] for config in qwen2.configs.values()} == {"qwen2"}
    gpt2 = gpt2_family.FAMILY.required | {"kv_channels": 8, "group_query_attention": False, "num_query_groups": 12}
    assert {config["model_type"] for config in prepared(("ffn",), **gpt2).configs.values()} == {"gpt2"}
    with pytest.raises(UsageError, match="--axes: expected sizes at which the parent can be exported, got hidden ffn"):
        prepared(("hidden", "ffn"), **gpt2)
    with pytest.raises(
        UsageError, match="CKPT: expected a parent whose layers all have the same attention, got .*no_ro"
    ):
        prepared(("ffn",), no_rope_freq=[0, 0, 0, 1])


def test_a_checkpoint_whose_layers_differ_is_measured_too(tiny_parent, tmp_path) -> None:
    from megatron_prune.api.checkpoints import benchmark
    from tests.structured import layered

    made = layered.cut(tiny_parent, tmp_path / "cut")
    assert isinstance(open_checkpoint(made).shape, HeterogeneousShape)
    (found,) = benchmark(made, prompt=9, new=2, repeats=1, warmup=0)["models"]
    assert found["measured"]["dense"]["decode"]["seconds"] > 0


def test_fields_are_those_of_the_workload() -> None:
    """The schema of the file names them one by one."""
    assert set(latency._WorkloadFile.__annotations__) == set(asdict(Workload()))
