"""What a family of Hugging Face models is to Megatron: names of its tensors, and its configuration both ways.

Every family is a ``ModelFamily`` in a file of its own. What families share is here, in ``rope.py`` and in
``convert/config.py``: sizes, vocabulary, norms' epsilon, RoPE and attention windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape
from megatron_prune.checkpoint.model_arguments import by_layer, stored_argument
from megatron_prune.errors import CheckpointError
from megatron_prune.untrusted import show

Config = Mapping[str, Any]  # config.json, with transformers' defaults, under Llama's names
Args = Mapping[str, Any]  # Megatron's arguments

# Megatron's default of every argument that tells families apart: the value of one that a checkpoint does not store.
MEGATRON_DEFAULTS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": False,
    "qk_layernorm": False,
    "swiglu": False,
    "squared_relu": False,
    "bias_gelu_fusion": True,  # on: GELU by its tanh approximation; off: exact
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "window_size": None,
    "window_attn_skip_freq": None,
}
# Their values in a Llama. A family says where it differs (``fixed``) and what its models choose (``chosen``).
LLAMA: dict[str, Any] = MEGATRON_DEFAULTS | {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
}
# Names of tensors without ``.weight`` and ``.bias``, by Megatron's; ``{}`` is the layer.
DECODER_NAMES = {
    "embedding.word_embeddings": "model.embed_tokens",
    "self_attention.linear_qkv.layer_norm": "model.layers.{}.input_layernorm",
    "self_attention.q_layernorm": "model.layers.{}.self_attn.q_norm",
    "self_attention.k_layernorm": "model.layers.{}.self_attn.k_norm",
    "self_attention.linear_proj": "model.layers.{}.self_attn.o_proj",
    "mlp.linear_fc1.layer_norm": "model.layers.{}.post_attention_layernorm",
    "mlp.linear_fc2": "model.layers.{}.mlp.down_proj",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
}
SEPARATE_QKV = tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv")
GATE_AND_UP = ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj")


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class ModelFamily:
    """A family. ``arguments`` and ``entries`` are the two functions in which it differs from Llama.

    * ``kind``, ``architecture``: ``model_type`` and the model's class.
    * ``names``, ``qkv``, ``fc1``: names of tensors. One name in ``qkv`` is a fused tensor: all queries, then keys, then
      values, or with ``qkv_per_head`` the three of each head in turn, as Megatron stores them. One name in ``fc1`` is
      the up projection, or gate over up if the MLP is gated.
    * ``transposed``: matrices other than embeddings are stored [in, out].
    * ``other_names``: prefixes under which the same tensors are found too, and what replaces them.
    * ``defaults``: transformers' values for entries that ``config.json`` lacks.
    * ``keys``: the family's names of entries, by Llama's.
    * ``only``: entries with one value that Megatron can express; an absent entry has it.
    * ``fixed``: Megatron arguments that all of its models have, where they differ from Llama's.
    * ``chosen``: Megatron arguments that ``arguments`` reads from the configuration and ``entries`` writes there.
    * ``grouped``: several query heads can share keys and values.
    * ``head_size``: the configuration can state a head size other than hidden size / heads.
    * ``not_divided``: it is loaded even if heads do not divide the hidden size.
    * ``unsaid``: where layers differ, why the family cannot say them (None if it can); None for families whose layers
      have one shape.
    """

    kind: str
    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    chosen: frozenset[str] = frozenset()
    arguments: Callable[[Config], dict[str, Any]] = _nothing
    entries: Callable[[Args, ModelShape, Config], dict[str, Any]] = _nothing
    names: Mapping[str, str] = field(default_factory=lambda: DECODER_NAMES)
    qkv: tuple[str, ...] = SEPARATE_QKV
    fc1: tuple[str, ...] = GATE_AND_UP
    qkv_per_head: bool = False
    transposed: bool = False
    other_names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    grouped: bool = True
    head_size: bool = True
    not_divided: bool = True
    unsaid: Callable[[ModelShape], str | None] | None = None

    @property
    def gated(self) -> bool:
        """True if the MLP has a gate, with SiLU."""
        return bool(self.fixed.get("swiglu", True))

    @property
    def learned_positions(self) -> bool:
        """True if positions are embedded, rather than rotated (RoPE)."""
        return self.fixed.get("position_embedding_type") == "learned_absolute"

    @property
    def required(self) -> dict[str, Any]:
        """Megatron arguments with the one value that this family can express."""
        return {name: value for name, value in (LLAMA | dict(self.fixed)).items() if name not in self.chosen}

    def unfit(self, args: Args) -> str | None:
        """Why no model of this family has these Megatron arguments; None if one does."""
        shape = ModelShape.from_args(args)
        if isinstance(shape, HeterogeneousShape) is (self.unsaid is None):
            return f"its layers {'have one shape' if self.unsaid else 'differ'}, unlike those of {self.architecture}"
        for name, value in self.required.items():
            if name == "bias_gelu_fusion":  # it says nothing without a GELU, and families with one choose
                continue
            found = stored_argument(args, name)
            if name == "position_embedding_type" and value == "rope" and found == "yarn":
                continue  # RoPE with other frequencies, which rope.py writes
            if name == "add_qkv_bias" and shape.linear_bias:
                continue  # part of add_bias_linear, and Megatron sets it then
            if (MEGATRON_DEFAULTS[name] if found is None else found) != value:
                return f"the model has {name}={found}, but {self.architecture} only supports {value}"
        if args.get("parallel_residual") and "parallel_residual" not in self.chosen:
            return f"attention and MLP of the model read the same input, but those of {self.architecture} do not"
        divided = shape.hidden_size % shape.num_attention_heads == 0
        if not divided and not self.not_divided:
            return (
                f"{shape.num_attention_heads} heads do not divide the hidden size {shape.hidden_size}, which "
                f"{self.architecture} requires"
            )
        if not self.head_size and shape.kv_channels * shape.num_attention_heads != shape.hidden_size:
            return (
                f"the heads have size {shape.kv_channels}, but {self.architecture} computes it as hidden size / heads, "
                f"{shape.hidden_size} / {shape.num_attention_heads}"
            )
        if not self.grouped and shape.heads_per_group != 1:
            return f"the model has {shape.num_query_groups} query groups, but {self.architecture} has one per head"
        return None if self.unsaid is None else self.unsaid(shape)

    def tensor(self, suffix: str, layer: int | None) -> str:
        """The name of the tensor that is the Megatron weight ``suffix``, for weights of one tensor."""
        stem, _, kind = suffix.replace("layer_norm_", "layer_norm.").rpartition(".")
        return f"{self.names[stem].format(layer)}.{kind}"


def told_apart(args: Args) -> dict[str, Any]:
    """What decides how long a model takes next to its shape: the arguments that tell families apart, as stored or by
    Megatron's default, in the form of JSON. Biases are in the shape, and the kind of GELU takes no time."""
    names = MEGATRON_DEFAULTS.keys() - {"add_bias_linear", "add_qkv_bias", "bias_gelu_fusion"}
    found = {name: stored_argument(args, name) for name in sorted(names)}
    found = {name: MEGATRON_DEFAULTS[name] if value is None else value for name, value in found.items()}
    found["parallel_residual"] = bool(args.get("parallel_residual"))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def count(values: Config, key: str, default: int, *, least: int) -> int:
    """The entry ``key``, a whole number of at least ``least``."""
    found = values.get(key, default)
    if type(found) is not int or found < least:
        raise CheckpointError(f"config.json has {key}={show(found)}, expected a whole number of at least {least}")
    return found


_TANH = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True, "gelu_fast": True}


def gelu(values: Config) -> dict[str, Any]:
    """Megatron's argument for a GELU: its fused kernel computes the tanh approximation, and torch's the exact one."""
    activation = values["hidden_act"]
    if not isinstance(activation, str) or activation not in _TANH:
        raise CheckpointError(f"config.json has the activation {show(activation)}, expected {' or '.join(_TANH)}")
    return {"bias_gelu_fusion": _TANH[activation]}


def gelu_entry(args: Args, preferred: Any) -> str:
    """The inverse of ``gelu``: ``preferred``, the original's activation, if it is the same function."""
    tanh = args.get("bias_gelu_fusion")
    tanh = MEGATRON_DEFAULTS["bias_gelu_fusion"] if tanh is None else bool(tanh)
    return (
        preferred
        if isinstance(preferred, str) and _TANH.get(preferred) == tanh
        else ("gelu_pytorch_tanh" if tanh else "gelu")
    )


def windows(values: Config) -> dict[str, Any]:
    """Megatron's ``window_size`` and ``window_attn_skip_freq`` for a configuration with ``sliding_window`` and perhaps
    ``layer_types``; nothing if no sequence of ``max_position_embeddings`` is longer than the window.

    transformers lets a token see the last ``sliding_window`` tokens, itself included; Megatron counts those before it.
    """
    window, layers = values.get("sliding_window"), values["num_hidden_layers"]
    types = values.get("layer_types") or ["sliding_attention"] * layers
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        raise CheckpointError(f"config.json has layer_types={show(types)}, expected {layers} of {' and '.join(known)}")
    sliding = [int(kind == "sliding_attention") for kind in types]
    if window is None or window >= values["max_position_embeddings"] or not any(sliding):
        return {"window_size": None, "window_attn_skip_freq": None}
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": None if all(sliding) else sliding}


def window_in_all_layers(values: Config) -> dict[str, Any]:
    """``windows`` for a family without ``layer_types``."""
    return {**windows(values), "window_attn_skip_freq": None}


def window_entries(args: Args, shape: ModelShape, original: Config) -> dict[str, Any]:
    """The inverse of ``windows``: ``sliding_window`` (and ``layer_types``). A window of the ``original`` configuration
    that had no effect stays."""
    window = args.get("window_size")
    if window is None:
        return {"sliding_window": original.get("sliding_window")}
    if window[1] != 0 or window[0] < 0:
        raise CheckpointError(f"the model has window_size={tuple(window)}, expected tokens on the left and 0: (W, 0)")
    entries: dict[str, Any] = {"sliding_window": window[0] + 1}
    if (skip := by_layer("window_attn_skip_freq", args.get("window_attn_skip_freq"), shape.num_layers)) is not None:
        entries["layer_types"] = ["sliding_attention" if one else "full_attention" for one in skip]
    return entries
