"""What is switched off or refused where Apex, Transformer Engine and others are missing, also by preflight.

There is no GPU: a rank simulates one once its stand-ins are in place, and packages are empty modules of their names.
Megatron's own code then builds and runs the model, and its assertions show whether a default was left on wrongly.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
from typing import Any

import pytest

from megatron_prune.engine import installed
from megatron_prune.errors import UsageError

MODULES = {
    "te": ["transformer_engine", "transformer_engine.pytorch"],
    "apex": [
        "apex", "apex.normalization", "apex.normalization.fused_layer_norm", "fused_weight_gradient_mlp_cuda",
        "scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda",
    ],
    "flash-attn": ["flash_attn"],
    "nvrx": [
        "nvidia_resiliency_ext", "nvidia_resiliency_ext.checkpointing",
        "nvidia_resiliency_ext.checkpointing.async_ckpt", "nvidia_resiliency_ext.checkpointing.async_ckpt.core",
    ],
    "emerging-optimizers": ["emerging_optimizers"],
}  # fmt: skip
MODEL = (
    "--num-layers 2 --hidden-size 48 --num-attention-heads 4 --kv-channels 16 --ffn-hidden-size 96 --swiglu "
    "--disable-bias-linear --position-embedding-type rope --max-position-embeddings 32 --padded-vocab-size 384 "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --seq-length 32 "
    "--micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --train-iters 1 --bf16 --mock-data --eval-iters 0"
).split()
RMS = ["--normalization", "RMSNorm"]
LOCAL = ["--transformer-impl", "local"]
DECIDED = (
    "gradient_accumulation_fusion", "apply_rope_fusion", "masked_softmax_fusion", "no_persist_layer_norm",
    "transformer_impl",
)  # fmt: skip


def stand_in(words: str) -> None:
    """Replace the packages by empty modules, and let all others be missing. Not undone: use it in a rank or a patch."""
    there = set(words.split(",")) if words else set()
    for word, names in MODULES.items():
        for name in names:
            sys.modules[name] = types.ModuleType(name) if word in there else None  # type: ignore[assignment]
    installed.find.cache_clear()


def _pretend_gpu() -> None:
    import megatron.training  # noqa: F401
    import torch

    from megatron_prune.engine import cpu

    cpu.prepare_megatron()
    cpu._cuda_is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)


def on_target(words: str, argv: list[str]) -> str | dict[str, Any]:
    """In a rank: the verb's treatment of ``argv`` on a machine with a GPU and these packages."""
    from megatron_prune.engine import arguments

    stand_in(words)
    _pretend_gpu()
    try:
        args = arguments.parse("pretrain", argv)
    except UsageError as error:
        return str(error)
    return {name: getattr(args, name) for name in DECIDED}


def targets(asked: list[tuple[str, list[str]]]) -> list[Any]:
    """``on_target`` of each, in a separate process."""
    from functools import partial

    from megatron_prune.preflight.dry_run import in_child

    return [in_child(partial(on_target, words, argv)) for words, argv in asked]


def rehearsed(asked: list[tuple[str, list[str]]]) -> list[Any]:
    """A dry run for such machines, with stand-ins for Apex and TE here, which it must ignore."""
    from megatron_prune.cli.training_commands import pretrain_main
    from megatron_prune.preflight.dry_run import MegatronRefused, rehearse

    stand_in("te,apex,flash-attn")
    found: list[Any] = []
    for words, argv in asked:
        has = installed.named(words or "none")
        try:
            args = rehearse(pretrain_main, argv, gpus=1, per_node=1, capability=(9, 0), has=has).args
            found.append({name: getattr(args, name) for name in DECIDED})
        except MegatronRefused as refused:
            found.append(str(refused))
    return found


