"""From flags to shapes: the stated rule by brute force, the paper's shapes, and every refusal."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from math import log
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_prune import methods, verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import UsageError
from megatron_prune.methods import options
from megatron_prune.settings import Settings, add_flags
from megatron_prune.structured import choice as choices
from megatron_prune.structured import target as targets

LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, tied=False)
SMOLLM2 = ModelShape(30, 576, 9, 3, 64, 1536, 49152, tied=True)
SMALL = ModelShape(6, 96, 12, 6, 8, 192, 384, tied=True)
MHA = replace(SMALL, num_query_groups=12)


def read[S: Settings](cls: type[S], *flags: str) -> S:
    parser = argparse.ArgumentParser()
    add_flags(parser, cls)
    return cls.of(parser.parse_args(flags))


def choose(source: ModelShape, method: str, *flags: str, axis: str | None = None, tp: int = 1) -> ModelShape:
    target = targets.from_settings(read(verbs.TargetSettings, *flags), (), tp)
    return target.choose(
        source, methods.get(method), options.RandomOptions(axis=axis) if method == "random" else options.NoOptions()
    )


def test_depth_by_ratio_is_the_rounded_number_of_layers() -> None:
    assert choose(LLAMA_8B, "shortgpt", "--ratio", "0.5") == replace(LLAMA_8B, num_layers=16)
    for ratio in (0.2, 0.3, 0.5, 0.7):
        assert choose(SMALL, "shortgpt", "--ratio", str(ratio)).num_layers == 6 - round(6 * ratio)


def test_depth_by_ratio_of_all_takes_the_nearest() -> None:
    # Removing half of all parameters takes more than half of the layers, since embeddings stay.
    found = choose(LLAMA_8B, "shortgpt", "--ratio", "0.5", "--ratio-of", "all").num_layers
    distance = {n: abs(replace(LLAMA_8B, num_layers=n).parameters() - LLAMA_8B.parameters() / 2) for n in range(1, 32)}
    assert found == min(distance, key=lambda n: distance[n]) == 14


def test_depth_by_parameters() -> None:
    wanted = replace(LLAMA_8B, num_layers=20)
    assert choose(LLAMA_8B, "shortgpt", "--target-params", str(wanted.parameters() + 1000)) == wanted


@pytest.mark.parametrize(
    ("flags", "expected", "stay"),
    [
        # 16 layers of Llama-3.1-8B: 4.54B parameters stay. Shapes of the paper, by explicit sizes.
        (["--target-num-layers", "16"], {"num_layers": 16}, 4.54e9),
        (["--target-hidden-size", "3072", "--target-ffn-hidden-size", "9216"], {}, 4.51e9),
        (["--target-hidden-size", "2432", "--target-ffn-hidden-size", "6144"], {}, 2.9e9),
    ],
)
def test_sizes_of_the_paper(flags: list[str], expected: dict[str, int], stay: float) -> None:
    shape = choose(LLAMA_8B, "random", *flags)
    assert all(getattr(shape, key) == value for key, value in expected.items())
    assert shape.kv_channels == 128 and shape.num_attention_heads == 32
    assert shape.parameters() == pytest.approx(stay, rel=0.05 if stay < 4e9 else 0.002)


OWN_SIZES = replace(SMALL, tied=False, ffn_hidden_size=200, hidden_size=90)


@settings(max_examples=40, deadline=None)
@example(ratio=0.640625, ratio_of="all", step=8, tp=3, source=OWN_SIZES, exponent=None)  # 3 ranks do not share 200
@given(
    ratio=st.floats(0.2, 0.85),
    ratio_of=st.sampled_from(["linears", "all"]),
    step=st.sampled_from([4, 8]),
    tp=st.sampled_from([1, 2, 3]),
    source=st.sampled_from([SMALL, OWN_SIZES]),
    exponent=st.sampled_from([None, 1.0, 3.5]),
)
def test_width_by_ratio_is_the_best_of_all_shapes(
    ratio: float, ratio_of: str, step: int, tp: int, source: ModelShape, exponent: float | None
) -> None:
    def count(shape: ModelShape) -> int:
        return shape.linear_parameters() if ratio_of == "linears" else shape.parameters()

    goal = (1 - ratio) * count(source)
    # The rule, by enumeration: for each hidden size the FFN size that comes nearest …
    hiddens = sorted({*range(step, source.hidden_size, step), source.hidden_size})
    ffn_steps = [n for n in {*range(step, source.ffn_hidden_size, step), source.ffn_hidden_size} if n % tp == 0]
    best: dict[int, tuple[float, ModelShape]] = {}
    for hidden in hiddens:
        for ffn in sorted(ffn_steps, reverse=True):  # of two that are as near, the larger
            shape = replace(source, hidden_size=hidden, ffn_hidden_size=ffn)
            error = abs(count(shape) - goal)
            if shape != source and (hidden not in best or error < best[hidden][0]):
                best[hidden] = (error, shape)
    # … and among those within the tolerance the most even.
    fits = [(error, shape) for error, shape in best.values() if error <= 0.02 * goal]
    flags = ["--ratio", repr(ratio), "--ratio-of", ratio_of, "--divisible-by", str(step)]
    flags += [] if exponent is None else ["--ffn-exponent", str(exponent)]
    if not fits:
        with pytest.raises(UsageError, match="the nearest is hidden"):
            choose(source, "minitron-width", *flags, tp=tp)
        return

    def unevenness(shape: ModelShape) -> float:
        kept = shape.hidden_size / source.hidden_size, shape.ffn_hidden_size / source.ffn_hidden_size
        return abs((exponent or 2) * log(kept[0]) - log(kept[1]))

    found = choose(source, "minitron-width", *flags, tp=tp)
    assert abs(count(found) / goal - 1) <= 0.02
    assert unevenness(found) == pytest.approx(min(unevenness(shape) for _, shape in fits), abs=1e-9)
    assert found.num_attention_heads == source.num_attention_heads


def test_width_by_parameters_and_tolerance() -> None:
    wanted = replace(LLAMA_8B, hidden_size=3072, ffn_hidden_size=9216)
    found = choose(LLAMA_8B, "minitron-width", "--target-params", str(wanted.parameters()))
    assert found.parameters() == pytest.approx(wanted.parameters(), rel=0.02)
    assert found.hidden_size % 64 == found.ffn_hidden_size % 64 == 0
    with pytest.raises(
        UsageError, match=r"--ratio: expected .*, got 0\.37.*nearest is hidden .* give a smaller --divisible-by"
    ):
        choose(SMALL, "minitron-width", "--ratio", "0.37", "--tolerance", "0.0001", "--divisible-by", "32")


def test_explicit_heads_and_groups() -> None:
    by_8 = ["--divisible-by", "8"]
    assert choose(MHA, "minitron-width", "--target-num-attention-heads", "5", *by_8) == replace(
        MHA, num_attention_heads=5, num_query_groups=5
    )
    assert choose(SMALL, "minitron-width", "--target-num-attention-heads", "6", *by_8) == replace(
        SMALL, num_attention_heads=6
    )
    assert choose(SMALL, "minitron-width", "--target-num-query-groups", "2", *by_8) == replace(
        SMALL, num_attention_heads=4, num_query_groups=2
    )


def test_random_cuts_depth_and_width_at_once() -> None:
    flags = ["--target-num-layers", "3", "--target-ffn-hidden-size", "64"]
    assert choose(SMALL, "random", *flags) == replace(SMALL, num_layers=3, ffn_hidden_size=64)
    assert choose(SMALL, "random", "--ratio", "0.5", axis="depth").num_layers == 3
    assert choose(SMALL, "random", "--ratio", "0.5", "--divisible-by", "8", axis="width").num_layers == 6


# -- shapes that compete -----------------------------------------------------------------------------


def near(source: ModelShape, axes: str, *flags: str, tp: int = 1) -> list[ModelShape]:
    search = methods.get("minitron-width").search(options.MinitronWidthOptions(search=tuple(axes.split())))
    assert search is not None
    return targets.from_settings(read(verbs.TargetSettings, *flags), (), tp).near(source, search)


# Hidden/FFN of the paper's candidates for Llama-3.1-8B, 32 heads each. Its percentages are names.
PAPER = {
    "62.5%": [(2176, 7168), (2304, 6656), (2432, 6144), (2560, 6400), (2688, 5888)],
    "75%": [(1664, 6656), (1792, 6016), (1920, 5248), (2048, 4480)],
    "81.3%": [(1408, 5632), (1536, 4736), (1664, 3840)],
}


@pytest.mark.parametrize("name", PAPER)
def test_search_offers_the_papers_candidates(name: str) -> None:
    shapes = [replace(LLAMA_8B, hidden_size=hidden, ffn_hidden_size=ffn) for hidden, ffn in PAPER[name]]
    counts = [shape.parameters() for shape in shapes]
    if name == "62.5%":
        assert (round(min(counts) / 1e9, 2), round(max(counts) / 1e9, 2)) == (2.77, 3.09)
    if name == "81.3%":
        removed = [1 - count / LLAMA_8B.parameters() for count in counts]
        assert 0.801 <= min(removed) and max(removed) <= 0.803
    middle = (min(counts) + max(counts)) // 2
    tolerance = str((max(counts) - min(counts)) / 2 / middle + 1e-6)
    flags = ["--target-params", str(middle), "--tolerance", tolerance, "--divisible-by", "128"]
    found = near(LLAMA_8B, "hidden ffn", *flags)
    assert set(shapes) <= set(found)
    assert all(min(counts) <= shape.parameters() <= max(counts) for shape in found)
    assert all(shape.hidden_size % 128 == shape.ffn_hidden_size % 128 == 0 for shape in found)
    assert {shape.num_attention_heads for shape in found} == {32}


@settings(max_examples=25, deadline=None)
@given(
    ratio=st.floats(0.2, 0.8),
    ratio_of=st.sampled_from(["linears", "all"]),
    axes=st.sampled_from(
        ["ffn", "hidden ffn", "hidden heads", "ffn heads", "ffn groups", "hidden ffn heads groups", "depth hidden ffn"]
    ),
    tp=st.sampled_from([1, 2, 3]),
    source=st.sampled_from([SMALL, MHA]),
)
def test_search_finds_every_shape_within_the_tolerance(
    ratio: float, ratio_of: str, axes: str, tp: int, source: ModelShape
) -> None:
    def count(shape: ModelShape) -> int:
        return shape.linear_parameters() if ratio_of == "linears" else shape.parameters()

    def sizes(axis: str, whole: int, step: int = 1) -> list[int]:
        return [n for n in range(1, whole + 1) if n == whole or (axis in axes and n % step == 0)]

    goal, expected = (1 - ratio) * count(source), set()
    groups_axis = "heads" if source is MHA and "heads" in axes else "groups"
    for layers, hidden, groups, per_group, ffn in itertools.product(
        sizes("depth", source.num_layers),
        sizes("hidden", source.hidden_size, 8),
        sizes(groups_axis, source.num_query_groups),
        sizes("heads", source.heads_per_group),
        sizes("ffn", source.ffn_hidden_size, 8),
    ):
        heads = groups * per_group
        if heads % tp or ffn % tp or (groups % tp and tp % groups):
            continue  # heads are of 8 channels, so --divisible-by 8 allows any number
        shape = replace(
            source, num_layers=layers, hidden_size=hidden, num_query_groups=groups, num_attention_heads=heads,
            ffn_hidden_size=ffn,
        )  # fmt: skip
        if shape != source and abs(count(shape) / goal - 1) <= 0.02:
            expected.add(shape)
    flags = ["--ratio", repr(ratio), "--ratio-of", ratio_of, "--divisible-by", "8"]
    if not expected:
        with pytest.raises(UsageError, match="the nearest is"):
            near(source, axes, *flags, tp=tp)
        return
    found = near(source, axes, *flags, tp=tp)
    assert set(found) == expected and len(found) == len(expected)


def test_search_puts_even_shapes_first_and_the_rule_is_its_first_choice() -> None:
    flags = ["--ratio", "0.5", "--divisible-by", "4"]
    found = near(SMALL, "hidden ffn", *flags)
    assert found[0] == choose(SMALL, "minitron-width", *flags)
    first = {}
    for place, shape in enumerate(found):
        first.setdefault(shape.hidden_size, place)
    # The nearest FFN size of every hidden size comes before any second-nearest.
    assert sorted(first.values()) == list(range(len(first)))


def test_limits_leave_the_shapes_that_keep_to_them() -> None:
    flags = ["--ratio", "0.5", "--divisible-by", "8"]
    every = near(SMALL, "hidden ffn groups depth", *flags)

    def cache(shape: ModelShape) -> int:  # keys and values, 16 bits
        return shape.num_layers * 2 * shape.num_query_groups * shape.kv_channels * 2

    within = [shape for shape in every if cache(shape) <= 400]
    assert 0 < len(within) < len(every)
    assert near(SMALL, "hidden ffn groups depth", *flags, "--at-most", "cache=400") == within
    memory = {shape: 2 * shape.parameters() + 1000 * cache(shape) for shape in every}
    most = sorted(memory.values())[len(memory) // 3]
    within = [shape for shape in every if memory[shape] <= most]
    assert near(SMALL, "hidden ffn groups depth", *flags, "--at-most", f"memory={most}@1k") == within
    for words in (["cache=100"], [f"memory={min(memory.values()) - 1}@1k", "cache=8k"]):
        with pytest.raises(UsageError, match="--at-most: expected a shape within (cache|memory)=.*, got a shape "):
            near(SMALL, "hidden ffn groups depth", *flags, "--at-most", *words)
    with pytest.raises(UsageError, match="--at-most: expected a shape within cache=100, got a shape with 1152 bytes"):
        choose(SMALL, "minitron-width", *flags, "--at-most", "cache=100")
    with pytest.raises(UsageError, match="--at-most: expected a shape within cache=100, got a shape with 576 bytes"):
        choose(SMALL, "shortgpt", *flags, "--at-most", "cache=100")
    for wrong in ("memory=6G", "cache=1@2", "cache=x", "speed=3", "cache=0", "cache=1k cache=2k", "latency=3"):
        with pytest.raises(UsageError, match="--at-most: expected memory=BYTES@TOKENS, cache=BYTES, latency="):
            near(SMALL, "ffn", *flags, "--at-most", *wrong.split())


def test_heads_stay_if_they_are_to() -> None:
    flags = ["--ratio", "0.3", "--divisible-by", "8"]
    assert choose(SMALL, "llm-pruner", *flags).num_query_groups < SMALL.num_query_groups
    kept = choose(SMALL, "llm-pruner", *flags, "--keep-heads")
    assert kept == replace(SMALL, ffn_hidden_size=kept.ffn_hidden_size)
    with pytest.raises(UsageError, match="--keep-heads: expected one of the two, got --target-num-query-groups"):
        choose(SMALL, "random", "--target-num-query-groups", "3", "--keep-heads")
    for words in (["--search", "hidden", "heads", "--ratio", "0.5"], ["--target-shapes", "64/6/96", "64/12/96"]):
        with pytest.raises(UsageError, match="--keep-heads: expected one of the two, got (heads|--target-shapes)"):
            given_shapes(SMALL, *words, "--keep-heads", "--divisible-by", "8")


@pytest.mark.parametrize(
    ("source", "axes", "flags", "message"),
    [
        (
            SMALL,
            "hidden",
            ["--target-hidden-size", "64"],
            "--search: expected --ratio or --target-params with it, got an explicit shape",
        ),
        (
            SMALL,
            "heads",
            ["--ratio", "0.9", "--divisible-by", "8"],
            r"multiples of 8 \(heads' channels\).*got 0.9 .*the nearest is 6 heads in 6 groups, which keeps",
        ),
        (
            SMOLLM2,
            "heads",
            ["--ratio", "0.25"],
            r"multiples of 64 \(heads' channels\).*the nearest is 3 heads in 3 groups, which keeps",
        ),
        (
            SMALL,
            "hidden ffn groups",
            ["--ratio", "0.99", "--divisible-by", "32", "--tolerance", "0.001"],
            r"\(hidden, heads' channels, FFN\).*the nearest is hidden 32, 4 heads in 2 groups, FFN 32, which keeps",
        ),
        (
            replace(SMALL, num_query_groups=1, num_attention_heads=2),
            "groups",
            ["--ratio", "0.5"],
            "the parent has 2 heads in 1 groups",
        ),
        (
            SMALL,
            "ffn",
            ["--target-params", "99999999"],
            "--target-params: expected a number between 0 and the parent's 535776 parameters, got 99999999",
        ),
    ],
)
def test_search_refuses(source: ModelShape, axes: str, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        near(source, axes, *flags)


@pytest.mark.parametrize(("limit", "search"), [(4, None), (0, ("ffn",))])
def test_max_candidates_is_a_positive_number_of_searched_shapes(limit: int, search: tuple[str, ...] | None) -> None:
    with pytest.raises(UsageError, match=f"--max-candidates: expected .*, got {limit}"):
        methods.get("minitron-width").search(options.MinitronWidthOptions(search=search, max_candidates=limit))


def given_shapes(source: ModelShape, *words: str, tp: int = 1) -> tuple[ModelShape, ...]:
    """The shapes that compete by minitron-width's flags, as ``plan`` reads them."""
    own = options.STRUCTURED["minitron-width"]
    parser = argparse.ArgumentParser()
    add_flags(parser, verbs.TargetSettings, own)
    given = parser.parse_args(words)
    asked = choices.choose("minitron-width", verbs.TargetSettings.of(given), own.of(given), tensor_parallel=tp)
    return asked.shapes(source)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_candidates_compete_where_they_are_given(name: str) -> None:
    words = [f"{hidden}/32/{ffn}" for hidden, ffn in PAPER[name]]
    found = given_shapes(LLAMA_8B, "--target-shapes", *words)
    assert found == tuple(replace(LLAMA_8B, hidden_size=h, ffn_hidden_size=f) for h, f in PAPER[name])


