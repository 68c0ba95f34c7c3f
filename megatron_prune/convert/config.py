"""Hugging Face ``config.json`` ⇄ Megatron arguments, for every family in ``families/``.

``args_from_config`` and ``config_from_args`` are inverses on the models that both formats can express; anything else
raises CheckpointError.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_prune.checkpoint.layer_shapes import ENCODED, PATH
from megatron_prune.checkpoint.layout import HeterogeneousShape, ModelShape, vocabulary
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.convert.families import ALL_FAMILIES, FAMILIES, REFUSED, layered_llama
from megatron_prune.convert.families.model_family import LLAMA, ModelFamily
from megatron_prune.convert.families.rope import is_number, read_rope, rope_entries
from megatron_prune.errors import CheckpointError, UsageError
from megatron_prune.untrusted import read_json, show, show_text

_LARGEST = 1 << 31
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_COUNTS = (*_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
# Entries that stay what the imported model's configuration says, whatever family it is exported as.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def family_of(config: Any) -> ModelFamily:
    """The family of a ``config.json``. Raises CheckpointError with the reason if there is none."""
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if isinstance(kind, str) and kind in REFUSED:
        raise CheckpointError(
            f"model_type {kind!r} is not supported: Megatron has no option for it, because {REFUSED[kind]}"
        )
    if not isinstance(kind, str) or kind not in ALL_FAMILIES:
        raise CheckpointError(f"model_type {show(kind)} is not supported: expected one of {', '.join(FAMILIES)}")
    return ALL_FAMILIES[kind]


def args_from_config(
    config: Mapping[str, Any],
    *,
    make_vocab_size_divisible_by: int = 128,
    tensor_model_parallel_size: int = 1,
    max_position_embeddings: int | None = None,
) -> dict[str, Any]:
    """Megatron arguments for the model that a ``config.json`` describes.

    As in Megatron, the vocabulary is padded to a multiple of ``make_vocab_size_divisible_by`` ×
    ``tensor_model_parallel_size``. ``max_position_embeddings`` can lower the model's own value.

    Raises CheckpointError naming what Megatron (or this package) cannot represent.
    """
    family = family_of(config)
    values = _values(config, family)
    positions = values["max_position_embeddings"]
    if max_position_embeddings is not None:
        if max_position_embeddings > positions:
            raise CheckpointError(
                f"--max-position-embeddings {max_position_embeddings}: expected at most the model's own {positions}"
            )
        if family.learned_positions and max_position_embeddings != positions:
            raise CheckpointError(
                f"--max-position-embeddings {max_position_embeddings}: expected the model's own {positions}, because "
                "its positions are learned"
            )
        values["max_position_embeddings"] = max_position_embeddings
    heads = values["num_attention_heads"]
    groups = values.get("num_key_value_heads", heads) if family.grouped else heads
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    if multiple < 1:
        raise UsageError(
            "--make-vocab-size-divisible-by, --tensor-model-parallel-size",
            got=f"{make_vocab_size_divisible_by}, {tensor_model_parallel_size}",
            expected="two positive numbers",
        )  # fmt: skip
    args = {
        **LLAMA,
        **({} if family.learned_positions else read_rope(values, partial="rotary_percent" in family.chosen)),
        **family.fixed,
        "num_layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "ffn_hidden_size": values.get("intermediate_size") or 4 * values["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "group_query_attention": groups != heads,
        "kv_channels": (values.get("head_dim") if family.head_size else None) or values["hidden_size"] // heads,
        "max_position_embeddings": values["max_position_embeddings"],
        "add_position_embedding": True,  # Megatron's default, compared on loading
        "use_rotary_position_embeddings": False,
        "layernorm_epsilon": values.get("rms_norm_eps", 1e-6),
        "untie_embeddings_and_output_weights": not values.get("tie_word_embeddings", False),
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": values.get("initializer_range", 0.02),
        "vocab_size": values["vocab_size"],
        "padded_vocab_size": -(-values["vocab_size"] // multiple) * multiple,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": 1,
        **family.arguments(values),
    }
    if family.unsaid is not None:  # its layers say heads, groups and FFN sizes
        shape = ModelShape.from_args(args)
        args |= {ENCODED: None, **shape.to_args()}
    return args


def _values(config: Mapping[str, Any], family: ModelFamily) -> dict[str, Any]:
    """Entries under Llama's names, checked, with the family's defaults."""
    own = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    values = {**family.defaults, **own, **{name: own[key] for name, key in family.keys.items() if key in own}}
    missing = [family.keys.get(key, key) for key in _SIZES if key not in values]
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}")
    for key in _COUNTS:
        found = values.get(key)
        if found is not None and (type(found) is not int or not 1 <= found <= _LARGEST):
            name = family.keys.get(key, key)
            raise CheckpointError(f"config.json has {name}={show(found)}, expected a number from 1 to {_LARGEST}")
    for key in ("rms_norm_eps", "initializer_range", "rope_theta"):
        found = values.get(key, 1.0)
        if not is_number(found) or (key == "rope_theta" and not found):
            name = family.keys.get(key, key)
            raise CheckpointError(f"config.json has {name}={show(found)}, expected a positive number")
    if type(values.get("tie_word_embeddings", False)) is not bool:  # "false" would count as true
        raise CheckpointError(
            f"config.json has tie_word_embeddings={show(values['tie_word_embeddings'])}, expected true or false"
        )
    activation = {"hidden_act": "silu"} if family.gated else {}
    for key, only in {"quantization_config": None, **activation, **family.only}.items():
        if values.get(key, only) != only:
            name, found = family.keys.get(key, key), values[key]
            said = show_text(found) if isinstance(found, str) else show(found)
            raise CheckpointError(f"config.json has {name}={said}, expected {only}")
    return values


def find_config(hf: str | Path) -> dict[str, Any] | None:
    """A model's ``config.json``: given as a file, a directory, or a model name in the Hub's local cache.

    Returns None if there is none; downloads nothing. Raises CheckpointError if it is not JSON.
    """
    path = Path(hf)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file() and str(hf).count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(str(hf), "config.json")
        path = Path(cached) if isinstance(cached, str) else path
    if not path.is_file():
        return None
    config = read_json(path)
    return config if isinstance(config, dict) else {}


def args_of(hf: str) -> dict[str, Any]:
    """Megatron arguments of the model that ``--hf`` names, from its ``config.json`` alone: no weights are needed.

    UsageError if there is no such file here, CheckpointError for what cannot be imported.
    """
    config = find_config(hf)
    if config is None:
        raise UsageError(
            "--hf", got=hf, expected="a config.json, its directory, or a model whose config is in the local cache",
            why="nothing is downloaded",
        )  # fmt: skip
    return args_from_config(config)


def config_from_args(
    args: Mapping[str, Any], dtype: torch.dtype, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``config.json`` of the model with these Megatron arguments.

    ``original`` is the config of an imported model: its family and other entries (such as token ids) are kept if it can
    express the model; otherwise the first family that can is used, for example Mistral for a Llama whose heads no
    longer divide its hidden size. Raises CheckpointError naming an argument that no family supports.
    """
    for name in ("rotary_base", "rope_scaling_factor", "layernorm_epsilon", "init_method_std"):
        if not is_number(args.get(name) or 1.0):
            raise CheckpointError(
                f"the checkpoint's stored args have {name}={show(args[name])}, expected a positive number"
            )
    # A tokenizer's folder may hold the config of another model family, which does not apply.
    base = dict(original) if original is not None and original.get("model_type") in ALL_FAMILIES else {}
    family = exported_as(args, base.get("model_type"))
    if family.kind != base.get("model_type", family.kind):
        names = ALL_FAMILIES[base["model_type"]].keys
        positions = base.get(names.get("max_position_embeddings", "max_position_embeddings"))
        base = {key: base[key] for key in (*_TOKENS, "initializer_range") if key in base}
        base |= {} if positions is None else {"max_position_embeddings": positions}
    shape = ModelShape.from_args(args)
    name = str(dtype).removeprefix("torch.")
    epsilon = args.get("layernorm_epsilon")
    positions = args.get("max_position_embeddings") or 2048
    if base and not family.learned_positions:
        # An import may have lowered it; the weights still support the original's positions.
        known = {**family.defaults, **base}
        own = known.get("max_position_embeddings")
        positions = max(positions, own) if type(own) is int else positions
    entries = {
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        **({"num_key_value_heads": shape.num_query_groups} if family.grouped else {}),
        **({"head_dim": shape.kv_channels} if family.head_size else {}),
        "vocab_size": vocabulary(args),
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5 if epsilon is None else epsilon,
        "initializer_range": args.get("init_method_std") or 0.02,
        "tie_word_embeddings": shape.tied,
        **({} if family.learned_positions else rope_entries(args, partial="rotary_percent" in family.chosen)),
        **family.only,
        **family.entries(args, shape, base),
    }
    return {
        "architectures": [family.architecture],
        **dict.fromkeys(_TOKENS),  # a family's defaults may be outside the vocabulary
        **base,
        "model_type": family.kind,
        **{family.keys.get(key, key): value for key, value in entries.items()},
        "torch_dtype": name,
        "dtype": name,
    }