# packages, flags beyond MODEL, and the decision: what is off, or the refusal
CASES = {
    "all": ("te,apex", RMS, set()),
    "no Apex": ("te", RMS, {"gradient_accumulation_fusion"}),
    "nothing": ("", RMS, "--transformer-impl: expected local.*, got transformer_engine.*pip install.*transformer-e"),
    "local, nothing": (
        "", [*RMS, *LOCAL],
        {"gradient_accumulation_fusion", "apply_rope_fusion", "masked_softmax_fusion", "persist_layer_norm"},
    ),
    "local, LayerNorm, Apex": ("apex", LOCAL, {"apply_rope_fusion"}),
    "local, RMSNorm, Apex": ("apex", [*RMS, *LOCAL], "--transformer-impl: .*RMSNorm.*uninstall Apex"),
    "local, RMSNorm, both": ("te,apex", [*RMS, *LOCAL], {"persist_layer_norm"}),
    "local, TE": (
        "te", [*RMS, *LOCAL], {"gradient_accumulation_fusion", "masked_softmax_fusion", "persist_layer_norm"},
    ),
    "FP8 without TE": ("", ["--fp8-format", "hybrid", *LOCAL], "--fp8-format: .*hybrid.*Transformer Engine is not"),
    "deferred gradients": ("te", ["--defer-embedding-wgrad-compute"], "--defer-embedding-wgrad-compute: .*NVIDIA/apex"),
    "precise optimizer": (
        "apex", ["--use-precision-aware-optimizer", "--use-distributed-optimizer", *LOCAL],
        "--use-precision-aware-optimizer: .*Transformer Engine is not",
    ),
    "flash": ("te,apex", ["--attention-backend", "flash"], "--attention-backend: .*flash.*pip install.*flash-attn"),
    "flash is there": ("te,apex,flash-attn", ["--attention-backend", "flash"], set()),
    "fused, local": ("te", ["--attention-backend", "fused", *LOCAL], "--attention-backend: expected .*not fused"),
    "asynchronous saves": (
        "te,apex", ["--async-save", "--use-persistent-ckpt-worker"], "--async-strategy: expected mcore, got nvrx .*pip",
    ),
    "asynchronous saves by mcore": (
        "te,apex", ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"], set(),
    ),
    "Lion": ("te,apex", ["--optimizer", "lion"], "--optimizer: expected adam or sgd, got lion .*Emerging-Optimizers"),
    "overlap, local": ("te", ["--tp-comm-overlap", *LOCAL], "--tp-comm-overlap: .*Transformer Engine's linears do it"),
    "zero-centered, local": (
        "te", ["--apply-layernorm-1p", *LOCAL],
        {"gradient_accumulation_fusion", "masked_softmax_fusion", "persist_layer_norm"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def decisions(distributed) -> dict[str, Any]:
    asked = [(words, [*MODEL, *flags]) for words, flags, _ in CASES.values()]
    [found] = distributed(targets, 1, asked)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_defaults_are_switched_off_and_wishes_refused(name, decisions) -> None:
    expected, found = CASES[name][2], decisions[name]
    if isinstance(expected, str):
        assert isinstance(found, str) and re.search(expected, found), found
        return
    assert not isinstance(found, str), found
    off = {key for key in DECIDED if found[key] is False} - {"no_persist_layer_norm"}
    assert off | ({"persist_layer_norm"} if found["no_persist_layer_norm"] else set()) == expected


def test_a_rehearsal_decides_as_the_target_does(distributed, decisions) -> None:
    """Independent of what is installed here: the arguments say what is there."""
    asked = [(words, [*MODEL, *flags]) for words, flags, _ in CASES.values()]
    [found] = distributed(rehearsed, 1, asked)
    assert dict(zip(CASES, found, strict=True)) == decisions


def test_parallel_layouts_that_local_layers_lack_are_refused(distributed) -> None:
    """On one rank Megatron would not ask for them, so only the rule is tested."""
    for flag, value in (("context_parallel_size", 2), ("sequence_parallel", True)):
        args = argparse.Namespace(
            transformer_impl="local", normalization="RMSNorm", context_parallel_size=1, tensor_model_parallel_size=2,
            sequence_parallel=False, layernorm_zero_centered_gamma=False, tp_comm_overlap=False, attention_backend=None,
        )  # fmt: skip
        setattr(args, flag, value)
        with pytest.raises(UsageError, match=flag.replace("_", "-")):
            installed.settle(args)


def step_without_packages(argv: list[str]) -> tuple[float, list[str]]:
    """In a rank: loss of a step of Megatron's own model, built after ``settle``, and the output of ``settle``."""
    import torch

    from megatron_prune.engine import runtime

    stand_in("")
    _pretend_gpu()
    said: list[str] = []
    installed.say = lambda args, off: said.extend(off)
    args = runtime.start("pretrain", [*argv, "--distributed-backend", "gloo"])
    runtime.initialize(args)
    (model,) = runtime.build_model(args)
    tokens = torch.arange(64)[None] % 384
    loss = model(tokens[:, :32], torch.arange(32)[None], None, labels=tokens[:, 1:33]).mean()
    loss.backward()
    torch.distributed.destroy_process_group()
    return loss.item(), said


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_megatron_builds_and_runs_local_layers_on_what_is_left(distributed, norm) -> None:
    """Left on, each of them raises: the fusion in the output layer, rotary in the config, softmax in the step."""
    more = ["--attention-backend", "unfused", *LOCAL, "--normalization", norm]
    [(loss, said)] = distributed(step_without_packages, 1, [*MODEL, *more])
    assert 5 < loss < 7  # ln 384 = 5.95, before any training
    assert len(said) == 4


def test_a_broken_package_is_a_missing_one(monkeypatch) -> None:
    """An extension that was compiled for another torch is found but cannot be imported."""
    for names in MODULES.values():
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", None)  # importing it raises
    installed.find.cache_clear()
    found = installed.find()
    installed.find.cache_clear()
    assert found.te and found.apex and found.apex_softmax and not found.apex_gradients


def test_what_no_word_means_is_refused() -> None:
    with pytest.raises(UsageError, match="--installed: expected none, or some of te, apex.*, got cuda"):
        installed.named("te,cuda")
    assert str(installed.named("apex,te")) == "te, apex" and str(installed.named("none")) == "none"
