"""Lets Megatron run without a GPU. The only module that checks whether there is one.

``prepare()`` is called once, before any ``megatron`` import. With a GPU it does nothing, and Megatron runs as NVIDIA
ships it. Without one it

1. hides Transformer Engine and Apex, whose kernels need a GPU: Megatron would prefer their optimizers,
2. gives ``torch.cuda`` stand-ins that answer for the CPU (device, streams, events, memory, RNG),
3. redirects tensors on the device ``cuda`` to the CPU,
4. makes ``Tensor.type()`` return the names that Megatron's assertions expect,
5. replaces ``torch.compile`` by the identity: compiling the fused kernels takes longer than they save in a small run,
   and importing the compiler takes a second.

``prepare_megatron()`` runs after ``megatron.training`` is imported, and adapts the few places that insist on CUDA.
``flags()`` are the Megatron flags for such a run. ``fuse()`` lets forward passes use torch's fused attention instead of
Megatron's local one, which stores every score (a block of SmolLM2 on 2,048 tokens takes half the time). Training keeps
Megatron's, unless ``--attention-backend fused`` asks for ``engine/cpu_attention.py``.
"""

from __future__ import annotations

import functools
import os
import queue
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_prune import screen
from megatron_prune.engine import cpu_attention

GPU_LIBRARIES = ["transformer_engine", "apex"]
_prepared = False


def is_cpu() -> bool:
    """True if no GPU is visible, so that Megatron runs on the CPU over gloo."""
    return _cuda_is_available() is False


# Bound before any stand-in is installed.
_cuda_is_available = torch.cuda.is_available


def flags() -> list[str]:
    """Megatron flags that a CPU run needs; placed before the user's own, which override them."""
    if not is_cpu():
        return []
    return [
        "--distributed-backend", "gloo", "--transformer-impl", "local", "--use-cpu-initialization",
        "--no-gradient-accumulation-fusion", "--no-bias-swiglu-fusion", "--no-bias-gelu-fusion",
        "--no-masked-softmax-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion",
        "--no-persist-layer-norm", "--attention-backend", "unfused",
    ]  # fmt: skip


def prepare() -> None:
    """Install the stand-ins on ``torch``. A second call does nothing."""
    global _prepared
    screen.divert()  # the imports print nothing that users need
    if not is_cpu():
        return
    if _prepared:  # in the process that this one was forked from (engine/fork_server.py)
        return
    _prepared = True
    for library in GPU_LIBRARIES:
        sys.modules[library] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError
    _stand_in_for_cuda()
    _redirect_factories()
    _name_types_like_cuda()
    torch.compile = _identity_decorator  # type: ignore[assignment]


def prepare_megatron() -> None:
    """Adapt ``megatron.training`` after its import. A second call does nothing."""
    if not is_cpu():
        return
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.training import training

    tp_random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    tp_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    if not getattr(training.initialize_megatron, "is_guarded", False):  # network.guard comes after this
        training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    training.set_jit_fusion_options = lambda tp_size=None: None  # nothing is compiled, nothing to warm up
    cpu_attention.install()
    _keep_write_results_in_process()
    _draw_seeds_of_workers_apart()


def _draw_seeds_of_workers_apart() -> None:
    """A data loader draws the seed of its workers from the CPU's random numbers, with which dropout is computed here.

    Only the first tensor-parallel rank has a loader. Its dropout would differ from that of the others, and the weights
    that they share would drift apart; and a run that resumes would draw once more than one that was not interrupted.
    """
    from megatron.training import get_args, training

    build = training.build_pretraining_data_loader
    if getattr(build, "apart", False):
        return

    @functools.wraps(build)
    def build_apart(*positional: Any, **named: Any) -> Any:
        loader = build(*positional, **named)
        if isinstance(loader, torch.utils.data.DataLoader):
            loader.generator = torch.Generator().manual_seed(get_args().seed)
        return loader

    build_apart.apart = True  # type: ignore[attr-defined]
    training.build_pretraining_data_loader = build_apart


