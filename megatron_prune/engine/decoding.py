"""Layers that read prompts and extend a cache of keys and values on the CPU, with little work besides the products.

In Megatron's own layers a token costs more in bookkeeping than in small matrix products. ``attach`` gives plain layers
(attention over all earlier tokens, an MLP) another ``forward`` for passes with a ``Cache``; all other passes, and
all other layers, stay Megatron's. It computes the same, with these differences:

* The prompts of a batch are read packed, one after the other as one sequence [1, N], without padding. In the cache
  they end at the same place, so that the next tokens, [B, 1], are written to one place:

        place       0 1 2 3 4 5 6
        sequence 0  a b c d e f g     a prompt of five tokens, and two more
        sequence 1  . . a b c d e     a prompt of three, after two places that nothing sees

* Keys are cached rotated, next to their values and head by head, in which order attention reads them.
* The last layer computes only the last token of each prompt, after its keys and values: no other logits are wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.utils import unwrap_model


class Cache(StaticInferenceContext):  # type: ignore[misc]  # megatron is not type-checked
    """Keys and values of sequences that are decoded together, and what the layers share in a pass.

    ``lengths`` of their prompts; ``longest``: how many tokens the cache has room for in each sequence.
    """

    def __init__(self, lengths: Sequence[int], longest: int):
        super().__init__(len(lengths), longest)
        self.widest = max(lengths)
        self.starts = [self.widest - length for length in lengths]  # the place of each prompt's first token
        stops = list(itertools.accumulate(lengths))  # in the packed prompts
        self.spans = list(zip([0, *stops], stops, strict=False))
        self.last = torch.tensor(stops) - 1  # of each prompt's tokens
        self._memory: dict[int, torch.Tensor] = {}
        self._unseen: torch.Tensor | None = None
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None  # cosines and signed sines of all places
        self._turns: tuple[torch.Tensor, torch.Tensor] | None = None  # those of this pass

    @property
    def reads_prompts(self) -> bool:
        """Whether this pass reads the packed prompts [1, N], rather than the next tokens [B, 1]."""
        return bool(self.sequence_len_offset == 0)

    def positions(self) -> torch.Tensor:
        """Of the tokens of this pass in their texts, int64 [1, N] or [B, 1]."""
        if self.reads_prompts:
            return torch.cat([torch.arange(end - start) for start, end in self.spans])[None]
        return int(self.sequence_len_offset) - torch.tensor(self.starts)[:, None]

    def advance(self) -> None:
        """The tokens of this pass have been read by all layers of this stage."""
        self.increment_sequence_len_offset(self.widest if self.reads_prompts else 1)
        self._turns = None

    def memory(self, layer: int, groups: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Keys and values of a layer, [B, groups, 2, longest, size]."""
        if layer not in self._memory:
            shape = self.max_batch_size, groups, 2, self.max_sequence_length, size
            # Zeros, not what was in memory: even places that nothing sees are multiplied, by zero.
            self._memory[layer] = torch.zeros(shape, dtype=dtype)
        return self._memory[layer]

    def unseen(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores of all places, [B, 1, 1, longest], to hide those before a prompt; None if there
        are none."""
        if self._unseen is None and any(self.starts):
            hidden = torch.arange(self.max_sequence_length) < torch.tensor(self.starts)[:, None]
            self._unseen = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None, None]
        return self._unseen

    def turns(self, rotary: torch.Tensor, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of this pass's tokens, [N or 1, 1, 1, r], from the angles of all places [longest, 1, 1, r].

        Sines of the first half are negated: they multiply the other half, which a rotation subtracts.
        """
        if self._angles is None:
            cos, sin = (of(rotary) * scale for of in (torch.cos, torch.sin))
            sin[..., : sin.shape[-1] // 2].neg_()
            self._angles = cos.to(dtype), sin.to(dtype)
        if self._turns is None:
            place = self.sequence_len_offset
            places: Any = slice(place, place + 1)
            if self.reads_prompts:
                places = torch.cat([torch.arange(start, self.widest) for start in self.starts])
            self._turns = self._angles[0][places], self._angles[1][places]
        return self._turns


class _Layer:
    """``TransformerLayer.forward`` of one layer: Megatron's ``plain`` one, but for passes with a ``Cache``."""

    def __init__(self, layer: Any, *, only_last: bool):
        self.plain, self._only_last = layer.forward, only_last
        self._norms = layer.input_layernorm.forward, layer.pre_mlp_layernorm.forward  # without hooks
        self._parallel = getattr(layer, "parallel_residual", False)  # engine/parallel_residual.py
        attention, mlp = layer.self_attention, layer.mlp
        self._qkv, self._proj = attention.linear_qkv, attention.linear_proj
        self._mlp, self._is_plain_mlp, self._gated = mlp, is_plain_mlp(mlp), mlp.config.gated_linear_unit
        self._activate = mlp.config.activation_func if self._gated else mlp.activation_func
        self._number, self._size = layer.layer_number, attention.hidden_size_per_attention_head
        self._groups = attention.num_query_groups_per_partition
        self._repeats = attention.num_attention_heads_per_partition // self._groups  # queries per key
        self._head_norms = attention.q_layernorm, attention.k_layernorm
        core, skips = attention.core_attention, attention.config.no_rope_freq
        self._scale = core.softmax_scale * (core.scale_mask_softmax.scale or 1.0)
        self._turns = not (skips and skips[self._number - 1])
        self._turn_scale = attention._yarn_concentration_factor

    def __call__(self, *positional: Any, **named: Any) -> Any:
        cache = named.get("inference_context")
        if not isinstance(cache, Cache):
            return self.plain(*positional, **named)
        hidden = named["hidden_states"]  # [N, 1, h] or [1, B, h]
        x = hidden.reshape(-1, hidden.shape[-1])
        attended = self._attention(self._norms[0](x), cache, named["rotary_pos_emb"])
        if cache.reads_prompts and self._only_last:
            x = x[cache.last]
        after = attended.add_(x)
        made = self._fed_forward(self._norms[1](x if self._parallel else after)).add_(after)
        return made.view(*((1, -1) if len(made) == len(cache.starts) else (-1, 1)), made.shape[-1]), None

    def _attention(self, x: torch.Tensor, cache: Cache, rotary: torch.Tensor | None) -> torch.Tensor:
        """Attention's output [n, h] of normalized ``x`` [n, h]: tokens of packed prompts, or one of each sequence."""
        repeats = self._repeats
        mixed = _times(self._qkv, x).view(len(x), self._groups, repeats + 2, self._size)
        query, key = mixed[:, :, :repeats], mixed[:, :, repeats]
        for norm, of in zip(self._head_norms, (query, key), strict=True):
            if norm is not None:
                of.copy_(norm(of))
        if rotary is not None and self._turns:
            cos, sin = cache.turns(rotary, self._turn_scale, x.dtype)
            turned = mixed[:, :, : repeats + 1, : cos.shape[-1]]  # queries and keys
            other = turned.roll(cos.shape[-1] // 2, -1)
            turned.mul_(cos).addcmul_(other, sin)
        memory, fresh = cache.memory(self._number, self._groups, self._size, x.dtype), mixed[:, :, repeats:]
        if not cache.reads_prompts:
            memory[:, :, :, cache.sequence_len_offset] = fresh
            return _times(self._proj, self._of_last(query, memory, cache, cache.sequence_len_offset + 1))
        for kept, start, (begin, end) in zip(memory, cache.starts, cache.spans, strict=True):
            kept[:, :, start : cache.widest] = fresh[begin:end].permute(1, 2, 0, 3)
        if self._only_last:
            return _times(self._proj, self._of_last(query[cache.last], memory, cache, cache.widest))
        found = torch.empty_like(query, memory_format=torch.contiguous_format)
        for kept, start, (begin, end) in zip(memory, cache.starts, cache.spans, strict=True):
            keys, values = (
                kept[:, which, None, start : cache.widest].expand(-1, repeats, -1, -1) for which in (0, 1)
            )  # [g, repeats, s, d]
            context = torch.nn.functional.scaled_dot_product_attention(
                query[begin:end].permute(1, 2, 0, 3), keys, values, is_causal=True, scale=self._scale
            )
            found[begin:end] = context.permute(2, 0, 1, 3)
        return _times(self._proj, found.view(len(x), -1))

    def _of_last(self, query: torch.Tensor, memory: torch.Tensor, cache: Cache, length: int) -> torch.Tensor:
        """What the last token of each sequence sees, [B, g·repeats·d], of ``length`` places; queries [B, g, repeats,
        d]: those of a group are as many tokens that see the same."""
        unseen = cache.unseen(query.dtype)
        context = torch.nn.functional.scaled_dot_product_attention(
            query, memory[:, :, 0, :length], memory[:, :, 1, :length],
            attn_mask=None if unseen is None else unseen[..., :length], scale=self._scale,
        )  # fmt: skip
        return context.reshape(len(query), -1)

    def _fed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP's output [n, h] of normalized ``x`` [n, h]."""
        if not self._is_plain_mlp:
            return _with_bias(*self._mlp(x))
        wide = _times(self._mlp.linear_fc1, x)
        if self._gated:
            gate, linear = wide.chunk(2, dim=-1)
            wide = self._activate(gate).mul_(linear)
        else:
            wide = self._activate(wide)
        return _times(self._mlp.linear_fc2, wide)


def _times(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear of Megatron's of ``x`` [n, i], with its bias."""
    if linear.tp_group.size() == 1:
        return torch.nn.functional.linear(x, linear.weight, linear.bias)
    return _with_bias(*linear(x))


def _with_bias(output: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return output if bias is None else output + bias


def attach(layers: Sequence[Any], *, ends: bool, plain: Iterable[bool]) -> None:
    """Give ``layers`` of a stage the passes of this module where ``plain`` says that their attention is, and the rest
    of them is too. ``ends``: the last of them is that of the model."""
    for number, (layer, is_plain) in enumerate(zip(layers, plain, strict=True), 1):
        if is_plain and _is_plain(layer):
            layer.forward = _Layer(layer, only_last=ends and number == len(layers))


def is_attached(model: Iterable[torch.nn.Module]) -> bool:
    """Whether all layers of the chunks of this stage have these passes, so that it can run with a ``Cache``."""
    for chunk in model:
        whole: Any = unwrap_model(chunk)
        layers = whole.decoder.layers
        if not all(isinstance(layer.forward, _Layer) for layer in layers) or (whole.post_process and not layers):
            return False
    return True


def _is_plain(layer: Any) -> bool:
    """Whether ``_Layer`` computes what this layer does, apart from its core attention."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    attention, mlp, config = layer.self_attention, layer.mlp, layer.config
    if (type(layer), type(attention), type(mlp)) != (TransformerLayer, SelfAttention, MLP):
        return False
    norms = layer.input_layernorm, layer.pre_mlp_layernorm
    linears = attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2
    return bool(
        all(isinstance(norm, torch.nn.RMSNorm | torch.nn.LayerNorm) for norm in norms)
        and all(type(linear) in (ColumnParallelLinear, RowParallelLinear) for linear in linears)
        and not any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears)
        and config.num_query_groups >= attention.world_size
        and not (config.attention_output_gate or config.rotary_interleaved or config.fp32_residual_connection)
    )


def is_plain_mlp(mlp: Any, *, gated: bool = False) -> bool:
    """Whether an MLP of Megatron's is fc2(act(fc1(x))), or fc2(act(gate) · linear) where it is gated; ``gated``: only
    the latter."""
    config = mlp.config
    return bool(
        (config.gated_linear_unit or not gated)
        and not config.bias_activation_fusion
        and not config.use_te_activation_func
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0
    )
