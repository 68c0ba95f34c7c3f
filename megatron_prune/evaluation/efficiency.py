"""What a model costs to run, from its shape and masks, and as measured on this device.

FLOPs and memory of weights and of cached keys and values are theoretical and exact.

Latency and throughput are measured: a prompt read at once, then one token at a time. The model runs in transformers, on
the checkpoint's export, so that dense models of any shape and 2:4 models run the same code but for their matrix
products. Nothing is compiled. Where 2:4 cannot be measured, ``why`` says so. The sparse kernels need an NVIDIA GPU.
That part of this file was never run on one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_prune import screen, verbs
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.convert import huggingface
from megatron_prune.errors import UsageError
from megatron_prune.masks.with_weights import masks_of

SEQUENCE = 2048  # tokens of the forward pass whose FLOPs are shown
PACKED = "2:4"
THEORETICAL = "theoretical, not measured"  # what is shown in place of the times of kernels that did not run
# Of four weights two values stay; each has an index of two bits (NVIDIA's sparse tensor cores, 16-bit types and
# smaller), so a packed weight takes half a value and one bit.
INDEX_BYTES = 1 / 8


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of a forward pass over ``SEQUENCE`` tokens, and bytes. ``flops_kept``: without the weights that masks
    remove. ``weight_bytes_packed``: if weights under 2:4 masks were packed; None without any. ``cache_bytes``: keys
    and values of one token."""

    parameters: int
    flops: int
    flops_kept: int
    weight_bytes: int
    weight_bytes_packed: int | None
    cache_bytes: int


def cost(shape: ModelShape, itemsize: int, *, removed: int = 0, packable: int = 0) -> ModelCost:
    """Of a model whose weights and cache have ``itemsize`` bytes per value; ``removed`` weights of the linears are zero
    by masks, and ``packable`` weights are in masks of the pattern 2:4."""
    parameters = shape.parameters()
    saved = packable * itemsize / 2 - packable * INDEX_BYTES
    return ModelCost(
        parameters=parameters,
        flops=shape.forward_flops(SEQUENCE),
        flops_kept=shape.forward_flops(SEQUENCE, removed),
        weight_bytes=parameters * itemsize,
        weight_bytes_packed=round(parameters * itemsize - saved) if packable else None,
        cache_bytes=2 * sum(layer.num_query_groups for layer in shape.by_layer()) * shape.kv_channels * itemsize,
    )


def of_checkpoint(checkpoint: Checkpoint, *, allow_missing_masks: bool = False) -> dict[str, Any]:
    """The cost of a checkpoint and the number of its non-zero weights, which reads all of them. MasksError if its masks
    do not fit it."""
    shape, masks = checkpoint.shape, masks_of(checkpoint, allow_missing=allow_missing_masks)
    entries = masks.entries if masks is not None else {}
    packable = sum(e.shape[0] * e.shape[1] for e in entries.values() if e.pattern == PACKED)
    dtype = checkpoint.spec("embedding.word_embeddings.weight").dtype
    found = cost(shape, dtype.itemsize, removed=masks.removed if masks else 0, packable=packable)
    stored = sum(checkpoint.spec(name).nbytes for name in checkpoint.names)  # norms may have another type
    zeros = sum(int((block == 0).sum()) for name in checkpoint.names for block in checkpoint.row_blocks(name))
    packed = found.weight_bytes_packed
    return {
        "parameters": found.parameters,
        "parameters_nonzero": found.parameters - zeros,
        "dtype": str(dtype).removeprefix("torch."),
        "pattern": next(iter({entry.pattern for entry in entries.values()}), None) if entries else None,
        "flops": found.flops,
        "flops_kept": found.flops_kept,
        "weight_bytes": stored,
        "weight_bytes_packed": None if packed is None else packed + stored - found.weight_bytes,
        "cache_bytes": found.cache_bytes,
    }


DENSE, SPARSE, SPARSE_FP8 = "dense", "2:4", "fp8 2:4"
_LEAST = {SPARSE: (8, 0), SPARSE_FP8: (9, 0)}  # compute capability


@dataclass(frozen=True)
class Workload:
    """``batch`` prompts of ``prompt`` tokens, continued by ``new`` tokens; ``repeats`` count after ``warmup``."""

    batch: int = 1
    prompt: int = 512
    new: int = 64
    repeats: int = 5
    warmup: int = 1


def workload(asked: verbs.WorkloadSettings) -> Workload:
    """UsageError for numbers that cannot be."""
    for name, least in asdict(Workload(1, 1, 1, 1, 0)).items():
        if getattr(asked, name) < least:
            raise UsageError(f"--{name}", got=getattr(asked, name), expected=f"at least {least}")
    return Workload(asked.batch, asked.prompt, asked.new, asked.repeats, asked.warmup)


