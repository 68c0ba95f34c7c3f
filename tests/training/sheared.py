"""The published algorithm for a model that fits in one process: plain torch in float64, with autograd.

It shares no code with ours but the reader of checkpoints.

Multi-head or grouped attention, no parallelism, no hooks: a forward pass with the factors written where the paper's
code multiplies them, norms over an explicit list of the remaining channels, one AdamW with groups for weights,
masks and multipliers, which ascend, and one clip of all gradients together. The caller passes the random numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint

LOW, HIGH, T = -0.1, 1.1, 2 / 3
Masks = dict[str, torch.Tensor]


def hard_concrete(log_alpha: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    noise = torch.log(u) - torch.log(1 - u)
    return torch.nn.functional.hardtanh(torch.sigmoid((noise + log_alpha) / T) * (HIGH - LOW) + LOW, 0, 1)


def removed(log_alpha: torch.Tensor) -> torch.Tensor:
    """Expected fraction of zeros of each row."""
    return torch.sigmoid(T * math.log(-LOW / HIGH) - log_alpha).clamp(1e-6, 1 - 1e-6).mean(-1)


class Model:
    """A Llama's weights in float64, from one of our checkpoints."""

    def __init__(self, path: Path):
        checkpoint = open_checkpoint(path)
        self.shape, args = checkpoint.shape, checkpoint.args
        self.epsilon, self.base = (
            args["layernorm_epsilon"] if "layernorm_epsilon" in args else 1e-5,
            args["rotary_base"],
        )
        self.vocabulary = args.get("vocab_size") or self.shape.padded_vocab_size
        self.weights = {name: checkpoint.read(name).double().requires_grad_() for name in checkpoint.names}

    def norm(self, x: torch.Tensor, gain: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        left = x if hidden is None else x[..., (hidden != 0).nonzero().flatten()]
        x = x * torch.rsqrt(left.pow(2).mean(-1, keepdim=True) + self.epsilon) * gain
        return x if hidden is None else x * hidden

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, heads, d]"""
        d = x.shape[-1]
        angles = torch.arange(x.shape[1]).double()[:, None] * self.base ** (-torch.arange(0, d, 2).double() / d)
        cos, sin = (torch.cat([f(angles)] * 2, -1)[None, :, None] for f in (torch.cos, torch.sin))
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat([-two, one], -1) * sin

    def logits(self, tokens: torch.Tensor, z: Mapping[str, torch.Tensor]) -> torch.Tensor:
        s, w, hidden = self.shape, self.weights, z.get("hidden")
        x = w["embedding.word_embeddings.weight"][tokens]
        x = x if hidden is None else x * hidden
        for layer in range(s.num_layers):
            written = 1.0 if hidden is None else hidden
            written = written * z["layer"][layer] if "layer" in z else written
            of = {
                name.split(".", 3)[3]: value for name, value in w.items() if name.startswith(f"decoder.layers.{layer}.")
            }
            a = self.norm(x, of["self_attention.linear_qkv.layer_norm_weight"], hidden)
            qkv = (a @ of["self_attention.linear_qkv.weight"].T).unflatten(
                -1, (s.num_query_groups, s.heads_per_group + 2, s.kv_channels)
            )  # [b, s, G, H/G + 2, d]
            q = self.rotate(qkv[..., :-2, :].flatten(2, 3))
            k, v = self.rotate(qkv[..., -2, :]), qkv[..., -1, :]
            k, v = (t.repeat_interleave(s.heads_per_group, 2) for t in (k, v))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / s.kv_channels**0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            context = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
            if "group" in z:
                context = context * z["group"][layer].repeat_interleave(s.heads_per_group)[:, None]
            if "head" in z:
                context = context * z["head"][layer].flatten()[:, None]
            x = x + (context.flatten(2) @ of["self_attention.linear_proj.weight"].T) * written
            m = self.norm(x, of["mlp.linear_fc1.layer_norm_weight"], hidden)
            gate, up = (m @ of["mlp.linear_fc1.weight"].T).chunk(2, -1)
            up = up * z["ffn"][layer] if "ffn" in z else up
            x = x + ((torch.nn.functional.silu(gate) * up) @ of["mlp.linear_fc2.weight"].T) * written
        x = self.norm(x, w["decoder.final_layernorm.weight"], hidden)
        out = x @ w["embedding.word_embeddings.weight" if s.tied else "output_layer.weight"].T
        return out[..., : self.vocabulary]


def cosine(step: int, steps: int, warmup: float, highest: float, lowest: float) -> float:
    """The learning rate of a step, counted from 0: from 0 to the highest, then along a cosine to the lowest."""
    if step <= warmup:
        return highest * step / warmup
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def learn(
    model: Model,
    targets: Mapping[str, tuple[tuple[int, ...], float]],
    batches: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]],
    uniform: Callable[[int, int], Mapping[str, torch.Tensor]],
    rates: Sequence[tuple[float, float] | tuple[float, float, float]],
    ramp: int,
    adam: Mapping[str, Any],
    decay: float,
    clip: float,
) -> tuple[list[Masks], list[Masks], list[float]]:
    """log α and multipliers by kind after every step, and every step's loss.

    ``targets``: shape of a kind's masks and the fraction to remove; ``batches``: per step, micro-batches of tokens and
    labels; ``rates``: per step, those of weights, of masks, and of multipliers where they are not the masks'.
    """
    masks = {
        kind: torch.full(shape, 5.0, dtype=torch.float64, requires_grad=True) for kind, (shape, _) in targets.items()
    }
    lambdas = {kind: torch.zeros(2, dtype=torch.float64, requires_grad=True) for kind in targets}
    weights = [(name, w) for name, w in model.weights.items()]
    groups = [
        {"params": [w for _, w in weights if w.ndim > 1], "weight_decay": decay},
        {"params": [w for _, w in weights if w.ndim == 1], "weight_decay": 0.0},
        {"params": list(masks.values()), "weight_decay": 0.0},
        {"params": list(lambdas.values()), "weight_decay": 0.0, "maximize": True},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, **adam)
    losses: list[float] = []
    learned: list[Masks] = []
    multiplied: list[Masks] = []
    for step, micro_batches in enumerate(batches):
        with torch.no_grad():
            for log_alpha in masks.values():
                log_alpha.clamp_(math.log(1e-2), math.log(1e2))
        optimizer.zero_grad()
        loss = 0.0
        for number, (tokens, labels) in enumerate(micro_batches):
            u = uniform(step, number)
            z = {kind: hard_concrete(masks[kind], u[kind].double().clamp(1e-6, 1 - 1e-6)) for kind in masks}
            out = model.logits(tokens, z)
            cross = torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten()) / len(micro_batches)
            cross.backward()
            loss += float(cross.detach())
        penalty = torch.zeros((), dtype=torch.float64)
        for kind, (_, target) in targets.items():
            excess = removed(masks[kind]) - target * min(1, step / ramp)
            penalty = penalty + (lambdas[kind][0] * excess + lambdas[kind][1] * excess**2).mean()
        penalty.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
        own = rates[step]
        for group, rate in zip(optimizer.param_groups, (own[0], own[0], own[1], own[-1]), strict=True):
            group["lr"] = rate
        optimizer.step()
        losses.append(loss)
        learned.append({kind: v.detach().clamp(math.log(1e-2), math.log(1e2)) for kind, v in masks.items()})
        multiplied.append({kind: value.detach().clone() for kind, value in lambdas.items()})
    return learned, multiplied, losses


def noise(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[int, int], Masks]:
    """u for a step and a micro-batch of it: one sequence of Philox for all units, kind after kind."""

    def uniform(step: int, micro_batch: int) -> Masks:
        key = hashlib.sha256(f"{seed} {step} {micro_batch}".encode()).digest()[:16]
        generator = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(key, "little")))
        return {
            kind: torch.from_numpy(generator.random(math.prod(shape), dtype=numpy.float32)).view(shape)
            for kind, shape in shapes.items()
        }

    return uniform


def kinds(source: ModelShape, target: ModelShape) -> dict[str, tuple[tuple[int, ...], float]]:
    """The inputs of ``learn``."""
    layers, groups, heads = source.num_layers, source.num_query_groups, source.heads_per_group
    shapes = {
        "layer": ((layers,), target.num_layers),
        "group": ((layers, groups), target.num_query_groups),
        "head": ((layers, groups, heads), target.num_attention_heads // target.num_query_groups),
        "ffn": ((layers, source.ffn_hidden_size), target.ffn_hidden_size),
        "hidden": ((source.hidden_size,), target.hidden_size),
    }
    return {kind: (shape, 1 - kept / shape[-1]) for kind, (shape, kept) in shapes.items() if kept < shape[-1]}
