"""Small things that tests share: random Hugging Face models, real text, a tokenizer for both.

Sizes are chosen so that TP=2, TP=3, PP=2 and every kind of pruning divide them, and so that no two that a bug could
swap are equal: heads × head size is not the hidden size, the vocabulary is padded, epsilon and RoPE's base are nobody's
default. Every kind of model has its own seed; TEST_SEED=N shifts all of them, for another run of the same tests.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from pathlib import Path
from typing import Any

# name -> (transformers class prefix, what differs from the base configuration). Scaled RoPE has the
# original length of Llama 3, since that is the only one that Megatron knows.
HF_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 12, "tie_word_embeddings": True}),
    "llama-gqa-tied-rope": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama-mha-rope": (
        "Llama",
        {
            "num_key_value_heads": 12,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "mistral-gqa": ("Mistral", {"sliding_window": None}),
    "mistral-mha-tied": (
        "Mistral",
        {"num_key_value_heads": 12, "tie_word_embeddings": True, "sliding_window": None},
    ),
}
SEED = int(os.environ.get("TEST_SEED", "0"))
VOCABULARY = 379  # a prime: every checkpoint of it is padded
PADDING = 384 - VOCABULARY  # rows of zeros in an imported embedding, and in an output layer of its own
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "rms_norm_eps": 3e-4,  # large enough that another one shows
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.1,  # logits large enough that a wrong weight shows
}


def write_hf_model(folder: Path, name: str, *, layers: int = 2, seed: int | None = None, **changes: Any) -> Path:
    """A random model of ``HF_MODELS`` in float32, its gains random too, saved as transformers saves it.

    ``seed``: by default one of its own for each name and depth.
    """
    import torch
    import transformers

    family, differs = HF_MODELS[name]
    settings = BASE | {"num_hidden_layers": layers} | differs | changes
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{name} {layers} {SEED}".encode()) if seed is None else seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def documents(count: int, seed: int = 0) -> list[str]:
    """Paragraphs of Python's own language reference, in a seeded order."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[key] for key in sorted(topics))
    # Each once, because stages whose corpora share a document are refused.
    paragraphs = [text for text in dict.fromkeys(whole.split("\n\n")) if 200 < len(text) < 2000]
    random.Random(seed).shuffle(paragraphs)
    if count > len(paragraphs):
        raise ValueError(f"{count} documents asked for, the reference has {len(paragraphs)}")
    return paragraphs[:count]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_tokenizer(folder: Path, texts: list[str]) -> Path:
    """A byte-level BPE with ``VOCABULARY`` tokens and ``</s>`` at its end, as a Hugging Face directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder
