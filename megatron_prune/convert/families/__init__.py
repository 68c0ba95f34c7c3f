"""The families of Hugging Face models that are imported and exported, and why others are not."""

from __future__ import annotations

from megatron_prune.convert.families import (
    gpt2,
    gpt_neox,
    layered_llama,
    llama,
    mistral,
    nemotron,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    starcoder2,
)
from megatron_prune.convert.families.model_family import ModelFamily

# In the order in which an export without a configuration of its own looks for one that can express the model.
FAMILIES: dict[str, ModelFamily] = {
    module.FAMILY.kind: module.FAMILY
    for module in (llama, mistral, qwen2, qwen3, smollm3, phi3, nemotron, starcoder2, gpt2, gpt_neox)
}
# With those whose layers differ, of which the first that can express the model is taken too.
ALL_FAMILIES = FAMILIES | {family.kind: family for family in (layered_llama.PUBLISHED, layered_llama.FAMILY)}
# What Megatron-LM 0.19 has no option for.
REFUSED = {
    "olmo2": "it normalizes the outputs of attention and MLP, and queries and keys over all heads at once",
    "olmo3": "it normalizes the outputs of attention and MLP, and queries and keys over all heads at once",
    "gemma": "it scales embeddings by the root of the hidden size, and the gate of its MLP is a GELU",
    "gemma2": "it caps logits and attention scores, scales embeddings, and normalizes the outputs of attention and MLP",
    "gemma3_text": "it scales embeddings, normalizes the outputs of attention and MLP, and has two bases of RoPE",
    "gemma3": "it scales embeddings, normalizes the outputs of attention and MLP, and has two bases of RoPE",
    "falcon": "attention and MLP share one norm",
    "phi": "attention and MLP share one norm, and the output layer has biases",
    "gptj": "attention and MLP share one norm, and the output layer has biases",
    "cohere": "attention and MLP share one norm, and logits are scaled",
    "bloom": "its positions are biases of the attention scores (ALiBi)",
    "mpt": "its positions are biases of the attention scores (ALiBi)",
    "opt": "its positions are shifted by two, and its activation is ReLU",
    "granite": "it scales embeddings, residuals and logits",
}
