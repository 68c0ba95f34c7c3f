"""Adjusts Megatron's defaults if NVIDIA's optional packages are not installed.

Megatron's defaults assume NVIDIA's containers. Without one of their packages, most of them fail only when the model is
built or in the first step, when all ranks hold their GPUs. ``settle`` runs before any process group exists:

* a fusion that is on by default, and only makes a run faster, is switched off, and one line says so;
* an explicit request is refused, with the package to install.

The rules follow Megatron 0.19.2's source, and each names its place there. Without a GPU, ``cpu.flags`` has switched
everything off. Preflight asks about another machine: ``assume`` states what is installed there.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_prune import screen
from megatron_prune.engine import cpu, cpu_attention
from megatron_prune.errors import UsageError

# What --installed may name: the package's name, and how to install it.
PACKAGES: Mapping[str, tuple[str, str]] = {
    "te": (
        "Transformer Engine",
        "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]' nvidia-curand",
    ),
    "apex": (
        "NVIDIA Apex",
        "build github.com/NVIDIA/apex with its CUDA extensions (PyPI's apex is another project)",
    ),
    "flash-attn": ("flash-attn", "pip install --no-build-isolation flash-attn"),
    "nvrx": ("nvidia-resiliency-ext", "pip install nvidia-resiliency-ext"),
    "emerging-optimizers": ("emerging-optimizers", "build github.com/NVIDIA-NeMo/Emerging-Optimizers"),
}
CONTAINER = "launch/Dockerfile.ngc has it"


@dataclass(frozen=True)
class Installed:
    """What can be imported. Apex comes in parts, which are compiled one by one."""

    te: bool = False
    apex: bool = False
    apex_gradients: bool = False
    apex_softmax: bool = False
    flash_attn: bool = False
    nvrx: bool = False
    emerging_optimizers: bool = False
    compiler: bool = True  # Triton and a C compiler for it, which torch.compile needs on a GPU

    def __str__(self) -> str:
        named = (self.te, self.apex, self.flash_attn, self.nvrx, self.emerging_optimizers)
        return ", ".join(word for word, there in zip(PACKAGES, named, strict=True) if there) or "none"


_assumed: Installed | None = None


def assume(installed: Installed) -> None:
    """From now on, in this process, answer for a machine that has ``installed``."""
    global _assumed
    _assumed = installed


def named(text: str) -> Installed:
    """``"te,apex"`` or ``"none"`` as ``Installed``; Apex with all its extensions. UsageError for other words."""
    words = set() if text == "none" else {word.strip() for word in text.split(",")}
    if unknown := words - set(PACKAGES):
        raise UsageError(
            "--installed", got=", ".join(sorted(unknown)) or "nothing",
            expected=f"none, or some of {', '.join(PACKAGES)}, separated by commas",
        )  # fmt: skip
    apex = "apex" in words
    return Installed(
        te="te" in words, apex=apex, apex_gradients=apex, apex_softmax=apex, flash_attn="flash-attn" in words,
        nvrx="nvrx" in words, emerging_optimizers="emerging-optimizers" in words,
    )  # fmt: skip


@functools.cache
def find() -> Installed:
    """What this machine has, imported as Megatron imports it, so that a broken package counts as missing."""
    return Installed(
        te=_imports("transformer_engine.pytorch"),
        apex=_imports("apex.normalization.fused_layer_norm"),
        apex_gradients=_imports("fused_weight_gradient_mlp_cuda"),
        apex_softmax=_imports("scaled_upper_triang_masked_softmax_cuda") and _imports("scaled_masked_softmax_cuda"),
        flash_attn=_imports("flash_attn"),
        nvrx=_imports("nvidia_resiliency_ext.checkpointing.async_ckpt.core"),
        emerging_optimizers=_imports("emerging_optimizers"),
        compiler=_imports("triton") and any(shutil.which(name) for name in ("cc", "gcc", "clang")),
    )


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def settle(args: argparse.Namespace) -> None:
    """Switch off defaults of ``args``, parsed and not yet validated, whose packages are missing.

    UsageError for explicit requests. A verb that builds no model has set ``args.builds_model`` to False.
    """
    if not getattr(args, "builds_model", True):
        return
    _refuse_for_local_layers(args)
    if cpu.is_cpu():
        _refuse_for_attention_on_cpu(args)
        return
    found = _known()
    _refuse_missing(args, found)
    if off := list(_switched_off(args, found)):
        say(args, off)


def _known() -> Installed:
    return find() if _assumed is None else _assumed


def say(args: argparse.Namespace, off: list[str]) -> None:
    """Report once what was switched off."""
    screen.say(f"switched off, since what they need is not installed: {'; '.join(off)}")


def _switched_off(args: argparse.Namespace, found: Installed) -> Iterator[str]:
    # ColumnParallelLinear.__init__ refuses; it is the output layer of every model, under either layer spec.
    if args.gradient_accumulation_fusion and not found.apex_gradients:
        args.gradient_accumulation_fusion = False
        yield "gradient accumulation fusion (NVIDIA Apex)"
    # TransformerConfig.__post_init__ refuses.
    if args.apply_rope_fusion and args.position_embedding_type == "rope" and not found.te:
        args.apply_rope_fusion = False
        yield "fused rotary embedding (Transformer Engine)"
    if args.transformer_impl != "local":
        return
    # FusedScaleMaskSoftmax imports its kernels in the first step.
    if args.masked_softmax_fusion and not found.apex_softmax:
        args.masked_softmax_fusion = False
        yield "fused masked softmax (NVIDIA Apex)"
    # WrappedTorchNorm asserts; Megatron takes it for RMSNorm whatever is installed.
    if not args.no_persist_layer_norm and _torch_norms(args, found):
        args.no_persist_layer_norm = True
        yield "persistent layer norm (torch's norm has none)"


def _torch_norms(args: argparse.Namespace, found: Installed) -> bool:
    """Whether a local block's norms are torch's."""
    return args.normalization == "RMSNorm" or not found.apex


def _refuse_missing(args: argparse.Namespace, found: Installed) -> None:
    local = args.transformer_impl == "local"
    if not local and not found.te:
        other = "local"
        raise _missing("te", "--transformer-impl", args.transformer_impl, other)
    without: tuple[tuple[str, object, bool, str, str], ...] = (
        # flag, its value, whether it asks for the package, the package, the allowed alternatives
        ("--defer-embedding-wgrad-compute", "on", args.defer_embedding_wgrad_compute and not found.apex_gradients,
         "apex", ""),
        ("--fp8-format", args.fp8, args.fp8 and not found.te, "te", ""),
        ("--fp4-format", args.fp4, args.fp4 and not found.te, "te", ""),
        ("--te-rng-tracker", "on", args.te_rng_tracker and not found.te, "te", ""),
        ("--cuda-graph-impl", args.cuda_graph_impl, args.cuda_graph_impl == "transformer_engine" and not found.te,
         "te", "none or local"),
        # OptimizerConfig.__post_init__ raises.
        ("--use-precision-aware-optimizer", "on",
         args.use_precision_aware_optimizer and not args.optimizer_cpu_offload and not found.te, "te", ""),
        # Transformer Engine may use no other backend, and then has none.
        ("--attention-backend", "flash", not local and _backend(args) == "flash" and not found.flash_attn,
         "flash-attn", "auto, fused or unfused"),
        # get_async_strategy raises, at the first save. Without persistent workers Megatron switches --async-save off.
        ("--async-strategy", args.async_strategy,
         args.async_save and args.use_persistent_ckpt_worker and args.async_strategy == "nvrx" and not found.nvrx,
         "nvrx", "mcore"),
        ("--enable-ft-package", "on", args.enable_ft_package and not found.nvrx, "nvrx", ""),
        ("--optimizer", args.optimizer, args.optimizer not in ("adam", "sgd") and not found.emerging_optimizers,
         "emerging-optimizers", "adam or sgd"),
    )  # fmt: skip
    for flag, value, asked, package, other in without:
        if asked:
            raise _missing(package, flag, value, other)
    if local and args.normalization == "RMSNorm" and found.apex and not found.te:
        raise UsageError(
            "--transformer-impl", got="local and RMSNorm with Apex alone",
            expected="both Apex and Transformer Engine, or neither",
            why="Apex's norm, which Megatron takes for the last one, has no RMSNorm",
            do=f"uninstall Apex, or {PACKAGES['te'][1]}",
        )  # fmt: skip
    if not found.compiler:
        raise UsageError(
            "megatron_prune", got="only one or neither", expected="Triton and a C compiler on this machine",
            why="Megatron compiles its fused functions with torch.compile when a run starts",
            do="pip install triton, and install a package such as g++",
        )  # fmt: skip


def _refuse_for_local_layers(args: argparse.Namespace) -> None:
    """Refuse what Megatron's local layers lack, with or without a GPU: it would fail at the build or be ignored."""
    if args.transformer_impl != "local":
        return
    torch_norms = cpu.is_cpu() or _torch_norms(args, _known())
    sequence_parallel = args.sequence_parallel and args.tensor_model_parallel_size > 1
    unfused = "its attention is not fused"
    others = ("flash",) if cpu.is_cpu() else ("flash", "fused")  # fused without a GPU is cpu_attention.py
    unknown = "its norms are torch's norms, which do not know it"
    for flag, given, asked, why in (
        ("--context-parallel-size", args.context_parallel_size, args.context_parallel_size > 1, unfused),
        ("--sequence-parallel", "on", sequence_parallel and torch_norms, unknown),
        ("--tp-comm-overlap", "on", args.tp_comm_overlap, "only Transformer Engine's linears do it"),
        ("--attention-backend", _backend(args), _backend(args) in others, unfused),
    ):
        if asked:
            raise UsageError(flag, got=given, expected="no such setting with --transformer-impl local", why=why)


def _refuse_for_attention_on_cpu(args: argparse.Namespace) -> None:
    """Refuse settings that ``cpu_attention`` does not compute."""
    if cpu.is_cpu() and cpu_attention.is_fused(args) and (setting := cpu_attention.refused(args)):
        raise UsageError(
            "--attention-backend", got=f"fused and {setting}", expected="unfused with this setting, without a GPU",
            why="the fused attention for CPUs is causal, without dropout, windows or sinks",
        )  # fmt: skip


def _backend(args: argparse.Namespace) -> str:
    return str(getattr(args.attention_backend, "name", args.attention_backend))


def _missing(package: str, flag: str, given: object, other: str) -> UsageError:
    name, how = PACKAGES[package]
    container = f" ({CONTAINER})" if package in ("te", "apex", "flash-attn") else ""
    return UsageError(
        flag,
        got=given,
        expected=other or f"no such setting without {name}",
        why=f"{name} is not installed",
        do=f"{how}{container}",
    )
