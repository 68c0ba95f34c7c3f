"""A small pruned checkpoint for masked runs, and a rank's function that watches such a run from outside.

This file makes masks, cuts them to a rank's shards and finds them in checkpoints without the package's own code, so
that tests compare with something independent.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import pickle
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.reshard import reshard

Kept = Mapping[str, torch.Tensor]  # logical name → bool [out, in]
ADAM = ("exp_avg", "exp_avg_sq")


def kept_at_random(shape: ModelShape, pattern: str, ratio: float = 0.5, seed: int = 0) -> dict[str, torch.Tensor]:
    """A mask for every linear but the second layer's ``linear_proj``, which stays dense."""
    numbers = np.random.default_rng(seed)
    found = {}
    for weight in weights(shape):
        if weight.is_linear and weight.name != "decoder.layers.1.self_attention.linear_proj.weight":
            out, inputs = weight.shape
            if pattern == "unstructured":  # rows lose different numbers of weights
                kept = numbers.random((out, inputs)) >= ratio
            else:
                n, m = (int(number) for number in pattern.split(":"))
                order = numbers.random((out, inputs // m, m)).argsort(-1)
                kept = (order < n).reshape(out, inputs)
            found[weight.name] = torch.from_numpy(kept)
    return found


def write_pruned(parent: Path, kept: Kept, pattern: str, folder: Path) -> Path:
    """The checkpoint ``parent`` with zeros where ``kept`` is False, and its masks next to it."""
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.checkpoint.writer import CheckpointWriter
    from megatron_prune.masks import write_single
    from megatron_prune.training import lineage

    source = open_checkpoint(parent)
    entry = {
        "method": "random", "settings": {"pattern": pattern}, "lineage": lineage.of(source), "tokens": 0, "flops": 0,
        "parent": {"fingerprint": source.fingerprint()}, "source": dataclasses.asdict(source.shape),
    }  # fmt: skip
    with CheckpointWriter(folder, args=source.args, dtype=torch.float32, pruning=[entry]) as writer:
        for name in source.names:
            value = source.read(name)
            writer.add(name, value.shape, [torch.where(kept[name], value, 0) if name in kept else value])
    write_single(folder / "masks", source.shape, [(name, mask, pattern) for name, mask in kept.items()])
    return folder


def start_from(pruned: Any, *flags: Any) -> list[Any]:
    """Flags of a run that holds the zeros of a ``tiny_pruned``."""
    return ["--pretrained-checkpoint", pruned.path, "--masks", pruned.masks, *flags]


def local_part(name: str, whole: torch.Tensor, tp_rank: int, tp: int) -> torch.Tensor:
    """A tensor-parallel rank's part of a linear [out, in], by Megatron's documented layouts."""
    if "linear_qkv" in name:
        return whole.chunk(tp, 0)[tp_rank]
    if "linear_fc1" in name:
        gate, up = whole.chunk(2, 0)
        return torch.cat([gate.chunk(tp, 0)[tp_rank], up.chunk(tp, 0)[tp_rank]])
    return whole.chunk(tp, 1)[tp_rank]


def removed_parts(chunks: list[Any], kept: Kept) -> list[tuple[str, Any, torch.Tensor]]:
    """(logical name, this rank's parameter, bool in its shape: True is removed) of every masked weight here."""
    from megatron.core import parallel_state as mpu
    from megatron.core.utils import unwrap_model

    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    found = []
    for chunk in chunks:
        for layer in unwrap_model(chunk).decoder.layers:
            for suffix, parameter in layer.named_parameters():
                name = f"decoder.layers.{layer.layer_number - 1}.{suffix}"
                if name in kept:
                    removed = ~local_part(name, kept[name], rank, size)
                    assert removed.shape == parameter.shape, name
                    found.append((name, parameter, removed))
    return found


def watch(argv: list[str], kept_file: str, folder: str) -> None:
    """``pretrain`` in this rank; looks at every masked weight, gradient and fp32 master of every step.

    Asserts that they are zero, and writes its observations to ``folder``.
    """
    from megatron.training import training

    from megatron_prune.__main__ import main

    kept = pickle.loads(Path(kept_file).read_bytes())
    seen: dict[str, Any] = {"steps": 0, "masked": 0, "masters": 0}
    parts: list = []
    setup, log = training.setup_model_and_optimizer, training.training_log

    @functools.wraps(setup)
    def set_up(*positional: Any, **named: Any) -> Any:
        found = setup(*positional, **named)
        parts.extend(removed_parts(found[0], kept))
        seen["masked"] = len(parts)
        look("before the first step")
        return found

    def look(when: str) -> None:
        for name, parameter, removed in parts:
            assert not parameter[removed].any(), (when, name)
            main = getattr(parameter, "main_param", None)
            if main is not None and main.shape == parameter.shape:
                seen["masters"] += 1
                assert not main[removed].any(), (when, name, "master")
            if seen["steps"]:
                gradient = parameter.main_grad
                assert not gradient[removed].any() and gradient[~removed].any(), (when, name, "gradient")

    @functools.wraps(log)
    def listening(*positional: Any, **named: Any) -> Any:
        seen["steps"] += 1
        look(f"step {seen['steps']}")
        return log(*positional, **named)

    training.setup_model_and_optimizer, training.training_log = set_up, listening
    leave_with(main(["pretrain", *argv]))
    Path(folder, f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))


def leave_with(code: int) -> None:
    """A rank that returned would count as a success."""
    if code:
        sys.exit(code)


def run_function(function: Callable[..., Any], folder: Path, nproc: int, *arguments: Any) -> tuple[int, str]:
    """A module-level function in ranks: the job's exit code and output."""
    from megatron_prune.engine.launch import start_function
    from tests.distributed_work import FunctionCall

    folder.mkdir(exist_ok=True, parents=True)
    call = FunctionCall(
        file=str(sys.modules[function.__module__].__file__), module=function.__module__,
        function=function.__name__, arguments=pickle.dumps((arguments, {})), results=str(folder),
    )  # fmt: skip
    with start_function(call, nproc=nproc, log=folder / "log.txt") as job:
        return job.wait(240), (folder / "log.txt").read_text()


def watched(argv: list[Any], folder: Path, nproc: int, kept_file: str) -> list[dict[str, Any]]:
    """Run ``watch``; the observations of each rank."""
    code, output = run_function(watch, folder, nproc, [str(word) for word in argv], kept_file, str(folder))
    assert code == 0, output[-4000:]
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(nproc)]


def losses(save: Path, column: str = "loss") -> list[float]:
    with open(save / "losses.csv") as table:
        return [float(row[column]) for row in csv.DictReader(table)]


def account(save: Path) -> dict[str, Any]:
    return json.loads((save / "account.json").read_text())


def assert_zero_in_checkpoint(directory: Path, kept: Kept, *, moments: tuple[str, ...]) -> None:
    """Weights, masters and moments of the masked linears, as the checkpoint has them; most kept ones are not zero."""
    found = stored(directory)
    if moments and not any(key.startswith("optimizer.state.") for key in found):  # flat buckets
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copytree(directory, Path(scratch, directory.name))
            reshard(copy)
            found = stored(copy)
    for prefix in ("", *(f"optimizer.state.{moment}." for moment in moments)):
        for name, mask in kept.items():
            _, _, layer, suffix = name.split(".", 3)
            value = found[f"{prefix}decoder.layers.{suffix}"][int(layer)]  # of [layers, out, in]
            assert not value[~mask].any(), (directory, prefix, name)
            assert value[mask].count_nonzero() > 0.9 * mask.sum(), (directory, prefix, name)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a `torch_dist` directory, weights and optimizer state, read by torch alone."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # that this is one process
        dcp.load(found, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return found