def test_heads_of_given_shapes_stay_in_their_groups() -> None:
    words = ["--divisible-by", "8", "--target-shapes", "64/6/96", "96/4/192"]
    found = given_shapes(MHA, *words)
    assert [(s.num_attention_heads, s.num_query_groups) for s in found] == [(6, 6), (4, 4)]
    gqa = given_shapes(SMALL, "--divisible-by", "8", "--target-shapes", "64/6/96", "64/12/96")
    assert [(s.num_attention_heads, s.num_query_groups) for s in gqa] == [(6, 6), (12, 6)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["64/12/64"], "expected at least two shapes, got 64/12/64"),
        (["64/12/64", "64/12"], "expected HIDDEN/HEADS/FFN.*, got 64/12"),
        (["64/12/64", "64/0/64"], "expected HIDDEN/HEADS/FFN.*, got 64/0/64"),
        (["64/12/64", "64x12x64"], "expected HIDDEN/HEADS/FFN.*, got 64x12x64"),
        (["64/12/64", "64/12/64"], "expected each shape once, got 64/12/64 twice"),
        (["64/12/64", "48/12/64"], "expected .* --divisible-by 64, got 48/12/64, which is --target-hidden-size 48"),
        (["64/12/64", "64/9/64"], "got 64/9/64, which is --target-num-attention-heads 9 for 6 query groups"),
        (["64/12/64", "64/12/256"], "expected 1 to 192.*, got 64/12/256, which is --target-ffn-hidden-size 256"),
        (["64/12/64", "96/12/192"], "expected sizes of a smaller model, got 96/12/192, which is the parent's sizes"),
        (["64/12/64", "64/12/128", "--ratio", "0.5"], "expected exactly one of.*, got --ratio and --target-shapes"),
        (["64/12/64", "64/12/128", "--target-params", "9"], "got --target-params and --target-shapes"),
        (["64/12/64", "64/12/128", "--target-ffn-hidden-size", "64"], "got --target-<size> and --target-shapes"),
        (["64/12/64", "64/12/128", "--tolerance", "0.1"], "--tolerance: expected .*, got 0.1"),
        (
            ["64/12/64", "64/12/128", "--search", "ffn"],
            "--search: expected --ratio or --target-params with it, got --target-shapes",
        ),
        (["64/12/64", "64/12/128", "--max-candidates", "2"], "--max-candidates: expected --search with it, got 2"),
        (
            ["64/12/64", "64/12/128", "--retrain-candidates", "3", "--retrain-tokens", "9"],
            "--retrain-candidates: expected a number from 2 to the number of shapes, 2, got 3",
        ),
    ],
)
def test_given_shapes_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        given_shapes(SMALL, "--target-shapes", *words)


