"""An exported Hugging Face directory as one GGUF file, which llama.cpp and transformers read.

The package ``gguf`` of llama.cpp's authors writes the file, and knows the names of its tensors. What it does not know
is here: which of a model's numbers go where, the order of rotary dimensions that ``llama`` expects, and the name of the
rule by which a tokenizer splits text. Only families and rules are written that were compared with others' work: logits
and token ids, as transformers reads them back; names and numbers with a file that llama.cpp's own converter made; and
the rule ``smollm``, which transformers does not know, with llama.cpp's ``src/llama-vocab.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_prune.artifacts import read_json
from megatron_prune.convert.safetensors_io import Tensors
from megatron_prune.errors import UsageError

NAME = "model.gguf"
FAMILIES = ("llama", "qwen2", "qwen3")  # `model_type`, which is also GGUF's name of the architecture
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How byte-level tokenizers split text before they merge: GGUF's name of the rule.
_SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
}
_KINDS = {"normal": 1, "control": 3, "added": 4, "unused": 5}  # of tokens, GGUF's numbers


def refuse(config: Mapping[str, Any], tokenizer: Path | None) -> None:
    """UsageError for a model (its ``config.json``) or a tokenizer (its folder) whose GGUF was not compared, and without
    the package gguf."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UsageError(
            "--gguf", got="no package gguf", expected="it installed", do="pip install 'megatron_prune[gguf]'"
        ) from None
    family, found = config["model_type"], []
    if family in FAMILIES:
        size = _head_size(config)
        # transformers reads another size of heads for llama only.
        usual = {"qwen2": config["hidden_size"] // config["num_attention_heads"], "qwen3": 128}.get(family, size)
        unlike = {
            "scaled rotary embeddings": (config.get("rope_parameters") or {}).get("rope_type", "default") != "default",
            "biases": family != "qwen2" and bool(config.get("attention_bias") or config.get("mlp_bias")),
            "an attention window": bool(config.get("use_sliding_window")),
            f"heads of {size}": size != usual,
        }
        found = [what for what, is_so in unlike.items() if is_so]
    if family not in FAMILIES or found:
        raise UsageError(
            "--gguf", got=" with ".join([family, *found[:1]]), expected=f"a plain model of {', '.join(FAMILIES)}",
            why="only their files were read back and compared", do="leave it out",
        )  # fmt: skip
    if tokenizer is None or not (tokenizer / "tokenizer.json").is_file():
        raise UsageError("--gguf", got="no tokenizer.json next to the weights", expected="the model's tokenizer",
                         do="import the model with its tokenizer")  # fmt: skip
    if _split(read_json(tokenizer / "tokenizer.json")) is None:
        raise UsageError(
            "--gguf", got="another tokenizer", expected=f"byte-level BPE that splits as {', '.join(_SPLITS.values())}",
            why="only their token ids were compared", do="leave it out",
        )  # fmt: skip


def write(folder: Path) -> None:
    """Write the Hugging Face directory ``folder`` again, as ``NAME`` in it: matrices in their type, vectors in fp32."""
    import gguf

    config, described = read_json(folder / "config.json"), read_json(folder / "tokenizer.json")
    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(folder / NAME, config["model_type"])
    _describe(writer, config)
    tokens, kinds = _tokens(described, config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(described) or "")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(tokens))
    special.add_special_token.setdefault("bos", False)  # llama.cpp's own default depends on the rule
    special.add_to_gguf(writer, quiet=True)
    tensors = Tensors(folder)
    order = sorted(tensors.names)
    for name in order:
        shape, dtype, known = tensors.shape(name), _stored(tensors, name), names.get_name(name, (".weight", ".bias"))
        assert known is not None, name  # of these families the package knows all
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
        writer.add_tensor_info(
            known, shape, numpy.dtype("V"), torch.Size(shape).numel() * dtype.itemsize, gguf.GGMLQuantizationType[kind]
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in order:
        tensor = tensors.rows(name, 0, tensors.shape(name)[0]).to(_stored(tensors, name))
        if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, _head_size(config))
        writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    writer.close()


def _describe(writer: Any, config: Mapping[str, Any]) -> None:
    size = _head_size(config)
    writer.add_name(config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _stored(tensors: Tensors, name: str) -> torch.dtype:
    return torch.float32 if len(tensors.shape(name)) == 1 else tensors.dtype(name)


def _interleaved(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Queries or keys [heads·size, h] for ``llama`` of llama.cpp, which rotates dimensions 2i and 2i + 1 together, not
    i and i + size/2."""
    return weight.view(-1, 2, size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tokens(described: Mapping[str, Any], count: int) -> tuple[list[str], list[int]]:
    """The tokens of a ``tokenizer.json`` by id, one for each of ``count`` embeddings, and their kinds."""
    tokens, kinds = [f"[PAD{number}]" for number in range(count)], [_KINDS["unused"]] * count
    for token, number in described["model"]["vocab"].items():
        tokens[number], kinds[number] = token, _KINDS["normal"]
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _KINDS["control" if added["special"] else "added"]
    return tokens, kinds


def _split(described: Mapping[str, Any]) -> str | None:
    """GGUF's name of the rule by which the tokenizer of a ``tokenizer.json`` splits text; None for an unknown one."""
    model, normalizer, first = described["model"], described["normalizer"], described["pre_tokenizer"] or {}
    steps: list[str] = []
    for step in first.get("pretokenizers", [first]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                steps += ["ByteLevel"] if step.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": True}:
                steps.append("Digits")
            case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
                steps.append(rule)
            case _:
                return None
    is_bytes = model["type"] == "BPE" and not model.get("byte_fallback") and normalizer in (None, {"type": "NFC"})
    return _SPLITS.get(tuple(steps)) if is_bytes else None