def config_at(checkpoint: Checkpoint, shape: ModelShape) -> dict[str, Any]:
    """The ``config.json`` of the model of ``checkpoint`` in another shape. Raises CheckpointError if no family has such
    models."""
    side = checkpoint.huggingface
    args = {**checkpoint.args, **dict.fromkeys((PATH, ENCODED)), **shape.to_args()}
    dtype = checkpoint.spec("embedding.word_embeddings.weight").dtype
    return config_from_args(args, dtype, None if side is None else find_config(side))


def unexportable(checkpoint: Checkpoint, target: ModelShape) -> str | None:
    """Why ``checkpoint`` could not be exported once it is cut to the shape ``target``; None if it could."""
    return why_unexportable({**checkpoint.args, **target.to_args()}, kind_of(checkpoint))


def kind_of(checkpoint: Checkpoint) -> str | None:
    """The ``model_type`` of the model that ``checkpoint`` was imported from, if it was."""
    side = checkpoint.huggingface
    original = None if side is None else find_config(side)
    return (original or {}).get("model_type")


def why_unexportable(args: Mapping[str, Any], preferred: str | None = None) -> str | None:
    """The reason that ``exported_as`` gives; None if a family has such models."""
    try:
        exported_as(args, preferred)
    except CheckpointError as error:
        return str(error)
    return None


def exported_as(args: Mapping[str, Any], preferred: str | None = None) -> ModelFamily:
    """The family that a model with these Megatron arguments is exported as: ``preferred`` if it can express the model,
    otherwise the first that can. Raises CheckpointError with the preferred family's reason if there is none."""
    first = ALL_FAMILIES.get(preferred or "llama", ALL_FAMILIES["llama"])
    reason = first.unfit(args)
    if reason is None:
        return first
    for family in ALL_FAMILIES.values():
        if family.unfit(args) is None:
            return family
    if isinstance(ModelShape.from_args(args), HeterogeneousShape):
        reason = layered_llama.FAMILY.unfit(args)
    raise CheckpointError(f"{reason}; no other supported family has such models either")
