"""Every weight of a GPT: its name, its axes, and how heads, groups and gate/up are ordered along them.

Only this module knows Megatron's weight layouts. Reading, slicing, writing, counting and converting
all use it:

* ``ModelShape``: the sizes of a model, from a checkpoint's stored ``args``;
* ``weights(shape)``: its logical weights as ``WeightLayout``s, one entry per layer.

If layers differ, ``ModelShape.of_layer`` gives the shape by which the axes of one layer's weights go.

Logical names are per layer (``decoder.layers.3.mlp.linear_fc2.weight``), whether or not the
checkpoint stacks its layers along a leading axis.

Axes (``H`` heads, ``G`` query groups, ``d`` head size, ``F`` FFN channels):

* ``hidden``    hidden channels.
* ``qkv``       rows of the fused projection, [G, H/G + 2, d]: per group, its H/G query heads, key
                and value.
* ``heads``     the attention context, input of ``linear_proj``: [H, d]; head ``h`` belongs to
                group ``h // (H/G)``.
* ``fc1``       gated: all gate rows, then all up rows, [2, F]; not gated: [F].
* ``ffn``       input of ``linear_fc2``: [F].
* ``head_dim``, ``vocab``, ``position``  never pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from megatron_prune.checkpoint.layer_shapes import ENCODED, FILE, PATH, LayerShape, decode, encode
from megatron_prune.errors import CheckpointError
from megatron_prune.untrusted import show

Axis = Literal["hidden", "qkv", "heads", "fc1", "ffn", "head_dim", "vocab", "position"]

# The weight matrices over which the fraction removed is computed.
LINEARS = (
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)

# Upper bounds on stored arguments: a larger value is corruption, or an attempt to exhaust memory.
_MOST = {
    "num_layers": 10_000,
    "hidden_size": 1 << 24,
    "num_attention_heads": 1 << 14,
    "num_query_groups": 1 << 14,
    "kv_channels": 1 << 16,
    "ffn_hidden_size": 1 << 24,
    "padded_vocab_size": 1 << 31,
    "max_position_embeddings": 1 << 31,
}


# Arguments of models with other weights, or other layers, than a dense GPT's.
OTHER_MODELS = (
    "num_experts", "multi_latent_attention", "is_hybrid_model", "hybrid_layer_pattern", "hybrid_override_pattern",
    "experimental_attention_variant", "attention_output_gate", "mtp_num_layers",
)  # fmt: skip
_SWITCHES = ("tied", "gated", "linear_bias", "qkv_bias", "norm_bias", "qk_norm")
_STORED_SWITCHES = (
    "untie_embeddings_and_output_weights", "swiglu", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
    "group_query_attention", "use_rope_scaling",
)  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a GPT. All are global, independent of any parallel layout.

    Its layers have one shape. If they do not, it is a ``HeterogeneousShape``: ``with_layers`` makes one.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    padded_vocab_size: int
    tied: bool
    gated: bool = True
    linear_bias: bool = False
    qkv_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    positions: int = 0  # learned position embeddings; 0 for RoPE

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            name = "positions" if name == "max_position_embeddings" else name
            size = getattr(self, name)
            if type(size) is not int or not (name != "positions") <= size <= most:
                raise CheckpointError(f"{name}: expected at least 1 and at most {most}, got {show(size)}")
        for name in _SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise CheckpointError(f"{name}: expected true or false, got {show(getattr(self, name))}")
        if self.num_attention_heads % self.num_query_groups:
            raise CheckpointError(
                f"num_attention_heads: expected a multiple of the {self.num_query_groups} query groups, got "
                f"{self.num_attention_heads}"
            )

    def with_biases(self) -> ModelShape:
        """The same model with biases on its linears: on all of them, since Megatron has one switch."""
        return replace(self, linear_bias=True, qkv_bias=True)

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    def by_layer(self) -> tuple[LayerShape, ...]:
        """The shape of every layer."""
        one = LayerShape(self.num_attention_heads, self.num_query_groups, self.ffn_hidden_size)
        return (one,) * self.num_layers

    def with_layers(self, layers: Sequence[LayerShape]) -> ModelShape:
        """This shape with these ``layers`` in place of its own: uniform if they are all alike and none lacks a part.

        CheckpointError if no layer has attention, or none has an MLP.
        """
        sizes = {field.name: getattr(self, field.name) for field in fields(ModelShape)} | largest(layers)
        if set(layers) == {LayerShape(*(sizes[field.name] for field in fields(LayerShape)))}:
            return ModelShape(**sizes)
        return HeterogeneousShape(**sizes, layers=tuple(layers))

    def of_layer(self, layer: int | None) -> ModelShape:
        """The uniform shape that has the sizes of ``layer``, by which the axes of its weights go; None: outside the
        layers. Sizes of a part that the layer lacks are those of other layers: it has no such weights."""
        return self

    def range_of(self, size: str) -> str:
        """A size in words: a number, or those of the smallest and the largest layer."""
        found = sorted(getattr(layer, size) for layer in self.by_layer())
        return f"{found[0]}" if found[0] == found[-1] else f"{found[0]} to {found[-1]}"

    @staticmethod
    def read(found: Mapping[str, Any]) -> ModelShape:
        """The shape from JSON, that of ``asdict``. TypeError or CheckpointError for anything else."""
        if "layers" not in found:
            return ModelShape(**found)
        layers = found["layers"]
        if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, Mapping) for layer in layers):
            raise TypeError("layers")
        return HeterogeneousShape(**{**found, "layers": tuple(LayerShape(**layer) for layer in layers)})

    @staticmethod
    def from_args(args: Mapping[str, Any]) -> ModelShape:
        """The shape that a checkpoint's stored Megatron ``args`` (as a mapping) describe.

        Raises CheckpointError, naming the argument, if one is missing or out of range, or belongs to a kind of
        model (experts, latent attention, state-space layers) that this package does not support.
        """
        for flag in OTHER_MODELS:
            if args.get(flag):
                raise CheckpointError(
                    f"the checkpoint's stored args: expected those of a dense GPT, got {flag}={show(args[flag])}"
                )
        missing = [
            k for k in ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size") if args.get(k) is None
        ]
        if missing:
            raise CheckpointError(f"the checkpoint's stored args: expected {', '.join(missing)}, got args without")
        for name, most in _MOST.items():
            value = args.get(name)
            if value is not None and (type(value) is not int or not 0 <= value <= most):
                raise CheckpointError(
                    f"the checkpoint's stored args: {name}: expected a number from 0 to {most}, got {show(value)}"
                )
        for name in _STORED_SWITCHES:  # "false" would count as true
            if type(args.get(name)) not in (bool, type(None)):
                raise CheckpointError(
                    f"the checkpoint's stored args have {name}={show(args[name])}, expected true or false"
                )
        hidden, heads = args["hidden_size"], args["num_attention_heads"]
        if not heads:
            raise CheckpointError("the checkpoint's stored args: num_attention_heads: expected at least 1, got 0")
        # `num_query_groups` only counts with group_query_attention: Megatron stores 1 otherwise.
        groups = args.get("num_query_groups") if args.get("group_query_attention") else None
        learned = args.get("position_embedding_type", "learned_absolute") == "learned_absolute"
        shape = ModelShape(
            num_layers=args["num_layers"],
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=groups or heads,
            kv_channels=args.get("kv_channels") or hidden // heads,
            ffn_hidden_size=args.get("ffn_hidden_size") or 4 * hidden,
            padded_vocab_size=args["padded_vocab_size"],
            tied=not args.get("untie_embeddings_and_output_weights", False),
            gated=bool(args.get("swiglu", False)),
            linear_bias=bool(args.get("add_bias_linear", True)),
            qkv_bias=bool(args.get("add_qkv_bias", False) or args.get("add_bias_linear", True)),
            norm_bias=args.get("normalization", "LayerNorm") == "LayerNorm",
            qk_norm=bool(args.get("qk_layernorm", False)),
            positions=(args.get("max_position_embeddings") or 0) if learned else 0,
        )
        encoded = args.get(ENCODED)
        if not encoded and args.get(PATH):
            raise CheckpointError(f"{PATH}: expected the content of that file in {ENCODED}, got none")
        return shape if not encoded else shape.with_layers(
            decode(encoded, heads=heads, hidden=hidden, count=shape.num_layers)
        )  # fmt: skip

    def to_args(self) -> dict[str, Any]:
        """The Megatron ``args`` entries for this shape that pruning can change."""
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "group_query_attention": self.num_query_groups != self.num_attention_heads,
            # Always written: after pruning, the head size is no longer hidden/heads.
            "kv_channels": self.kv_channels,
            "ffn_hidden_size": self.ffn_hidden_size,
            "add_bias_linear": self.linear_bias,
        }

    def to_flags(self) -> dict[str, Any]:
        """The same as flags of Megatron, by their names without the leading dashes."""
        found = {name.replace("_", "-"): value for name, value in self.to_args().items()}
        del found["add-bias-linear"]
        return {**found, "disable-bias-linear": not self.linear_bias}

    def axis_size(self, axis: Axis) -> int:
        """Number of entries along ``axis``."""
        return {
            "hidden": self.hidden_size,
            "qkv": (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels,
            "heads": self.num_attention_heads * self.kv_channels,
            "fc1": self.ffn_hidden_size * (2 if self.gated else 1),
            "ffn": self.ffn_hidden_size,
            "head_dim": self.kv_channels,
            "vocab": self.padded_vocab_size,
            "position": self.positions,
        }[axis]

    def extents(self, axis: Axis) -> tuple[int, ...]:
        """``axis_size`` in every layer, of an axis of its attention or MLP; 0 where the layer lacks that part."""
        suffix = "self_attention." if axis in ("qkv", "heads") else "mlp."
        layers = enumerate(self.by_layer())
        return tuple(self.of_layer(number).axis_size(axis) if one.has(suffix) else 0 for number, one in layers)

    def parameters(self) -> int:
        """All parameters; a tied output layer is counted once."""
        return sum(w.numel for w in weights(self))

    def linear_parameters(self) -> int:
        """Parameters of the blocks' linear matrices (``LINEARS``), which pruning ratios count by default."""
        return sum(w.numel for w in weights(self) if w.is_linear)

    def forward_flops(self, sequence_length: int, removed: int = 0) -> int:
        """Dense GEMM FLOPs of one forward pass over one sequence, 2 per multiply-add. With ``removed`` weights of
        the linears left out: the theoretical FLOPs of a sparse model.

        Counts the blocks' linears, the attention products QKᵀ and PV without the causal mask (as dense
        kernels compute them) and the output layer. The embedding is a lookup and counts as zero.
        """
        s = sequence_length
        blocks = sum(self.layer_flops(layer, s) for layer in range(self.num_layers))
        return blocks - 2 * s * removed + 2 * s * self.hidden_size * self.padded_vocab_size

    def layer_flops(self, layer: int, sequence_length: int) -> int:
        """The part of ``forward_flops`` that is in one layer."""
        s, heads = sequence_length, self.by_layer()[layer].num_attention_heads
        linears = sum(weight.numel for weight in weights_of_layer(self, layer) if weight.is_linear)
        return 2 * s * linears + 2 * 2 * s * s * heads * self.kv_channels

    def training_flops(self, sequence_length: int, removed: int = 0) -> int:
        """FLOPs of a forward and backward pass over one sequence: 3 × ``forward_flops``."""
        return 3 * self.forward_flops(sequence_length, removed)


