"""A Llama whose layers have their own FFN sizes, heads and query groups, or no attention or no MLP at all.

megatron_prune ships this file with a model whose layers differ. Load the model with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. It needs transformers and nothing else.

``block_configs`` in ``config.json`` has one entry per layer, as in the published Llama-Nemotron models:

* ``attention``: ``no_op`` (the layer has none), ``n_heads_in_group`` (query heads per group), and
  ``num_attention_heads`` where the layer has other heads than the model's ``num_attention_heads``;
* ``ffn``: ``no_op``, and ``intermediate_size``, or ``ffn_mult`` of the hidden size.

Everything else is a Llama: the same blocks, the same names of tensors. A part that a layer lacks has no norm either.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP


class LayeredLlamaConfig(LlamaConfig):
    model_type = "layered-llama"

    def validate_architecture(self) -> None:
        """A layer's heads need not divide the hidden size: ``head_dim`` is given."""


class NemotronNasConfig(LayeredLlamaConfig):
    model_type = "nemotron-nas"


class NoAttention(nn.Module):
    """In place of the attention of a layer that has none."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """In place of the MLP of a layer that has none."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class LayeredLlamaModel(LlamaModel):
    config_class = LayeredLlamaConfig

    def __init__(self, config: LayeredLlamaConfig) -> None:
        super().__init__(config)
        cached = 0  # layers with attention so far: the cache numbers those alone, and reads its length from the first
        for layer, block in zip(self.layers, config.block_configs, strict=True):
            attention, ffn = block["attention"], block["ffn"]
            sized = copy.copy(config)
            if attention.get("no_op"):
                layer.input_layernorm, layer.self_attn = nn.Identity(), NoAttention()
            else:
                sized.num_attention_heads = attention.get("num_attention_heads") or config.num_attention_heads
                sized.num_key_value_heads = sized.num_attention_heads // attention["n_heads_in_group"]
                layer.self_attn = LlamaAttention(sized, cached)
                layer.self_attn.config = config  # which says how attention is computed, also when that changes
                cached += 1
            if ffn.get("no_op"):
                layer.post_attention_layernorm, layer.mlp = nn.Identity(), NoMLP()
            else:
                sized.intermediate_size = ffn.get("intermediate_size") or of_factor(ffn["ffn_mult"], config.hidden_size)
                layer.mlp = LlamaMLP(sized)
        self.post_init()


def of_factor(factor: float, hidden_size: int) -> int:
    """The FFN size that ``ffn_mult`` stands for: 2/3 of the product, rounded up to a multiple of 256."""
    return -(-int(2 * factor * hidden_size / 3) // 256) * 256


class LayeredLlamaForCausalLM(LlamaForCausalLM):
    config_class = LayeredLlamaConfig

    def __init__(self, config: LayeredLlamaConfig) -> None:
        super().__init__(config)
        self.model = LayeredLlamaModel(config)
        self.post_init()


class DeciLMForCausalLM(LayeredLlamaForCausalLM):
    config_class = NemotronNasConfig
