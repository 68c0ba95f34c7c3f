"""Describe the content of a checkpoint as JSON (``describe``) or as a printed tree (``show``).

The description has names, shapes, types, shards, arguments, provenance and, on request, the fraction of
exact zeros (one streaming pass). The tree shows identical consecutive layers once.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch

from megatron_prune import storage
from megatron_prune.checkpoint.index import is_weight
from megatron_prune.checkpoint.layer_shapes import unreadable
from megatron_prune.checkpoint.model_arguments import FORGOTTEN, OF_YARN, stored_argument
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.masks import find_masks, missing_masks, open_masks
from megatron_prune.masks.required import MISSING

_WIDTH = 150  # minimum width of the tree, so that names are not cut
# The stored arguments that the tree shows. Megatron stores more than 800.
_SHOWN = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "padded_vocab_size", "max_position_embeddings", "normalization", "norm_epsilon", "rotary_base", "swiglu",
    "untie_embeddings_and_output_weights", "params_dtype", "seq_length", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "tokenizer_type", "tokenizer_model", "consumed_train_samples",
)  # fmt: skip


def describe(checkpoint: Checkpoint, *, sparsity: bool = False, full_hash: bool = False) -> dict[str, Any]:
    """A JSON value that describes ``checkpoint``."""
    tensors: dict[str, dict[str, Any]] = {}
    for name in checkpoint.names:
        spec = checkpoint.spec(name)
        tensors[name] = {
            "shape": list(spec.shape),
            "dtype": _plain(spec.dtype),
            "nbytes": spec.nbytes,
            "shards": len(checkpoint.boxes(name)),
            "stored_as": sorted({box.piece.key for box in checkpoint.boxes(name)}),
        }
        if sparsity:
            zeros = sum(int((block == 0).sum()) for block in checkpoint.row_blocks(name))
            tensors[name]["zeros"] = zeros
            tensors[name]["sparsity"] = zeros / torch.Size(spec.shape).numel()
    linear = [name for name in tensors if checkpoint.layout(name).is_linear]
    total = checkpoint.shape.parameters()
    found = {
        "version": 1,
        "root": str(checkpoint.root),
        "directory": str(checkpoint.directory),
        "iteration": checkpoint.iteration,
        "release": checkpoint.release,
        "fingerprint": checkpoint.fingerprint(),
        "parameters": total,
        "parameters_linear": checkpoint.shape.linear_parameters(),
        "nbytes": sum(entry["nbytes"] for entry in tensors.values()),
        "shape": asdict(checkpoint.shape),
        "format": checkpoint.format,
        "files": {
            str(path.relative_to(checkpoint.directory)): path.stat().st_size
            for path in storage.files(checkpoint.directory)
        },
        "tensors": tensors,
        "other_tensors": sum(not is_weight(key) for key in checkpoint.stored),
        "huggingface": None if checkpoint.huggingface is None else str(checkpoint.huggingface),
        "pruning": checkpoint.pruning,
        "masks": _describe_masks(checkpoint),
        MISSING: missing_masks(checkpoint),
        "flags": flags(checkpoint),
        "args": {key: _plain(value) for key, value in sorted(checkpoint.args.items())},
    }
    if full_hash:
        found["full_hash"] = checkpoint.full_hash()
    if sparsity:
        found["parameters_nonzero"] = total - sum(entry["zeros"] for entry in tensors.values())
        found["sparsity_linear"] = sum(tensors[n]["zeros"] for n in linear) / checkpoint.shape.linear_parameters()
    return found


def _describe_masks(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The masks next to the weights, from their index alone; ``masks.verify`` reads the bits."""
    folder = find_masks(checkpoint.root)
    if folder is None:
        return None
    masks = open_masks(folder)
    masks.check_model(checkpoint.shape, str(checkpoint.root))
    return {
        "folder": str(folder),
        "hash": masks.hash,
        "removed": masks.removed,
        "tensors": {
            name: {"pattern": entry.pattern, "removed": entry.removed, "ratio": entry.ratio}
            for name, entry in masks.entries.items()
        },
    }


def flags(checkpoint: Checkpoint) -> list[str]:
    """Flags that unmodified Megatron needs, besides ``--load … --use-checkpoint-args``, to build the same model.

    This package's commands restore these settings themselves.
    """
    args, dtype = checkpoint.args, checkpoint.spec(checkpoint.names[0]).dtype
    words = [flag for flag, kind in (("--bf16", torch.bfloat16), ("--fp16", torch.float16)) if dtype == kind]
    yarn, gelu = args.get("position_embedding_type") == "yarn", not args.get("swiglu") and not args.get("squared_relu")
    for name, options in FORGOTTEN.items():
        value = stored_argument(args, name)
        if name.startswith("rope_") and not args.get("use_rope_scaling") or name in OF_YARN and not yarn:
            continue
        if name == "parallel_residual":  # no flag of unmodified Megatron
            continue
        if name == "bias_gelu_fusion":  # on by default
            words += [options[0]] if value is False and gelu else []
        elif isinstance(value, bool):
            words += [options[0]] if value else list(options[1:])
        elif isinstance(value, tuple):
            words.append(f"{options[0]} {','.join(map(str, value))}")
        elif value is not None:
            words.append(shlex.join([options[0], str(value)]))
    return words