def _keep_write_results_in_process() -> None:
    """Megatron's saving starts a manager process only to pass write results from a function to its caller.

    The process imports the main module again (over a second per save of a small run) and outlives a rank that is
    killed. In a synchronous save both ends are in one process, so a plain queue is enough.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import get_args

    shared_between_processes = filesystem_async.get_write_results_queue
    if getattr(shared_between_processes, "in_process", False):
        return
    within_this_process: queue.Queue[Any] = queue.Queue()

    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        return shared_between_processes(mp_mode) if get_args().async_save else within_this_process

    get_write_results_queue.in_process = True  # type: ignore[attr-defined]
    filesystem_async.get_write_results_queue = get_write_results_queue


class _Stream:
    """A stream or event on a device that finishes every operation before it returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0
        self.device = torch.device("cpu")

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in ("record", "wait", "synchronize", "wait_stream", "wait_event"):
            return lambda *_, **__: None
        if name == "record_event":
            return lambda *_, **__: _Stream()
        if name == "query":
            return lambda *_, **__: True
        if name == "elapsed_time":
            return lambda *_, **__: 0.0
        raise AttributeError(name)


def _stand_in_for_cuda() -> None:
    cpu = torch.device("cpu")
    properties = SimpleNamespace(major=0, minor=0, name="cpu", total_memory=0, multi_processor_count=1)
    stand_ins: dict[str, Any] = {
        "current_device": lambda: cpu,
        # Megatron initialises its parallel groups only if it counts a device.
        "device_count": _local_world_size,
        "set_device": _nothing(), "synchronize": _nothing(), "empty_cache": _nothing(), "set_stream": _nothing(),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": _nothing(),  # torch.manual_seed calls it after seeding the CPU
        "get_rng_state": lambda device="cpu": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cpu": torch.set_rng_state(state),
        "memory_stats": lambda *_, **__: _Zeros(), "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0, "device_memory_used": lambda *_: 0,
        "reset_peak_memory_stats": _nothing(),
        "Stream": _Stream, "Event": _Stream,
        "current_stream": lambda *_: _Stream(), "default_stream": lambda *_: _Stream(),
        "stream": lambda stream: _Stream(),
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (0, 0),
        "get_device_name": lambda *_: "cpu",
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.random.get_rng_state = stand_ins["get_rng_state"]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _nothing() -> Callable[..., None]:
    # A new function each time: torch registers its functions in a table and refuses duplicates.
    return lambda *_, **__: None


class _Zeros(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return 0


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_factories() -> None:
    """Wrap the functions that create tensors: a ``TorchFunctionMode`` would slow down every operation."""
    from torch.utils._device import _device_constructors

    _device_constructors()  # `with torch.device(…)` keeps a table of these functions: fill it with the real ones first

    def on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            return make(*args, **kwargs)

        return wrapped

    for name in (
        "tensor",
        "as_tensor",
        "zeros",
        "ones",
        "empty",
        "full",
        "rand",
        "randn",
        "randint",
        "arange",
        "eye",
        "linspace",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "triu_indices",
    ):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    move = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return move(self, *args, **kwargs)

    torch.Tensor.to = to  # type: ignore[assignment,method-assign]


def _name_types_like_cuda() -> None:
    """Megatron's optimizers compare types with ``torch.cuda.FloatTensor`` and similar names."""
    type_of = torch.Tensor.type

    def named(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is not None:
            return type_of(self, dtype, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = named  # type: ignore[assignment,method-assign]


def _identity_decorator(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else _identity_decorator


def fuse(model: Iterable[torch.nn.Module]) -> None:
    """Make forward passes of these models without gradients faster: fused attention where it is plainly causal, gated
    MLPs without an addition of zero, and passes with a cache of keys and values (``engine/decoding.py``), which
    rotates keys before they are cached.

    Does nothing on a GPU, where Transformer Engine's attention is fused.
    """
    if not is_cpu():
        return
    from megatron.core.transformer.attention import Attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP
    from megatron.core.utils import unwrap_model

    from megatron_prune.engine import decoding

    for chunk in model:
        for module in chunk.modules():
            if type(module) is MLP and decoding.is_plain_mlp(module, gated=True):
                module.forward = functools.partial(_gated, module, module.forward)
            if isinstance(module, Attention):
                cached = module._adjust_key_value_for_inference
                module._adjust_key_value_for_inference = functools.partial(_cache_rotated, module, cached)
            if (
                isinstance(module, DotProductAttention)
                and module.attn_mask_type == AttnMaskType.causal
                and module.softmax_offset is None
                and module.scale_mask_softmax.window_size is None
            ):
                module.forward = functools.partial(_forward, module, module.forward)
        whole: Any = unwrap_model(chunk)
        layers = whole.decoder.layers
        decoding.attach(layers, ends=whole.post_process, plain=map(_is_fused, layers))


def _gated(module: Any, plain: Any, hidden: torch.Tensor, per_token_scale: Any = None, **more: Any) -> Any:
    """``MLP.forward`` of a gated MLP: Megatron adds its offset of zero to the linear half, a pass over memory."""
    if module.training or torch.is_grad_enabled() or per_token_scale is not None:
        return plain(hidden, per_token_scale, **more)
    both, bias = module.linear_fc1(hidden)
    if bias is not None:
        both = both + bias
    gate, linear = both.chunk(2, dim=-1)
    return module.linear_fc2(module.config.activation_func(gate).mul_(linear))


def _cache_rotated(
    module: Any, adjust: Any, context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rotary: Any,
    *others: Any, **more: Any,
) -> Any:  # fmt: skip
    """``Attention._adjust_key_value_for_inference``, with keys that are rotated before they are cached.

    Megatron rotates all cached keys at every token, which for a long text takes longer than the matrix products.
    """
    if rotary is None or context is None or not context.is_static_batching():
        return adjust(context, query, key, value, rotary, *others, **more)
    from megatron.core.models.common.embeddings.rotary_pos_embedding import apply_rotary_pos_emb

    start, scale = context.sequence_len_offset, module._yarn_concentration_factor
    angles = [one[start : start + len(key)] for one in rotary]
    if rotary[0] is rotary[1] and not (module.config.rotary_interleaved or module.config.multi_latent_attention):
        cos, sin = ((of(angles[0]) * scale).to(key.dtype) for of in (torch.cos, torch.sin))
        query, key = (_rotated(x, cos, sin) for x in (query, key))
    else:
        query, key = (
            apply_rotary_pos_emb(x, angle, config=module.config, mscale=scale, cp_group=module.pg_collection.cp)
            for x, angle in zip((query, key), angles, strict=True)
        )
    query, key, value, _, *rest = adjust(context, query, key, value, rotary, *others, **more)
    return query, key, value, (None, None), *rest


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``x`` [s, b, n, d] by ``cos`` and ``sin`` [s, 1, 1, r] of its first r ≤ d dimensions, whose
    halves belong together."""
    size = cos.shape[-1]
    first, second = x[..., :size].chunk(2, dim=-1)
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x[..., :size], cos, out=found[..., :size])
    of_first, of_second = found[..., :size].chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    of_first.addcmul_(second, sin_first, value=-1)
    of_second.addcmul_(first, sin_second)
    found[..., size:] = x[..., size:]
    return found


def _is_fused(layer: Any) -> bool:
    core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
    return getattr(getattr(core, "forward", None), "func", None) is _forward


def _forward(
    module: Any,
    unfused: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *others: Any,
    **more: Any,
) -> torch.Tensor:
    """``DotProductAttention.forward``: queries [sq, b, n, d], keys and values [sk, b, g, d] to [sq, b, n·d].

    One query with many keys is the last token of a sequence whose earlier keys were cached: it sees all of them.
    """
    last = len(query) == 1
    if module.training or torch.is_grad_enabled() or attention_mask is not None or not (last or len(query) == len(key)):
        output: torch.Tensor = unfused(query, key, value, attention_mask, *others, **more)
        return output
    repeats = query.shape[2] // key.shape[2]
    if not last and repeats > 1:  # many queries are faster with repeated keys
        key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, d]
    if last:  # the queries of a group are as many tokens that see the same
        q = q.reshape(*k.shape[:2], repeats, -1)
    scale = module.softmax_scale * (module.scale_mask_softmax.scale or 1.0)
    context = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=not last, scale=scale)
    if last:
        return context.reshape(1, len(context), -1)
    return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
