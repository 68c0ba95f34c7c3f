"""Every weight of a GPT: its name, its axes, and how heads, groups and gate/up are ordered along them.

Only this module knows Megatron's weight layouts. Reading, slicing, writing, counting and converting
all use it:

* ``ModelShape``: the sizes of a model, from a checkpoint's stored ``args``;
* ``weights(shape)``: its logical weights as ``WeightLayout``s, one entry per layer;
* ``axis_indices(axis, shape, kept)``: the indices of an axis that remain under a ``Kept``.

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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

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

# Stored arguments that describe the model but that `--use-checkpoint-args` does not restore,
# with the flags that set them.
FORGOTTEN = {
    "use_rope_scaling": ("--use-rope-scaling",),
    "rope_scaling_factor": ("--rope-scaling-factor",),
    "layernorm_epsilon": ("--norm-epsilon", "--layernorm-epsilon"),
    "init_method_std": ("--init-method-std",),
    "embedding_init_method_std": ("--embedding-init-method-std",),
    "make_vocab_size_divisible_by": ("--make-vocab-size-divisible-by",),
    "vocab_size": ("--vocab-size",),
    "qk_layernorm": ("--qk-layernorm",),
    "parallel_residual": ("--parallel-residual",),  # of this package: engine/parallel_residual.py
    "layernorm_zero_centered_gamma": ("--apply-layernorm-1p",),
    "bias_gelu_fusion": ("--no-bias-gelu-fusion",),  # the fused GELU is the tanh approximation: another function
    "window_size": ("--window-size",),
    "window_attn_skip_freq": ("--window-attn-skip-freq",),
    "no_rope_freq": ("--no-rope-freq",),
    "rotary_seq_len_interpolation_factor": ("--rotary-seq-len-interpolation-factor",),
    "rotary_scaling_factor": ("--rotary-scaling-factor",),
    "mscale": ("--mscale",),
    "mscale_all_dim": ("--mscale-all-dim",),
    "yarn_original_max_position_embeddings": ("--yarn-original-max-position-embeddings",),
    "yarn_beta_fast": ("--yarn-beta-fast",),
    "yarn_beta_slow": ("--yarn-beta-slow",),
    "yarn_correction_range_round_to_int": (
        "--yarn-correction-range-round-to-int",
        "--no-yarn-correction-range-round-to-int",
    ),
}

OF_YARN = frozenset(
    {"rotary_scaling_factor", "mscale", "mscale_all_dim", *(n for n in FORGOTTEN if n.startswith("yarn_"))}
)
# Names under which earlier versions of Megatron stored an argument.
EARLIER_NAMES = {"layernorm_zero_centered_gamma": "apply_layernorm_1p"}


def stored_argument(args: Mapping[str, Any], name: str) -> Any:
    """A stored argument, under its name or its earlier one; None if there is none."""
    found = args.get(name)
    return args.get(EARLIER_NAMES[name]) if found is None and name in EARLIER_NAMES else found


# Arguments that hold a pattern over layers, and the value that Megatron's frequency N gives every N-th layer.
BY_LAYER = {"no_rope_freq": 1, "window_attn_skip_freq": 0}


def by_layer(name: str, pattern: Any, layers: int) -> list[int] | None:
    """The pattern ``name`` of ``BY_LAYER`` as one 0 or 1 per layer; None if there is none."""
    if not pattern or isinstance(pattern, list):
        return pattern or None
    every = BY_LAYER[name]
    return [every if (layer + 1) % pattern == 0 else 1 - every for layer in range(layers)]


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
    "heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json", "experimental_attention_variant",
    "attention_output_gate", "mtp_num_layers",
)  # fmt: skip
_SWITCHES = ("tied", "gated", "linear_bias", "qkv_bias", "norm_bias", "qk_norm")
_STORED_SWITCHES = (
    "untie_embeddings_and_output_weights", "swiglu", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
    "group_query_attention", "use_rope_scaling",
)  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a GPT. All are global, independent of any parallel layout."""

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
        return ModelShape(
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
        linears = 2 * s * (self.linear_parameters() - removed)
        attention = 2 * 2 * s * s * self.num_attention_heads * self.kv_channels * self.num_layers
        return linears + attention + 2 * s * self.hidden_size * self.padded_vocab_size

    def training_flops(self, sequence_length: int, removed: int = 0) -> int:
        """FLOPs of a forward and backward pass over one sequence: 3 × ``forward_flops``."""
        return 3 * self.forward_flops(sequence_length, removed)


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


def weights(shape: ModelShape) -> Iterator[WeightLayout]:
    """Every logical weight of a GPT of this shape, in the order of the forward pass."""

    def entry(suffix: str, axes: tuple[Axis, ...], tp_axis: int | None, layer: int | None = None) -> WeightLayout:
        name = suffix if layer is None else layer_name(layer, suffix)
        return WeightLayout(name, layer, suffix, axes, tuple(shape.axis_size(a) for a in axes), tp_axis)

    yield entry("embedding.word_embeddings.weight", ("vocab", "hidden"), 0)
    if shape.positions:
        yield entry("embedding.position_embeddings.weight", ("position", "hidden"), None)
    for layer in range(shape.num_layers):
        for suffix, axes, tp_axis in _block(shape):
            yield entry(suffix, axes, tp_axis, layer)
    yield entry("decoder.final_layernorm.weight", ("hidden",), None)
    if shape.norm_bias:
        yield entry("decoder.final_layernorm.bias", ("hidden",), None)
    if not shape.tied:
        yield entry("output_layer.weight", ("vocab", "hidden"), 0)


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


@dataclass(frozen=True)
class Kept:
    """What is kept in one block, as ascending source indices; None keeps everything.

    ``heads`` are query heads. A group is kept if any of its heads is; all kept groups keep the
    same number of heads.
    """

    hidden: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    ffn: tuple[int, ...] | None = None

    def groups(self, shape: ModelShape) -> tuple[int, ...]:
        """Query groups that are kept, ascending."""
        if self.heads is None:
            return tuple(range(shape.num_query_groups))
        return tuple(sorted({h // shape.heads_per_group for h in self.heads}))

    def shrink(self, shape: ModelShape) -> ModelShape:
        """The shape after pruning, with unchanged depth."""
        return replace(
            shape,
            hidden_size=shape.hidden_size if self.hidden is None else len(self.hidden),
            num_attention_heads=shape.num_attention_heads if self.heads is None else len(self.heads),
            num_query_groups=len(self.groups(shape)),
            ffn_hidden_size=shape.ffn_hidden_size if self.ffn is None else len(self.ffn),
        )


def axis_indices(axis: Axis, shape: ModelShape, kept: Kept) -> torch.Tensor | None:
    """Indices of ``axis`` that remain under ``kept``, int64; None if all of them do."""
    d = shape.kv_channels
    if axis == "hidden" and kept.hidden is not None:
        return torch.tensor(kept.hidden)
    if axis == "ffn" and kept.ffn is not None:
        return torch.tensor(kept.ffn)
    if axis == "fc1" and kept.ffn is not None:
        channels = torch.tensor(kept.ffn)  # [F']
        return torch.cat([channels, channels + shape.ffn_hidden_size]) if shape.gated else channels
    if axis == "heads" and kept.heads is not None:
        rows = torch.tensor(kept.heads)[:, None] * d + torch.arange(d)  # [H', d]
        return rows.flatten()
    if axis == "qkv" and kept.heads is not None:
        slots = []  # a group's block holds heads_per_group + 2 slots of d rows
        for group in kept.groups(shape):
            first = group * (shape.heads_per_group + 2)
            inside = [h % shape.heads_per_group for h in kept.heads if h // shape.heads_per_group == group]
            slots += [first + j for j in inside]
            slots += [first + shape.heads_per_group, first + shape.heads_per_group + 1]  # key, value
        rows = torch.tensor(slots)[:, None] * d + torch.arange(d)  # [H' + 2G', d]
        return rows.flatten()
    return None


def removed_indices(axis: Axis, shape: ModelShape, kept: Kept) -> torch.Tensor:
    """Indices of ``axis`` that do not remain under ``kept``, ascending, int64."""
    gone = torch.ones(shape.axis_size(axis), dtype=torch.bool)
    if (remain := axis_indices(axis, shape, kept)) is None:
        return torch.zeros(0, dtype=torch.int64)
    gone[remain] = False
    return gone.nonzero().flatten()