def warnings(checkpoint: Checkpoint) -> list[str]:
    """Warnings about what no flag of unmodified Megatron can fix."""
    factor = checkpoint.args.get("rope_scaling_factor")
    if checkpoint.args.get("use_rope_scaling") and factor not in (None, 8, 8.0):
        return [f"unmodified Megatron 0.19 ignores --rope-scaling-factor {factor} and uses 8: wrong RoPE"]
    if (layers := unreadable(checkpoint.args)) is not None:
        return [f"unmodified Megatron 0.19 cannot build {layers}; this package's commands can"]
    if checkpoint.args.get("parallel_residual"):
        return ["unmodified Megatron 0.19 has no parallel residual: its MLP would read attention's result"]
    return []


def show(found: Mapping[str, Any], notes: list[str]) -> None:
    """Print a description as a tree on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.tree import Tree

    kind = "release" if found["release"] else f"iteration {found['iteration']}"
    kind += ", legacy per-rank files" if found["format"] == "torch" else ""
    top = Tree(f"[bold]{escape(found['directory'])}[/bold]  ({kind})")
    top.add(f"{found['parameters']:,} parameters, {found['parameters_linear']:,} in the blocks' linears, "
            f"{found['nbytes'] / 1e9:.3f} GB in {len(found['files'])} files")  # fmt: skip
    if "parameters_nonzero" in found:
        top.add(f"{found['parameters_nonzero']:,} parameters are not zero; "
                f"{found['sparsity_linear']:.2%} of the linears are zero")  # fmt: skip
    top.add(f"fingerprint {found['fingerprint']}")
    if "full_hash" in found:
        top.add(f"full hash {found['full_hash']}")
    if found["other_tensors"]:
        top.add(f"{found['other_tensors']} tensors that are not weights (optimizer, random states)")
    if found[MISSING]:
        top.add(f"masks {found[MISSING]} are missing: restore them from a copy")
    if found["masks"]:
        share = found["masks"]["removed"] / found["parameters_linear"]
        patterns = ", ".join(sorted({entry["pattern"] for entry in found["masks"]["tensors"].values()}))
        top.add(f"masks {found['masks']['hash']}: {patterns}, {found['masks']['removed']:,} weights removed, "
                f"{share:.2%} of the linears")  # fmt: skip
    masked = (found["masks"] or {}).get("tensors", {})
    _add_weights(top.add("[bold]weights[/bold]"), found["tensors"], masked, escape)
    if found["pruning"]:
        chain = top.add("[bold]pruned[/bold]")
        for entry in found["pruning"]:
            step = chain.add(escape(str(entry.get("method", "?"))))
            for key, value in entry.items():
                if key != "method":
                    step.add(escape(_cut(f"{key}: {value}")))
    stored = top.add("[bold]arguments[/bold]")
    shown = {key: found["args"][key] for key in _SHOWN if found["args"].get(key) is not None}
    stored.add(escape(", ".join(f"{key} {value}" for key, value in shown.items())))
    stored.add(f"and {len(found['args']) - len(shown)} more: inspect --json")
    console = Console(highlight=False)  # on standard output, where control characters are escaped
    console.width = max(console.width, _WIDTH)
    console.print(top)
    # Outside the tree, so that the line can be copied.
    print("\nflags for unmodified Megatron, besides --use-checkpoint-args:")
    print(" ".join(found["flags"]) or "none")
    for note in notes:
        print(f"warning: {note}")


def _add_weights(
    tree: Any,
    tensors: Mapping[str, Mapping[str, Any]],
    masks: Mapping[str, Mapping[str, Any]],
    escape: Callable[[str], str],
) -> None:
    layers: dict[int, list[str]] = {}
    order: list[int | str] = []
    for name, entry in tensors.items():
        line = _line(entry, masks.get(name))
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            layer = int(parts[2])
            if layer not in layers:
                order.append(layer)
            layers.setdefault(layer, []).append(f"{'.'.join(parts[3:])}  {line}")
        else:
            order.append(f"{name}  {line}")
    for _, group in groupby(order, key=lambda item: item if isinstance(item, str) else tuple(layers[item])):
        items = list(group)
        if isinstance(items[0], str):
            tree.add(escape(items[0]))
            continue
        label = f"layer {items[0]}" if len(items) == 1 else f"layers {items[0]} to {items[-1]}"
        branch = tree.add(label)
        for line in layers[items[0]]:
            branch.add(escape(line))


def _cut(text: str) -> str:
    """A lineage holds whole recipes: ``inspect --json`` has them."""
    return text if len(text) <= 120 else f"{text[:119]}…"


def _line(entry: Mapping[str, Any], mask: Mapping[str, Any] | None) -> str:
    shards = "" if entry["shards"] == 1 else f", {entry['shards']} shards"
    zeros = f", {entry['sparsity']:.2%} zero" if "sparsity" in entry else ""
    masked = f", {mask['pattern']} mask, {mask['ratio']:.2%} removed" if mask else ""
    return f"{entry['shape']} {entry['dtype']}{shards}{zeros}{masked}"


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value).removeprefix("torch.")