def test_given_shapes_obey_tensor_parallelism() -> None:
    with pytest.raises(UsageError, match="--tensor-model-parallel-size 3, got 96/12/64, which is --target-ffn-"):
        given_shapes(SMALL, "--target-shapes", "96/12/64", "96/12/128", tp=3)


REFUSED: list[tuple[str, list[str], dict[str, Any], str]] = [
    ("shortgpt", [], {}, "exactly one of --ratio, --target-params"),
    ("shortgpt", ["--ratio", "0.5", "--target-num-layers", "3"], {}, "exactly one of"),
    ("shortgpt", ["--ratio", "0.5", "--target-params", "3"], {}, "exactly one of"),
    ("shortgpt", ["--ratio", "1.5"], {}, "--ratio: expected the fraction to remove, .*, got 1.5"),
    ("shortgpt", ["--ratio", "0"], {}, "--ratio: expected .*, got 0.0"),
    ("shortgpt", ["--ratio", "0.01"], {}, "removes 1 to 5 of 6 layers.*the nearest number of layers is 0"),
    ("shortgpt", ["--ratio", "0.99"], {}, "removes 1 to 5 of 6 layers.*the nearest number of layers is 6"),
    (
        "shortgpt",
        ["--target-params", "99999999"],
        {},
        "--target-params: expected a number between 0 and the parent's 535776 parameters, got 99999999",
    ),
    ("shortgpt", ["--target-num-layers", "7"], {}, "--target-num-layers: expected 1 to 6.*, got 7"),
    ("shortgpt", ["--target-num-layers", "0"], {}, "--target-num-layers: expected .*, got 0"),
    ("shortgpt", ["--target-num-layers", "6"], {}, "expected sizes of a smaller model, got the parent's sizes"),
    ("shortgpt", ["--target-hidden-size", "64"], {}, "--target-hidden-size: expected.*that the method cuts.*, got 64"),
    (
        "minitron-width",
        ["--target-num-layers", "3"],
        {},
        "--target-num-layers: expected.*that the method cuts.*, got 3",
    ),
    (
        "minitron-width",
        ["--target-hidden-size", "48"],
        {},
        "--target-hidden-size: expected.*--divisible-by 64, got 48",
    ),
    ("minitron-width", ["--target-ffn-hidden-size", "100"], {}, "--target-ffn-hidden-size: expected .*, got 100"),
    (
        "minitron-width",
        ["--target-num-attention-heads", "6"],
        {},
        "--target-num-attention-heads: expected.*--divisible-by 64, got 6 heads of 8 channels",
    ),
    ("minitron-width", ["--target-num-attention-heads", "8"], {}, "got 8 for 6 query groups"),
    ("minitron-width", ["--target-ffn-hidden-size", "64"], {"tp": 3}, "--tensor-model-parallel-size 3"),
    (
        "minitron-width",
        ["--target-num-query-groups", "4", "--target-num-attention-heads", "8"],
        {"tp": 3},
        "--target-num-attention-heads: expected.*--tensor-model-parallel-size 3, got 8",
    ),
    ("minitron-width", ["--ratio", "0.5", "--divisible-by", "0"], {}, "--divisible-by: expected .*, got 0"),
    ("minitron-width", ["--ratio", "0.5", "--tolerance", "2"], {}, "--tolerance: expected .*, got 2.0"),
    (
        "minitron-width",
        ["--ratio", "0.5", "--divisible-by", "200"],
        {},
        "--divisible-by: expected a number that divides.*, got 200",
    ),
    ("minitron-width", ["--target-hidden-size", "64", "--ratio-of", "all"], {}, "--ratio-of: expected .*, got all"),
    ("minitron-width", ["--target-hidden-size", "64", "--tolerance", "0.1"], {}, "--tolerance: expected .*, got 0.1"),
    (
        "shortgpt",
        ["--ratio", "0.5", "--tolerance", "0.1"],
        {},
        "--tolerance: expected no such flag where layers are removed, got 0.1",
    ),
    ("random", ["--ratio", "0.5"], {}, "--axis: expected .*, got nothing"),
]


