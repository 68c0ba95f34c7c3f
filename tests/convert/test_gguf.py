"""The GGUF file of an export, as transformers reads it, is the export; what was not compared is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.convert import gguf_file
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import UsageError
from tests import tiny
from tests.convert import family_models

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'megatron_prune[gguf]'")
TEXT = "It's 12345 o'clock,  she said:\n\n\tΠαρακαλώ — 3.14 \U0001f980 don't 'stop </s> THE_END  "
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUMBERS = [("1", "2"), ("12", "3"), ("123", "4")]
PARTS = {"gpt-2": 1, "llama-bpe": 2, "qwen2": 4}  # tokens of 1234
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
RULES: dict[str, Any] = {
    "gpt-2": BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {**SPLIT, "pattern": {"Regex": WORDS + r"\p{N}{1,3}" + REST}}, {**BYTES, "use_regex": False},
        ],
    },
    "qwen2": {
        "type": "Sequence",
        "pretokenizers": [{**SPLIT, "pattern": {"Regex": WORDS + r"\p{N}" + REST}}, {**BYTES, "use_regex": False}],
    },
}  # fmt: skip


def with_tokenizer(source: Path, tokenizer: Path, rule: str) -> Path:
    """``source`` with the files of ``tokenizer``, which now splits text by ``rule``."""
    for file in tokenizer.iterdir():
        shutil.copy(file, source)
    described = json.loads((source / "tokenizer.json").read_text())
    described["pre_tokenizer"] = RULES[rule]
    vocabulary, merges = described["model"]["vocab"], described["model"]["merges"]
    for number, (first, second) in enumerate(NUMBERS, -len(NUMBERS)):  # in place of the last merges
        vocabulary[first + second] = vocabulary.pop("".join(merges[number]))
        merges[number] = [first, second]
    (source / "tokenizer.json").write_text(json.dumps(described))
    return source


@pytest.mark.parametrize(
    ("name", "changes", "dtype", "rule"),
    [
        ("llama-gqa", {"head_dim": 10}, torch.float32, "gpt-2"),
        ("llama-mha-tied", {}, torch.bfloat16, "llama-bpe"),
        ("qwen2", {"head_dim": 12}, torch.float16, "qwen2"),
        ("qwen3", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}, torch.float32, "qwen2"),
    ],
)
def test_transformers_reads_the_model_and_its_tokenizer(name, changes, dtype, rule, tiny_tokenizer, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write = tiny.write_hf_model if name in tiny.HF_MODELS else family_models.write
    source = write(tmp_path / "source", name, **changes)
    with_tokenizer(source, tiny_tokenizer, rule)
    checkpoint = import_hf(source, tmp_path / "checkpoint", dtype=dtype).root
    folder = export_hf(checkpoint, tmp_path / "exported", gguf=True)
    tokens = torch.arange(60).remainder(53).view(2, 30)
    found = []
    for file in ({}, {"gguf_file": gguf_file.NAME}):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, **file)
        with torch.no_grad():
            found.append((model, model(tokens).logits, *(tokenizer(text)["input_ids"] for text in (TEXT, "1234"))))
    (exported, expected, ids, parts), (model, logits, *same) = found
    assert all(map(torch.equal, model.parameters(), exported.parameters()))
    assert expected.std() > 0.1 and (logits - expected).abs().max() < 1e-5
    assert same == [ids, parts] and len(ids) > 20 and len(parts) == PARTS[rule]


def test_each_rule_has_llama_cpps_name(tiny_tokenizer: Path, tmp_path: Path) -> None:
    for name in RULES:
        folder = tmp_path / name
        folder.mkdir()
        described = json.loads((with_tokenizer(folder, tiny_tokenizer, name) / "tokenizer.json").read_text())
        assert gguf_file._split(described) == name
    described["model"]["byte_fallback"] = True
    assert gguf_file._split(described) is None
    described = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    for other in ({**BYTES, "add_prefix_space": True}, {"type": "Whitespace"}, {"type": "Metaspace"}, None):
        assert gguf_file._split({**described, "pre_tokenizer": other}) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2", "hidden_size": None, "num_attention_heads": None}, "got gpt2"),  # other names
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "llama with scaled rotary embeddings"),
        ({"attention_bias": True}, "llama with biases"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "qwen2 with an attention window"),
        ({"model_type": "qwen3", "head_dim": 64}, "qwen3 with heads of 64"),
    ],
)
def test_what_was_not_compared_is_refused(changes, says, tiny_tokenizer: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 8, "head_dim": 12}
    gguf_file.refuse(config, tiny_tokenizer)
    with pytest.raises(UsageError, match=f"--gguf: expected a plain model of llama, qwen2, qwen3, got.*{says[4:]}"):
        gguf_file.refuse({**config, **changes}, tiny_tokenizer)


def test_a_refused_export_writes_nothing(tmp_path: Path) -> None:
    checkpoint = import_hf(family_models.write(tmp_path / "source", "llama-biases"), tmp_path / "checkpoint").root
    with pytest.raises(UsageError, match="--gguf"):
        export_hf(checkpoint, tmp_path / "exported", gguf=True)
    assert not (tmp_path / "exported").exists()


def test_unused_embeddings_have_tokens(tiny_tokenizer: Path) -> None:
    described = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    tokens, kinds = gguf_file._tokens(described, tiny.VOCABULARY + 2)
    assert tokens[-2:] == [f"[PAD{tiny.VOCABULARY}]", f"[PAD{tiny.VOCABULARY + 1}]"] and kinds[-3:] == [1, 5, 5]
    assert tokens[kinds.index(3)] == "</s>" and len(set(tokens)) == tiny.VOCABULARY + 2
