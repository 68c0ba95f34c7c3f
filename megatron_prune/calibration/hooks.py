"""Hooks that pass activations of Megatron's modules to the accumulators, on every rank of any TP×PP×DP layout.

Where each statistic is read (activations are [s, b, n]):

* block influence: input and output of a ``TransformerLayer``;
* ``input_layernorm``, ``pre_mlp_layernorm``: the norms' outputs, which ``linear_qkv`` and
  ``linear_fc1`` multiply (``engine/spec.py``); ``final_layernorm``: its output;
* ``attention``, ``mlp``: the inputs of ``linear_proj`` and ``linear_fc2``, of which a tensor-parallel
  rank holds a contiguous slice of channels.

Every rank sums over its own layers (PP), sequences (DP) and channels (TP). TP ranks divide the work on activations
that all of them hold: each sums a slice of the norms' channels and every TP-th layer's cosines. In a sequence-parallel
model each rank has its own tokens: it sums their cosines for all layers, and norms' outputs are gathered, because a
mean over a sequence's tokens needs all of them before it is squared.
``gather`` writes the sums into global tensors of zeros, which one all-reduce completes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.engine import spec
from megatron_prune.methods.accumulators import QUANTITIES, ChannelSums, CosineDistance, Workspace
from megatron_prune.structured.statistics import site_shapes, tensor_shapes


class ActivationRecorder:
    """Attached to this rank's stage while open: ``with ActivationRecorder(stage, shape) as recorder: …``."""

    def __init__(self, stage: torch.nn.Module, shape: ModelShape):
        self.shape = shape
        self._device = next(stage.parameters()).device
        self._workspace = Workspace()
        # (statistics key, layer or None, first channel) of every accumulator
        self._channels: list[tuple[str, int | None, int, ChannelSums]] = []
        self._cosines: list[tuple[int, CosineDistance]] = []
        self._handles: list[Any] = []
        self._rank = mpu.get_tensor_model_parallel_rank()
        self._ranks = mpu.get_tensor_model_parallel_world_size()
        decoder: Any = unwrap_model(stage).decoder  # bf16 and fp16 models are wrapped
        self._config = decoder.config
        for block in decoder.layers:
            self._attach_block(block, block.layer_number - 1)  # Megatron counts layers of all stages from 1
        if decoder.final_layernorm is not None:
            self._on_output(decoder.final_layernorm, self._shared("final_layernorm", None))

    def __enter__(self) -> ActivationRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _attach_block(self, block: Any, layer: int) -> None:
        attention, mlp = block.self_attention, block.mlp
        for site, linear in (("input_layernorm", attention.linear_qkv), ("pre_mlp_layernorm", mlp.linear_fc1)):
            self._on_input(linear, spec.multiplied(linear, self._shared(site, layer)))
        self._on_input(attention.linear_proj, self._sharded("attention", layer))
        self._on_input(mlp.linear_fc2, self._sharded("mlp", layer))
        if spec.sequence_ranks(self._config) > 1 or layer % self._ranks == self._rank:
            cosine = CosineDistance(self._device, self._workspace)
            self._cosines.append((layer, cosine))
            # Megatron calls a layer by keyword and gets (hidden states, context) back.
            self._handles.append(
                block.register_forward_hook(
                    lambda _, args, named, out: cosine.add(named.get("hidden_states", *args[:1]), out[0]),
                    with_kwargs=True,
                )
            )

    def _shared(self, site: str, layer: int | None) -> Callable[[torch.Tensor], None]:
        """A hook for activations that all TP ranks hold, or share by tokens; sums this rank's slice of the channels."""
        channels = site_shapes(self.shape)[site][-1]
        first, last = (channels * r // self._ranks for r in (self._rank, self._rank + 1))
        sums = self._accumulator(site, layer, first, last - first)
        return spec.whole_sequences(self._config, lambda x: sums.add(x[..., first:last]))

    def _sharded(self, site: str, layer: int) -> Callable[[torch.Tensor], None]:
        """A hook for activations of which this rank holds a slice of the channels."""
        channels = site_shapes(self.shape)[site][-1] // self._ranks
        return self._accumulator(site, layer, self._rank * channels, channels).add

    def _accumulator(self, site: str, layer: int | None, first: int, channels: int) -> ChannelSums:
        sums = ChannelSums(channels, self._device, self._workspace)
        self._channels.append((site, layer, first, sums))
        return sums

    def _on_output(self, module: Any, add: Callable[[torch.Tensor], None]) -> None:
        self._handles.append(module.register_forward_hook(lambda _module, _args, out: add(out)))

    def _on_input(self, module: Any, add: Callable[[torch.Tensor], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _module, args: add(args[0])))

    def gather(self, loss_sum: float) -> tuple[dict[str, torch.Tensor], float]:
        """Whole statistics on every rank, and the sum of ``loss_sum`` over ranks. Collective."""
        sizes = tensor_shapes(self.shape)
        counts = [torch.Size(size).numel() for size in sizes.values()]
        flat = torch.zeros(1 + sum(counts), dtype=torch.float64, device=self._device)
        flat[0] = loss_sum
        views = dict(zip(sizes, torch.split(flat[1:], counts), strict=True))
        tensors = {name: views[name].view(size) for name, size in sizes.items()}
        for layer, cosine in self._cosines:
            tensors["block_influence"][layer] = cosine.total
        for site, of_layer, first, sums in self._channels:
            for quantity, values in zip(QUANTITIES, sums.sums, strict=True):
                place = tensors[f"{site}.{quantity}"]
                (place if of_layer is None else place[of_layer])[first : first + len(values)] = values
        torch.distributed.all_reduce(flat)
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}, float(flat[0])