@pytest.mark.parametrize(("method", "flags", "extra", "message"), REFUSED)
def test_refused(method: str, flags: list[str], extra: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(SMALL, method, *flags, **extra)


@pytest.mark.parametrize("source", [SMALL, MHA, SMOLLM2])
@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5])
def test_without_hidden_channels_groups_and_ffn_shrink_together(source: ModelShape, ratio: float) -> None:
    """llm-pruner's rule by brute force: of the shapes within the tolerance, the most even one."""
    goal = (1 - ratio) * source.linear_parameters()
    best: tuple[tuple[float, ...], ModelShape] | None = None
    for groups in range(1, source.num_query_groups + 1):
        shapes = [
            replace(source, num_query_groups=groups, num_attention_heads=groups * source.heads_per_group,
                    ffn_hidden_size=size)
            for size in {*range(8, source.ffn_hidden_size, 8), source.ffn_hidden_size}
        ]  # fmt: skip
        shape = min(shapes, key=lambda s: (abs(s.linear_parameters() - goal), -s.ffn_hidden_size))
        error = abs(shape.linear_parameters() / goal - 1)
        uneven = abs(log(groups / source.num_query_groups) - log(shape.ffn_hidden_size / source.ffn_hidden_size))
        rank = (round(uneven, 12), round(error, 12), -groups)
        if error <= 0.05 and (best is None or rank < best[0]):
            best = (rank, shape)
    assert best is not None
    found = choose(source, "llm-pruner", "--ratio", str(ratio), "--divisible-by", "8", "--tolerance", "0.05")
    assert found == best[1]
