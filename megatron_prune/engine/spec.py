"""The differences between Megatron's two layer specs, local and Transformer Engine: no other module knows them.

Checkpoints do not differ: names and shapes are the same, and the ``_extra_state`` that one spec's modules need is in
every checkpoint (``checkpoint/writer.py``). Models do:

* Transformer Engine fuses a block's norms into the linears that follow, as their ``layer_norm_weight``. The block's own
  norm is an identity, and no module outputs the normalized values;
* with Transformer Engine a model can be sequence parallel: outside attention and MLP, each tensor-parallel rank then
  has only its share of a sequence's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Listener = Callable[[torch.Tensor], None]

ROW_PARALLEL = ("proj", "fc2")  # Megatron's name for linears whose inputs are sharded


def linears(block: Any) -> dict[str, Any]:
    """The linears of a Megatron transformer layer by module name, which both specs have; those of a part that the
    layer lacks are left out."""
    attention, mlp = block.self_attention, block.mlp
    found = {"qkv": attention.linear_qkv, "proj": attention.linear_proj} if has_attention(block) else {}
    return found | ({"fc1": mlp.linear_fc1, "fc2": mlp.linear_fc2} if has_mlp(block) else {})


def has_attention(block: Any) -> bool:
    """False if a layer was built without attention, and so without the norm before it."""
    return hasattr(block.self_attention, "linear_qkv")


def has_mlp(block: Any) -> bool:
    """False if a layer was built without an MLP, and so without the norm before it."""
    return hasattr(block.mlp, "linear_fc1")


def norms(block: Any) -> Iterator[Any]:
    """The modules that hold the gains of a block's two norms: norms, or the linears that they are fused into."""
    found = linears(block)
    for norm, name in ((block.input_layernorm, "qkv"), (block.pre_mlp_layernorm, "fc1")):
        if name in found:
            yield found[name] if is_fused(found[name]) else norm


def gain(norm: Any) -> torch.nn.Parameter:
    """The gain of a module from ``norms``, or of a final norm."""
    parameter: torch.nn.Parameter = norm.layer_norm_weight if is_fused(norm) else norm.weight
    return parameter


def bias(norm: Any) -> torch.nn.Parameter | None:
    """The bias of a module from ``norms``, or of a final norm; None for RMSNorm."""
    found: torch.nn.Parameter | None = getattr(norm, "layer_norm_bias" if is_fused(norm) else "bias", None)
    return found


def gain_offset(norm: Any) -> int:
    """Added to the gain before it multiplies: 1 if it is stored around zero."""
    return int(bool(getattr(norm, "zero_centered_gamma", False)))


def is_fused(linear: Any) -> bool:
    """True if a module from ``norms`` is a linear that a norm is fused into."""
    return hasattr(linear, "layer_norm_weight")


def multiplied(linear: Any, listener: Listener) -> Listener:
    """A hook on the input of ``linear`` that gives ``listener`` what its weight multiplies: recomputes a fused norm."""
    if not is_fused(linear):
        return listener

    def recompute(x: torch.Tensor) -> None:
        wide, weight = x.float(), linear.layer_norm_weight.float() + gain_offset(linear)
        if linear.normalization == "RMSNorm":
            normal = torch.nn.functional.rms_norm(wide, wide.shape[-1:], weight, linear.eps)
        else:
            bias = linear.layer_norm_bias.float()
            normal = torch.nn.functional.layer_norm(wide, wide.shape[-1:], weight, bias, linear.eps)
        listener(normal.to(x.dtype))

    return recompute


def sequence_ranks(config: Any) -> int:
    """Over how many ranks a sequence's tokens are shared out between blocks, of a model's config."""
    from megatron.core import parallel_state as mpu  # here: the parsing of flags imports this module before Megatron

    return mpu.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1


def whole_sequences(config: Any, listener: Listener) -> Listener:
    """Takes this rank's tokens [s/TP, b, n] (or [s, b, n]) and gives ``listener`` whole sequences [s, b, n].

    Collective. For tensors between blocks: the residual stream, embeddings, norms' outputs.
    """
    ranks = sequence_ranks(config)
    if ranks == 1:
        return listener
    from megatron.core import parallel_state as mpu

    def gather(x: torch.Tensor) -> None:
        whole = x.new_empty(ranks * len(x), *x.shape[1:])
        group = mpu.get_tensor_model_parallel_group()
        torch.distributed.all_gather_into_tensor(whole, x.detach().contiguous(), group=group)
        listener(whole)

    return gather