@dataclass(frozen=True)
class Timing:
    """Seconds of one phase: median, least and most over the repeats; ``tokens_per_second`` at the median."""

    seconds: float
    least: float
    most: float
    tokens_per_second: float

    @classmethod
    def of(cls, seconds: Sequence[float], tokens: int) -> Timing:
        """``tokens`` are those that are processed in each of ``seconds``."""
        middle = statistics.median(seconds)
        return cls(middle, min(seconds), max(seconds), tokens / middle)


def measure(load: str | Path, pattern: str | None, work: Workload) -> dict[str, Any]:
    """Timings of the checkpoint ``load`` by kind of kernels: ``prefill`` and ``decode`` (one step), or ``why`` there
    are none. CheckpointError for a model that cannot be exported."""
    from transformers import AutoModelForCausalLM

    register_layered_models()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="megatron-prune-") as folder:
        exported = huggingface.export_hf(load, Path(folder) / "exported", allow_missing_masks=True)
        for kind in (DENSE, *((SPARSE, SPARSE_FP8) if pattern == PACKED else ())):
            if why := _cannot(kind):
                found[kind] = {"why": f"{THEORETICAL}: {why}"}
                continue
            model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").to(device()).eval()
            try:
                if kind != DENSE:
                    _pack(model, kind)
                found[kind] = time_model(model, work)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if kind == DENSE:
                    raise
                found[kind] = {"why": f"{THEORETICAL}: {' '.join(str(error).split())[:200]}"}
            del model
    return found


def register_layered_models() -> None:
    """Let transformers build models whose layers differ from our own file, not from the copy in an export."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_prune.convert import modeling_layered_llama as layered

    for config, model in (
        (layered.LayeredLlamaConfig, layered.LayeredLlamaForCausalLM),
        (layered.NemotronNasConfig, layered.DeciLMForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def random_model(config: Mapping[str, Any]) -> Any:
    """A model of transformers with random weights, on the device, from the content of its ``config.json``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register_layered_models()
    with torch.random.fork_rng(), torch.device(device()):
        made = AutoConfig.for_model(**config)
        return AutoModelForCausalLM.from_config(made, dtype=getattr(torch, config["dtype"])).eval()


def time_model(model: Any, work: Workload) -> dict[str, Any]:
    """Prefill and decode of a model of transformers on its device."""
    rounds = range(work.warmup + work.repeats)
    found = [time_once(model, work) for _ in screen.progress(rounds, len(rounds), "measuring", "repeat")]
    prefills, decodes = zip(*found[work.warmup :], strict=True)
    return {
        "prefill": asdict(Timing.of(prefills, work.batch * work.prompt)),
        "decode": asdict(Timing.of(decodes, work.batch)),
    }


def time_once(model: Any, work: Workload) -> tuple[float, float]:
    """Seconds of reading the prompts, and on average of a step after them: one repeat. Prompts are random, and the same
    for every model of the same vocabulary."""
    draw = torch.Generator().manual_seed(1234)
    prompts = torch.randint(model.config.vocab_size, (work.batch, work.prompt), generator=draw)
    prompts = prompts.to(next(model.parameters()).device)
    with torch.inference_mode():
        prefill, out = _timed(partial(model, prompts, use_cache=True, logits_to_keep=1))
        steps = []
        for _ in range(work.new):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            cache = out.past_key_values
            taken, out = _timed(partial(model, token, past_key_values=cache))
            steps.append(taken)
    return prefill, statistics.fmean(steps)


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    _wait()
    begun = time.perf_counter()
    out = run()
    _wait()
    return time.perf_counter() - begun, out


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    """Where models are measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cannot(kind: str) -> str | None:
    """Why ``kind`` cannot run on this device."""
    if kind == DENSE:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < _LEAST[kind]:
        return f"{torch.cuda.get_device_name()} has no such kernels"
    if kind == SPARSE_FP8:
        try:
            import torchao  # noqa: F401
        except ImportError:
            return "torchao is not installed"
    return None


def _pack(model: torch.nn.Module, kind: str) -> None:
    """Replace the 2:4 weights of ``model`` by packed ones; ValueError if there are none."""
    linears = [one for _, one in model.named_modules() if isinstance(one, torch.nn.Linear) and is_packable(one.weight)]
    if not linears:
        raise ValueError("no matrix has two zeros in every four consecutive inputs")
    if linears[0].weight.dtype == torch.float32:  # torch would drop what does not fit, without a word
        raise ValueError("in fp32 the kernels keep one of every two inputs, not two of every four")
    if kind == SPARSE:
        for linear in linears:
            packed = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
            linear.weight = torch.nn.Parameter(packed, requires_grad=False)
        return
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    chosen = set(map(id, linears))
    packed = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), packing_format="sparse_2d_data_2d_metadata"
    )
    quantize_(model, packed, lambda one, _: id(one) in chosen)


def is_packable(weight: torch.Tensor) -> bool:
    """Whether at most two of every four consecutive inputs of ``weight`` [out, in] are not zero."""
    if weight.shape[1] % 4:
        return False
    return int((weight.detach().view(-1, 4) != 0).sum(1).max()) <= 2
