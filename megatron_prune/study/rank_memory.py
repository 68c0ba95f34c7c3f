"""How much memory the runs of a study take: of the fullest rank, by a dry run and the formula of ``preflight``."""

from __future__ import annotations

import functools
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prune import storage
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.engine import cpu, installed
from megatron_prune.errors import MegatronPruneError
from megatron_prune.methods.sheared_llama import kinds
from megatron_prune.preflight import dry_run, host
from megatron_prune.preflight import memory as preflight_memory
from megatron_prune.preflight.cost import Cluster
from megatron_prune.study import commands, grid
from megatron_prune.study.commands import Command
from megatron_prune.study.outlook import Outlook
from megatron_prune.study.prunings import Places, learning_samples, links, parent_cells
from megatron_prune.study.schema import StudyConfig

Verb = Callable[[list[str]], int]  # a verb of the command line


def memory(
    study: StudyConfig, places: Places, outlook: Outlook, trainers: Mapping[str, Verb]
) -> tuple[dict[str, int], list[str]]:
    """Bytes of the fullest rank of every cell that trains a known shape, and why others are unknown.

    From ``preflight`` of the cells' command lines on H100s without a reserve: a dry run of one cell per shape, kind of
    masks and teacher.
    """
    runs: dict[tuple[ModelShape, str, ModelShape | None], tuple[list[str], Command]] = {}
    for cell, shape, masks, teacher, command in _trainings(study, places, outlook):
        runs.setdefault((shape, masks, teacher), ([], command))[0].append(cell)
    lines = [(shape, teacher, command) for (shape, _, teacher), (_, command) in runs.items()]
    with tempfile.TemporaryDirectory() as folder:
        found = dry_run.in_child(functools.partial(_dry_runs, study, lines, Path(folder), trainers))
    sizes = {cell: size for (cells, _), size in zip(runs.values(), found, strict=True) for cell in cells
              if isinstance(size, int)}  # fmt: skip
    refused = dict.fromkeys(size for size in found if isinstance(size, str))
    return sizes, [f"memory is not known, since preflight refuses: {why}" for why in refused]


def _trainings(
    study: StudyConfig, places: Places, outlook: Outlook
) -> Iterator[tuple[str, ModelShape, str, ModelShape | None, Command]]:
    """Every cell that trains a known shape: its name, shape, which masks it has, the shape of its online teacher, and
    its command without the objective: the teacher may not be there yet."""
    lay = outlook.lay
    if study.parent.pretrain is not None and outlook.source is not None:
        samples = lay.batch.range(0, lay.parent_end // lay.batch.samples)
        for cell, seed in parent_cells(study):
            yield cell, outlook.source, "none", None, commands.parent_training(study, places, samples, seed)
    for run in outlook.estimated_grid(study).cells:
        if run.source.name in outlook.targets:
            command = commands.training(study, places, replace(run, objective="lm"), run.source)
            teacher = outlook.source if is_taught_online(run) else None
            yield run.id, outlook.targets[run.source.name], "held" if run.masked else "none", teacher, command
    for link in links(study):
        before = outlook.targets.get(link.base.name) if link.base else outlook.source
        target = outlook.targets.get(link.name)
        if outlook.needs[link.name].learning and before is not None and target is not None:
            learned = " ".join(kind.name for kind in kinds(before, target))
            command = commands.learning(study, places, link, learning_samples(study, lay, link))
            yield link.cell, before, learned, None, command


def _dry_runs(
    study: StudyConfig, lines: Sequence[tuple[ModelShape, ModelShape | None, Command]], folder: Path,
    trainers: Mapping[str, Verb],
) -> list[int | str]:  # fmt: skip
    """Bytes of the fullest rank for each shape, online teacher and command line, or why it would not start. Run in a
    process without a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cpu.prepare()
    found: list[int | str] = []
    cluster = Cluster(study.launch.nproc, per_node=study.launch.ranks_per_node)
    has = installed.named("te,apex,flash-attn")  # launch/Dockerfile.ngc, the default of ``preflight``
    for number, (shape, teacher, command) in enumerate(lines):
        model = folder / f"{number}.flags"
        model.write_text(shlex.join(commands.flags(_base_flags(study) | model_flags(shape))))
        try:
            made = dry_run.rehearse(
                trainers[command.argv[0]], host.resolve([*command.argv[1:]], str(model)).argv, gpus=cluster.gpus,
                per_node=cluster.local_ranks, capability=cluster.gpu.capability, has=has,
            )  # fmt: skip
        except (dry_run.MegatronRefused, MegatronPruneError) as error:
            found.append(str(error))
            continue
        stages = preflight_memory.training(made.args, made.shape, made.stages, made.microbatches, teacher)
        found.append(max((stage.total for stage in stages), default=0) if made.unbuilt is None else made.unbuilt)
    return found


def _base_flags(study: StudyConfig) -> dict[str, Any]:
    """Megatron flags of the parent, other than its shape, that affect memory."""
    if study.parent.flags:
        return study.parent.flags
    args: Mapping[str, Any] = {}
    if study.parent.load is not None:
        args = open_checkpoint(study.parent.load).args if storage.path(study.parent.load).exists() else {}
    asked = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": study.data.seq_length}
    return {name.replace("_", "-"): args.get(name, default) for name, default in asked.items()}


def model_flags(shape: ModelShape) -> dict[str, Any]:
    """Megatron flags for a shape."""
    return {
        **shape.to_flags(),
        "padded-vocab-size": shape.padded_vocab_size,
        "untie-embeddings-and-output-weights": not shape.tied,
        "swiglu": shape.gated,
        "normalization": "LayerNorm" if shape.norm_bias else "RMSNorm",
        "add-qkv-bias": shape.qkv_bias and not shape.linear_bias,
        "qk-layernorm": shape.qk_norm,
        "position-embedding-type": "learned_absolute" if shape.positions else "rope",
    }


def is_taught_online(run: grid.TrainingCell) -> bool:
    return run.objective == "distill" and run.taught is None