@dataclass(frozen=True)
class HeterogeneousShape(ModelShape):
    """The sizes of a GPT whose ``layers`` differ. The sizes that are theirs, of the whole model, are the largest's:
    heads and groups of the layer with the most heads, and the largest FFN."""

    layers: tuple[LayerShape, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = largest(self.layers)
        if any(getattr(self, name) != size for name, size in sizes.items()) or len(set(self.layers)) == 1:
            raise CheckpointError(
                f"layers: expected {self.num_layers} that differ, the largest of the model's sizes, got others"
            )

    def by_layer(self) -> tuple[LayerShape, ...]:
        return self.layers

    def of_layer(self, layer: int | None) -> ModelShape:
        sizes = {field.name: getattr(self, field.name) for field in fields(ModelShape)}
        if layer is not None:
            sizes |= {name: size for name, size in asdict(self.layers[layer]).items() if size}
        return ModelShape(**sizes)

    def to_args(self) -> dict[str, Any]:
        return {
            **super().to_args(),
            "group_query_attention": True,  # Megatron asks for it; a group may have a single head
            PATH: FILE,
            ENCODED: encode(self.layers, {"num_attention_heads": self.num_attention_heads}),
        }


@dataclass(frozen=True)
class WeightLayout:
    """One logical weight: its full name, its layer (None outside the blocks), its axes and sizes."""

    name: str
    layer: int | None
    suffix: str  # the name inside its layer, or the full name outside the blocks
    axes: tuple[Axis, ...]
    shape: tuple[int, ...]
    tp_axis: int | None  # the axis that tensor parallelism shards; None where replicated

    @property
    def numel(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def is_linear(self) -> bool:
        return self.suffix in LINEARS


def vocabulary(args: Mapping[str, Any]) -> int:
    """Rows of the embedding without the padding up to ``padded_vocab_size``."""
    size, padded = args.get("vocab_size"), args["padded_vocab_size"]
    return size if isinstance(size, int) and 0 < size <= padded else padded


LAYERS = "decoder.layers."


def layer_name(layer: int, suffix: str) -> str:
    """``decoder.layers.3.mlp.linear_fc2.weight``"""
    return f"{LAYERS}{layer}.{suffix}"


def stacked_name(suffix: str) -> str:
    """The key under which a homogeneous checkpoint stacks all layers: [layers, ...]."""
    return f"{LAYERS}{suffix}"


def largest(layers: Sequence[LayerShape]) -> dict[str, int]:
    """The sizes of a model with these layers: their number, the heads and groups of the layer with the most heads, and
    the largest FFN. CheckpointError if no layer has attention, or none has an MLP."""
    heads = max(((layer.num_attention_heads, layer.num_query_groups) for layer in layers), default=(0, 0))
    ffn = max((layer.ffn_hidden_size for layer in layers), default=0)
    for part, size in (("attention", heads[0]), ("an MLP", ffn)):
        if not size:
            raise CheckpointError(f"the layers: expected {part} in one of them at least, got none")
    return {"num_layers": len(layers), "num_attention_heads": heads[0], "num_query_groups": heads[1],
            "ffn_hidden_size": ffn}  # fmt: skip


def weights(shape: ModelShape) -> Iterator[WeightLayout]:
    """Every logical weight of a GPT of this shape, in the order of the forward pass."""

    def entry(suffix: str, axes: tuple[Axis, ...], tp_axis: int | None) -> WeightLayout:
        return WeightLayout(suffix, None, suffix, axes, tuple(shape.axis_size(a) for a in axes), tp_axis)

    yield entry("embedding.word_embeddings.weight", ("vocab", "hidden"), 0)
    if shape.positions:
        yield entry("embedding.position_embeddings.weight", ("position", "hidden"), None)
    for layer in range(shape.num_layers):
        yield from weights_of_layer(shape, layer)
    yield entry("decoder.final_layernorm.weight", ("hidden",), None)
    if shape.norm_bias:
        yield entry("decoder.final_layernorm.bias", ("hidden",), None)
    if not shape.tied:
        yield entry("output_layer.weight", ("vocab", "hidden"), 0)


def weights_of_layer(shape: ModelShape, layer: int) -> Iterator[WeightLayout]:
    """Those weights that are in one layer."""
    sizes, here = shape.of_layer(layer), shape.by_layer()[layer]
    for suffix, axes, tp_axis in _block(shape):
        if here.has(suffix):
            extents = tuple(sizes.axis_size(a) for a in axes)
            yield WeightLayout(layer_name(layer, suffix), layer, suffix, axes, extents, tp_axis)


def _block(shape: ModelShape) -> list[tuple[str, tuple[Axis, ...], int | None]]:
    table: list[tuple[str, tuple[Axis, ...], int | None, bool]] = [
        ("self_attention.linear_qkv.layer_norm_weight", ("hidden",), None, True),
        ("self_attention.linear_qkv.layer_norm_bias", ("hidden",), None, shape.norm_bias),
        ("self_attention.linear_qkv.weight", ("qkv", "hidden"), 0, True),
        ("self_attention.linear_qkv.bias", ("qkv",), 0, shape.qkv_bias),
        ("self_attention.q_layernorm.weight", ("head_dim",), None, shape.qk_norm),
        ("self_attention.q_layernorm.bias", ("head_dim",), None, shape.qk_norm and shape.norm_bias),
        ("self_attention.k_layernorm.weight", ("head_dim",), None, shape.qk_norm),
        ("self_attention.k_layernorm.bias", ("head_dim",), None, shape.qk_norm and shape.norm_bias),
        ("self_attention.linear_proj.weight", ("hidden", "heads"), 1, True),
        ("self_attention.linear_proj.bias", ("hidden",), None, shape.linear_bias),
        ("mlp.linear_fc1.layer_norm_weight", ("hidden",), None, True),
        ("mlp.linear_fc1.layer_norm_bias", ("hidden",), None, shape.norm_bias),
        ("mlp.linear_fc1.weight", ("fc1", "hidden"), 0, True),
        ("mlp.linear_fc1.bias", ("fc1",), 0, shape.linear_bias),
        ("mlp.linear_fc2.weight", ("hidden", "ffn"), 1, True),
        ("mlp.linear_fc2.bias", ("hidden",), None, shape.linear_bias),
    ]
    return [(suffix, axes, tp_axis) for suffix, axes, tp_axis, present in table if present]
