"""Random models of every supported family, made by transformers: name -> (class prefix, what differs from ``SIZES``).

Sizes differ from one another, and gains and biases are random, so that a swapped or dropped tensor shows.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from tests.tiny import SEED, VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROPE = {"rope_theta": 700.0}
PARTIAL = {"rope_type": "default", **ROPE}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **ROPE}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 96, "n_layer": 4, "n_head": 8, "n_positions": 128, "n_inner": 160,
    "layer_norm_epsilon": 3e-4, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
FAMILY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 3e-4}),
    "llama-linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, **ROPE}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral-window": ("Mistral", {"sliding_window": 24, "rms_norm_eps": 3e-4}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 3e-4, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"rms_norm_eps": 3e-4, "tie_word_embeddings": False}),
    "smollm3": ("SmolLM3", {"rms_norm_eps": 3e-4, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"rms_norm_eps": 3e-4, "rope_parameters": PARTIAL | {"partial_rotary_factor": 0.75}}),
    "nemotron": ("Nemotron", {"norm_eps": 3e-4, "rope_parameters": PARTIAL | {"partial_rotary_factor": 0.5}}),
    "starcoder2": ("Starcoder2", {"norm_epsilon": 3e-4, "sliding_window": 24, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt-neox": (
        "GPTNeoX",
        {
            "use_parallel_residual": False, "layer_norm_eps": 3e-4, "tie_word_embeddings": False,
            "num_attention_heads": 6, "num_key_value_heads": None, "head_dim": None,
            "rope_parameters": PARTIAL | {"partial_rotary_factor": 0.25},
        },
    ),
    "pythia": (
        "GPTNeoX",
        {
            "use_parallel_residual": True, "layer_norm_eps": 3e-4, "tie_word_embeddings": False,
            "num_attention_heads": 6, "num_key_value_heads": None, "head_dim": None,
            "rope_parameters": PARTIAL | {"partial_rotary_factor": 0.25},
        },
    ),
}  # fmt: skip


# config.json of published models, and the number of their parameters. The vocabulary is padded to a multiple of 128.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen3-8B": (
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
            "head_dim": 128, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "rope_theta": 1000000, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36,
        },
        8_190_735_360,
    ),
    "gpt2": (
        {
            "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
            "n_ctx": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        },
        124_439_808 + 47 * 768,
    ),
    "Minitron-4B": (
        {
            "model_type": "nemotron", "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 9216,
            "head_dim": 128, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
            "max_position_embeddings": 4096, "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "relu2",
            "rope_theta": 10000.0, "tie_word_embeddings": False,
        },
        4_190_509_056,
    ),
}  # fmt: skip


def write_published(folder: Path, name: str) -> Path:
    """A directory with nothing but the config.json of a published model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name][0]))
    return folder


def write(folder: Path, name: str, **changes: Any) -> Path:
    """A random model in float32, as transformers saves it."""
    import torch
    import transformers

    family, differs = FAMILY_MODELS[name]
    settings = (differs if family == "GPT2" else SIZES | differs) | changes
    config = getattr(transformers, f"{family}Config")(**settings)
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{name} {SEED}".encode()))
        model = getattr(transformers, model_class)(config).float().eval()
        centered = family == "Nemotron"
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.uniform_(-0.3, 0.3)
                elif parameter.ndim == 1:
                    parameter.uniform_(-0.5, 0.5) if centered else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, tokens: Any) -> Any:
    """transformers' logits in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(tokens).logits
