"""Measured memory, in a rank: what Megatron's own model keeps for its backward pass, and what pruning a block takes."""

from __future__ import annotations

from typing import Any

from tests.training.small import GLOBAL_BATCH, SEQ_LENGTH

MODEL = (
    "--hidden-size 48 --num-attention-heads 6 --kv-channels 12 --ffn-hidden-size 96 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --max-position-embeddings 128 --padded-vocab-size 384 "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --mock-data --train-iters 1 "
    f"--seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size {GLOBAL_BATCH} --lr 1e-3"
).split()


def saved_bytes(layers: int, flags: list[str]) -> tuple[int, Any]:
    """Bytes of the tensors, weights aside, that a forward pass of a model of ``layers`` blocks leaves saved; its args.

    A view counts only its own elements. Attention is torch's fused one, which keeps the same as flash attention.
    """
    import functools

    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_prune.engine import runtime

    args = runtime.start("pretrain", [*MODEL, "--num-layers", str(layers), *flags])
    runtime.initialize(args)
    (model,) = runtime.build_model(args)

    def fused(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
        context = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    for module in model.modules():
        if isinstance(module, DotProductAttention):
            module.forward = functools.partial(fused)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[tuple[int, int], int] = {}
    alive: list[torch.Tensor] = []  # so that memory is not freed and reused during the count

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        rotary = tensor.dim() == 4 and tensor.shape[1:3] == (1, 1)  # tables, which a fused kernel does not save
        if tensor.untyped_storage().data_ptr() not in weights and not rotary:
            kept[tensor.data_ptr(), tensor.numel()] = tensor.nbytes
            alive.append(tensor)
        return tensor

    tokens = torch.randint(0, 384, (2, SEQ_LENGTH))
    positions = torch.arange(SEQ_LENGTH)[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, positions, None, labels=tokens)
    torch.distributed.destroy_process_group()
    return sum(kept.values()), args


def pruned_bytes(method: str, hidden: int, ffn: int) -> tuple[float, Any]:
    """Growth of a process, in bytes, that gathers for ``method`` and prunes a block, without its weights; its args."""
    from types import SimpleNamespace

    import torch

    from megatron_prune.checkpoint.layout import ModelShape
    from megatron_prune.engine import runtime
    from megatron_prune.methods import get_sparse
    from megatron_prune.methods.accumulators import SquareSums
    from megatron_prune.methods.base import Sparsity
    from megatron_prune.methods.sparsegpt import Hessian
    from megatron_prune.sparse.block import prune_block
    from megatron_prune.sparse.request import SparsifyRequest
    from tests.benchmarks.resident import give_back_at_once, high_water

    flags = f"--hidden-size {hidden} --ffn-hidden-size {ffn} --kv-channels {hidden // 6} --num-layers 2 --bf16".split()
    args = runtime.start("pretrain", [*MODEL, *flags])
    runtime.initialize(args)
    shape = ModelShape.from_args(vars(args))
    sizes = {"qkv": (3 * hidden, hidden), "proj": (hidden, hidden), "fc1": (2 * ffn, hidden), "fc2": (hidden, ffn)}
    linears = {
        name: SimpleNamespace(weight=torch.nn.Parameter(torch.randn(size, dtype=torch.bfloat16)))
        for name, size in sizes.items()
    }
    block = SimpleNamespace(
        self_attention=SimpleNamespace(linear_qkv=linears["qkv"], linear_proj=linears["proj"]),
        mlp=SimpleNamespace(linear_fc1=linears["fc1"], linear_fc2=linears["fc2"]),
    )
    request = SparsifyRequest(
        method, get_sparse(method), dict.fromkeys(sizes, Sparsity.parse(0.5, "unstructured")), None, None
    )

    def work() -> Any:
        statistics: dict[str, Any] = {}
        for name, (_, inputs) in sizes.items():
            if request.method.statistic == "hessian":
                statistics[name] = Hessian(inputs, 10 * inputs)
                statistics[name].total.fill_(0.1).diagonal().add_(1)
            else:
                statistics[name] = SquareSums(inputs)
                statistics[name].total.fill_(1)
            statistics[name].count = 1
        return prune_block(block, shape, request, 0, statistics, torch.bfloat16)

    give_back_at_once()
    work()  # libraries' pages are touched for the first time
    _, grown = high_water(work)
    torch.distributed.destroy_process_group()
    args.method, args.modules = method, ",".join(sizes)
    return grown, args
