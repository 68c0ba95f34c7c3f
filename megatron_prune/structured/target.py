"""From flags to the shape after pruning: explicit sizes, a ratio, or a parameter count.

Exactly one of these is used:

* ``--target-num-layers …``: explicit sizes; the others stay.
* ``--ratio R``: the fraction to remove, of the blocks' linears or (``--ratio-of all``) of all parameters.
* ``--target-params P``: the number of parameters to keep, out of all.
* ``--target-shapes …`` (minitron-width): the competing shapes.

For a ratio or parameter count the shape is chosen deterministically. Depth: the number of layers whose removal comes
nearest (for linears: round(L·R)). Width: heads stay, hidden and FFN size shrink, or, with a method that leaves the
hidden size alone, query groups and FFN: to the first of the shapes that a search would score (below). Sizes that change
must be multiples of ``--divisible-by`` and fit the tensor-parallel size.

If the parent's layers differ, it may lose layers, counted as if all were of their mean size, or units of every layer
within a ``Budget``, by --ratio or --target-params; other sizes cannot be asked for.

A method may also ask for all shapes near the target, to score them. ``near`` lists them in order: first the nearest
FFN size for every combination of the other sizes, then the rest; in both parts, shapes that shrink the searched sizes
most evenly come first, then the nearest, then the larger. Sizes shrink evenly if all keep the same fraction, but the
hidden size one whose power ``--ffn-exponent`` is that of the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from megatron_prune import verbs
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape, weights
from megatron_prune.errors import UsageError
from megatron_prune.methods.base import DIMENSIONS, Budget, Method, Search
from megatron_prune.settings import Settings
from megatron_prune.structured.limits import Limits

HEADS = ("num_attention_heads", "num_query_groups")
TOLERANCE = 0.02  # of the parameters to keep, if a width is chosen


@dataclass(frozen=True)
class Target:
    """The requested target; the fields are the flags."""

    sizes: Mapping[str, int]  # explicit ones, by ModelShape field
    shapes: Sequence[str] = ()
    ratio: float | None = None
    ratio_of: str = "linears"
    params: int | None = None
    divisible_by: int = 64
    tolerance: float | None = None  # None: TOLERANCE
    tensor_parallel: int = 1
    unexportable: Callable[[ModelShape], str | None] | None = None  # with --exportable: why a shape is refused
    limits: Limits = Limits()
    keep_heads: bool = False  # only other sizes shrink
    ffn_exponent: float = 2.0

    def __post_init__(self) -> None:
        if self.keep_heads and (given := self.sizes.keys() & HEADS):
            raise UsageError("--keep-heads", got="--target-" + min(given).replace("_", "-"), expected="one of the two")
        ways = [
            flag
            for flag, given in (
                ("--target-<size>", self.sizes),
                ("--ratio", self.ratio is not None),
                ("--target-params", self.params is not None),
                ("--target-shapes", self.shapes),
            )
            if given
        ]
        if len(ways) != 1:
            raise UsageError(
                "--ratio",
                got=" and ".join(ways) or "no target",
                expected="exactly one of --ratio, --target-params, or explicit --target-<size> flags "
                "(with minitron-width also --target-shapes)",
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UsageError("--ratio", got=self.ratio, expected="the fraction to remove, a number between 0 and 1")
        for flag, value in (
            ("--divisible-by", self.divisible_by),
            ("--tensor-model-parallel-size", self.tensor_parallel),
        ):
            if value < 1:
                raise UsageError(flag, got=value, expected="an integer of at least 1")
        if not 0 < self.ffn_exponent < math.inf:
            raise UsageError("--ffn-exponent", got=self.ffn_exponent, expected="a number above 0")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise UsageError("--tolerance", got=self.tolerance, expected="a number between 0 and 1")

    def choose(self, source: ModelShape, method: Method[Any], settings: Settings) -> ModelShape:
        """The shape after pruning; UsageError if the flags cannot be met."""
        if isinstance(source, HeterogeneousShape):
            return self._of_different_layers(source, method, settings)
        if self.sizes:
            shape = _explicit(source, self.sizes, method.dimensions)
            self._check(source, shape)
        elif "num_layers" in (free := method.free_dimensions(settings)):
            shape = replace(source, num_layers=self._depth(source))
            if (refusal := self.limits.refusal(shape)) is not None:
                raise refusal
        elif "hidden_size" in free:
            shape = self.near(source, Search(("hidden_size", "ffn_hidden_size"), 1))[0]
        else:
            free = tuple(size for size in free if not (self.keep_heads and size in HEADS))
            shape = self.near(source, Search(free, 1))[0]
        return shape

    def _of_different_layers(self, source: HeterogeneousShape, method: Method[Any], settings: Settings) -> ModelShape:
        """A uniform shape that stands for what is left, of which only the number of layers counts."""
        one = source.of_layer(None)
        if self.sizes:
            if width := [size for size in self.sizes if size != "num_layers"]:
                raise UsageError(
                    flag_of(width[0]), got=f"{self.sizes[width[0]]} for a parent whose layers differ",
                    expected="--ratio or --target-params", why="no size is that of all layers",
                )  # fmt: skip
            return _explicit(one, self.sizes, method.dimensions)
        free = method.free_dimensions(settings)
        if "num_layers" in free:
            return replace(one, num_layers=self._depth(source))
        if "hidden_size" in free:
            raise needs_layers_of_one_shape(
                "one that cuts hidden channels", "it ranks channels over layers of one shape"
            )
        self._goal(source)  # refuses one that the parent does not have
        return one

    def budget(self, source: ModelShape, shape: ModelShape) -> Budget:
        """What layers of different shape may keep; ``shape`` is the one that the target makes of all layers alike."""
        if self.keep_heads:
            raise UsageError(
                "--keep-heads", got="it where layers may differ", expected="a cut that leaves layers of one shape",
                why="query groups and channels compete for what each layer keeps",
            )  # fmt: skip
        params = self._goal(source) if self.ratio is not None or self.params is not None else None
        of: Literal["linears", "all"] = "linears" if self.params is None and self.ratio_of == "linears" else "all"
        step = math.lcm(self.divisible_by, self.tensor_parallel)
        return Budget(
            parameters=shape.linear_parameters() if params is None else params,
            of="linears" if params is None else of,
            ffn_step=step,
            head_step=self.divisible_by,
            tensor_parallel=self.tensor_parallel,
            apart=params is None,
        )

    def compete(self, source: ModelShape, search: Search) -> list[ModelShape]:
        """The competing shapes: those that were given, in order, or the best near the target."""
        if self.keep_heads and (search.shapes or set(HEADS) & set(search.axes)):
            got = "--target-shapes" if search.shapes else "heads or groups in --search"
            raise UsageError("--keep-heads", got=got, expected="one of the two")
        if not search.shapes:
            return self.near(source, search)[: search.max_candidates]
        return [self._given(source, dict(zip(search.axes, sizes, strict=True))) for sizes in search.shapes]

    def _given(self, source: ModelShape, sizes: Mapping[str, int]) -> ModelShape:
        words = "/".join(map(str, sizes.values()))
        try:
            shape = _explicit(source, sizes, tuple(sizes))
            self._check(source, shape)
        except UsageError as error:  # it names the flag of a size
            given = (
                f"{words}, which is {error.got}" if "," in error.flag else f"{words}, which is {error.flag} {error.got}"
            )
            raise UsageError("--target-shapes", got=given, expected=error.expected) from error
        return shape

    def near(self, source: ModelShape, search: Search) -> list[ModelShape]:
        """Every shape within the tolerance that differs in ``search.axes``, best first (module docstring).

        UsageError if there is none.
        """
        if self.sizes:
            raise UsageError("--search", got="an explicit shape", expected="--ratio or --target-params with it")
        goal, tolerance = self._goal(source), self.tolerance or TOLERANCE
        ranked: list[tuple[tuple[float, ...], ModelShape]] = []
        nearest: tuple[float, ModelShape] | None = None
        for shape in self._grid(source, search):
            sizes = self._ffn_sizes(source, shape, goal, tolerance) if "ffn_hidden_size" in search.axes else None
            found = [replace(shape, ffn_hidden_size=size) for size in sizes] if sizes else [shape]
            found = [s for s in found if s != source and not any(self._unfit(source, s))]
            errors = {s: abs(self._count(s) / goal - 1) for s in found}
            for place, one in enumerate(sorted(errors, key=lambda s: (errors[s], -s.ffn_hidden_size))):
                error = errors[one]
                if nearest is None or error < nearest[0]:
                    nearest = (error, one)
                if error <= tolerance and self.limits.refusal(one) is None:
                    rank = (place > 0, round(self._unevenness(source, one, search), 12), round(error, 12))
                    ranked.append(((*rank, *(-getattr(one, axis) for axis in DIMENSIONS)), one))
        if not ranked:
            if self.limits != Limits():  # which may be why: raises another error if they are not
                refusal = self.limits.refusal(replace(self, limits=Limits()).near(source, search)[0])
                assert refusal is not None
                raise refusal
            raise self._missed(goal, tolerance, source, nearest[1] if nearest else None, search.axes)
        return [shape for _, shape in sorted(ranked, key=lambda item: item[0])]

    # -- what to keep ------------------------------------------------------------------------

    def _count(self, shape: ModelShape) -> int:
        """The parameters that the ratio or the count refers to."""
        return (
            shape.linear_parameters() if self.ratio is not None and self.ratio_of == "linears" else shape.parameters()
        )

    def _goal(self, source: ModelShape) -> float:
        """How many of them to keep."""
        if self.ratio is not None:
            return (1 - self.ratio) * self._count(source)
        assert self.params is not None
        if not 0 < self.params < source.parameters():
            raise UsageError(
                "--target-params",
                got=self.params,
                expected=f"a number between 0 and the parent's {source.parameters()} parameters",
            )
        return self.params

    def _describe(self) -> tuple[str, Any]:
        return ("--ratio", self.ratio) if self.ratio is not None else ("--target-params", self.params)

    # -- depth -----------------------------------------------------------------------------------

    def _depth(self, source: ModelShape) -> int:
        """The number of layers that are left."""
        if self.tolerance is not None:
            raise UsageError(
                "--tolerance",
                got=self.tolerance,
                expected="no such flag where layers are removed",
                why="depth always takes the nearest number of layers",
            )
        layers, goal = source.num_layers, self._goal(source)
        if self.ratio is not None and self.ratio_of == "linears":
            removed = round(layers * self.ratio)
        else:
            of_layers = sum(weight.numel for weight in weights(source) if weight.layer is not None)  # all of them count
            removed = min(range(layers), key=lambda n: abs(self._count(source) - n * of_layers / layers - goal))
        if not 0 < removed < layers:
            flag, given = self._describe()
            raise UsageError(
                flag,
                got=given,
                expected=f"a target that removes 1 to {layers - 1} of {layers} layers",
                why=f"the nearest number of layers is {removed}",
            )
        return layers - removed

    # -- search ----------------------------------------------------------------------------------

    def _grid(self, source: ModelShape, search: Search) -> Iterator[ModelShape]:
        """All combinations of the searched sizes except the FFN's, including the source's own sizes."""
        axes = set(search.axes)
        if source.heads_per_group == 1 and "num_attention_heads" in axes:
            axes.add("num_query_groups")  # multi-head attention stays multi-head

        def sizes(axis: str, whole: int, step: int = 1) -> list[int]:
            return [*range(step, whole, step), whole] if axis in axes else [whole]

        for layers, hidden, groups, heads in itertools.product(
            sizes("num_layers", source.num_layers),
            sizes("hidden_size", source.hidden_size, self.divisible_by),
            sizes("num_query_groups", source.num_query_groups),
            sizes("num_attention_heads", source.heads_per_group),
        ):
            yield replace(
                source,
                num_layers=layers,
                hidden_size=hidden,
                num_query_groups=groups,
                num_attention_heads=groups * heads,
            )

    def _ffn_sizes(self, source: ModelShape, shape: ModelShape, goal: float, tolerance: float) -> list[int]:
        """FFN sizes that bring ``shape`` within the tolerance, and those on both sides of the goal."""
        step, widest = self._ffn_step_and_widest(source)
        # The count is linear in the FFN size, so two points give the size that meets a goal.
        one, two = (self._count(replace(shape, ffn_hidden_size=size)) for size in (step, 2 * step))

        def steps(count: float) -> float:
            return 1 + (count - one) / (two - one)

        first = math.floor(min(steps(goal * (1 - tolerance)), steps(goal)))
        last = math.ceil(max(steps(goal * (1 + tolerance)), steps(goal)))
        return sorted({min(step * max(1, n), widest) for n in range(first, last + 1)} - {0})

    def _ffn_step_and_widest(self, source: ModelShape) -> tuple[int, int]:
        """FFN sizes are multiples of the first, up to the second (0: none). The source's own size need not be a
        multiple of --divisible-by, but the ranks must divide it."""
        step, whole = math.lcm(self.divisible_by, self.tensor_parallel), source.ffn_hidden_size
        return step, whole if whole % self.tensor_parallel == 0 else whole // step * step

    def _unevenness(self, source: ModelShape, shape: ModelShape, search: Search) -> float:
        """How unevenly the searched sizes shrink: the largest minus the smallest logarithm of the fractions they keep,
        with the hidden size's times ``ffn_exponent``.

        Heads and groups count once, by the heads that are kept.
        """
        axes = {"num_attention_heads" if axis == "num_query_groups" else axis for axis in search.axes}
        kept = {axis: math.log(getattr(shape, axis) / getattr(source, axis)) for axis in axes}
        logs = [log * (self.ffn_exponent if axis == "hidden_size" else 1) for axis, log in kept.items()]
        return max(logs) - min(logs)

    # -- refusals --------------------------------------------------------------------------------

    def _missed(
        self, goal: float, tolerance: float, source: ModelShape, shape: ModelShape | None, axes: Sequence[str]
    ) -> UsageError:
        """The error if no width within the tolerance differs in ``axes``; ``shape`` is the nearest."""
        if shape is None:
            return UsageError(
                "--divisible-by",
                got=self.divisible_by,
                expected="a number that divides sizes below the parent's",
                why=f"the parent has {', '.join(_sizes(source, axes).values())}",
            )
        flag, given = self._describe()
        return UsageError(
            flag,
            got=given,
            expected=f"a target that multiples of {self.divisible_by} ({', '.join(_sizes(shape, axes))}) "
            f"meet within {tolerance:.3g}",
            why=f"the nearest is {', '.join(_sizes(shape, axes).values())}, which keeps {self._count(shape)} "
            f"in place of {goal:.0f}; give a smaller --divisible-by, "
            "a larger --tolerance or explicit --target-… sizes",
        )

    def _check(self, source: ModelShape, shape: ModelShape) -> None:
        for refusal in self._refusals(source, shape):
            raise refusal

    def _refusals(self, source: ModelShape, shape: ModelShape) -> Iterator[UsageError]:
        """Why the shape cannot be, and which limit it exceeds."""
        yield from self._unfit(source, shape)
        if (refusal := self.limits.refusal(shape)) is not None:
            yield refusal

    def _unfit(self, source: ModelShape, shape: ModelShape) -> Iterator[UsageError]:
        """Divisibility of every changed size, and tensor parallelism of the result."""
        heads = f"{shape.num_attention_heads} heads of {shape.kv_channels} channels"
        for flag, given, before, after in (
            ("--target-hidden-size", shape.hidden_size, source.hidden_size, shape.hidden_size),
            ("--target-ffn-hidden-size", shape.ffn_hidden_size, source.ffn_hidden_size, shape.ffn_hidden_size),
            ("--target-num-attention-heads", heads, source.axis_size("heads"), shape.axis_size("heads")),
        ):
            if after != before and after % self.divisible_by:
                yield UsageError(flag, got=given, expected=f"a multiple of --divisible-by {self.divisible_by}")
        tp = self.tensor_parallel
        for name, size in shape.by_layer()[0].unshared(tp).items():
            fit = "a multiple or a divisor" if name == "num_query_groups" else "a multiple"
            yield UsageError(flag_of(name), got=size, expected=f"{fit} of --tensor-model-parallel-size {tp}")
        if self.unexportable is not None and (reason := self.unexportable(shape)) is not None:
            yield UsageError(
                "--exportable", got=f"hidden {shape.hidden_size}, {heads}",
                expected="a shape that a Hugging Face model can have", why=reason,
            )  # fmt: skip


def _sizes(shape: ModelShape, axes: Sequence[str]) -> dict[str, str]:
    """Sizes of ``shape`` in words, by the quantity that must be a multiple, for ``axes``."""
    heads = f"{shape.num_attention_heads} heads in {shape.num_query_groups} groups"
    named = {
        "hidden": (("hidden_size",), f"hidden {shape.hidden_size}"),
        "heads' channels": (("num_attention_heads", "num_query_groups"), heads),
        "FFN": (("ffn_hidden_size",), f"FFN {shape.ffn_hidden_size}"),
    }
    return {name: words for name, (fields, words) in named.items() if set(fields) & set(axes)}


def _explicit(source: ModelShape, sizes: Mapping[str, int], dimensions: Sequence[str]) -> ModelShape:
    for field, size in sizes.items():
        if field not in dimensions:
            raise UsageError(
                flag_of(field),
                got=size,
                expected="one of the sizes that the method cuts: " + ", ".join(map(flag_of, dimensions)),
            )
        if not 1 <= size <= getattr(source, field):
            raise UsageError(flag_of(field), got=size, expected=f"1 to {getattr(source, field)}, the parent's size")
    wanted = dict(sizes)
    heads, groups = wanted.get("num_attention_heads"), wanted.get("num_query_groups")
    if heads is not None and groups is None and source.heads_per_group == 1:
        wanted["num_query_groups"] = heads  # multi-head attention stays multi-head
    if groups is not None and heads is None:
        wanted["num_attention_heads"] = groups * source.heads_per_group
    heads = wanted.get("num_attention_heads", source.num_attention_heads)
    groups = wanted.get("num_query_groups", source.num_query_groups)
    if heads % groups or heads // groups > source.heads_per_group:
        raise UsageError(
            "--target-num-attention-heads",
            got=f"{heads} for {groups} query groups",
            expected=f"the same number of heads, 1 to {source.heads_per_group}, for each query group",
        )
    shape = replace(source, **cast(dict[str, Any], wanted))
    if shape == source:
        raise UsageError(", ".join(map(flag_of, sizes)), got="the parent's sizes", expected="sizes of a smaller model")
    return shape


def needs_layers_of_one_shape(method: str, why: str) -> UsageError:
    """The error for a ``method`` that cannot cut a parent whose layers differ."""
    return UsageError(
        "--method", got=f"{method} for a parent whose layers differ",
        expected="flap, llm-pruner, wanda-sp, a method that removes layers, or a sparse one", why=why,
    )  # fmt: skip


def flag_of(field: str) -> str:
    """``hidden_size`` → ``--target-hidden-size``."""
    return "--target-" + field.replace("_", "-")


def from_settings(asked: verbs.TargetSettings, shapes: Sequence[str] = (), tensor_parallel: int = 1) -> Target:
    """The target that settings describe; settings without effect are refused. ``shapes`` are minitron-width's own."""
    sizes = {f: size for f in DIMENSIONS if (size := getattr(asked, "target_" + f)) is not None}
    if asked.ratio is None and asked.ratio_of is not None:
        raise UsageError("--ratio-of", got=f"{asked.ratio_of} alone", expected="--ratio with it")
    if (sizes or shapes) and asked.tolerance is not None:
        raise UsageError("--tolerance", got=f"{asked.tolerance} alone", expected="--ratio or --target-params with it")
    return Target(
        sizes=sizes,
        shapes=shapes,
        ratio=asked.ratio,
        ratio_of=asked.ratio_of or "linears",
        params=asked.target_params,
        divisible_by=asked.divisible_by,
        tolerance=asked.tolerance,
        tensor_parallel=tensor_parallel,
        limits=Limits.parse(asked.at_most, asked.latency_table),
        keep_heads=asked.keep_heads,
        ffn_exponent=asked.ffn_exponent,
    )
