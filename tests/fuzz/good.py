"""One small good example of every file that a verb reads, for tests that damage them."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml

from megatron_prune.artifacts import write_json
from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import export_hf
from megatron_prune.data.indexed import write_index
from megatron_prune.methods import sheared_llama
from megatron_prune.structured.statistics import Statistics, tensor_shapes
from megatron_prune.study.advise.ledgers import SHIPPED
from megatron_prune.training.learned_file import LearnedMasks, LearnerState
from tests.checkpoint import small
from tests.masks import small as small_masked
from tests.study import made_up
from tests.training.small import any_plan


def make(folder: Path, tokenizer: Path) -> Path:
    """Fill ``folder``; returns it."""
    parent = open_checkpoint(small.write(folder / "ckpt"))
    small_masked.write(folder / "masked")
    _legacy(folder / "legacy")
    any_plan(parent).write(folder / "plan.json")
    _statistics(parent.shape, parent.fingerprint()).write(folder / "statistics.safetensors")
    _learned(parent.shape, parent.fingerprint()).write(folder / "learned.safetensors")
    export_hf(folder / "masked", folder / "hf")
    shutil.copytree(tokenizer, folder / "tokenizer")
    corpus(folder / "corpus")
    corpus(folder / "other", seed=1)
    lines = "".join(json.dumps({"text": f"A line of text, number {number}."}) + "\n" for number in range(30))
    (folder / "text.jsonl").write_text(lines)
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "ledger" / "report").mkdir(parents=True)
    shutil.copyfile(SHIPPED, folder / "ledger" / "report" / "results.json")
    (folder / "corpora").mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(made_up.mapping(made_up.corpora(folder / "corpora"))))
    return folder


def corpus(prefix: Path, *, seed: int = 0, vocabulary: int = 125) -> None:
    """20 documents of 50 random tokens, with a sidecar."""
    write_index(f"{prefix}.idx", [np.full(20, 50)], [np.ones(20, np.int64)], "uint16")
    ids = np.random.default_rng(seed).integers(0, vocabulary, 1000).astype(np.uint16)
    Path(f"{prefix}.bin").write_bytes(ids.tobytes())
    write_json(f"{prefix}.json", {"tokenizer": {"vocab_size": vocabulary, "fingerprint": "0" * 64}})


def _legacy(root: Path) -> None:
    """The small checkpoint as one legacy file."""
    import argparse

    state = {"args": argparse.Namespace(**small.ARGS), "iteration": 3, "model": small.tensors()}
    (root / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    torch.save(state, root / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("3")


def _statistics(shape: ModelShape, parent: str) -> Statistics:
    draws = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.rand(size, generator=draws, dtype=torch.float64) for name, size in tensor_shapes(shape).items()
    }
    read = {"prefix": "corpus", "corpus": "0" * 64, "windows": [0, 1], "sampling": "sequential", "seed": None}
    return Statistics(tensors, shape, parent, 16, 2, 30.0, (read | {"params_dtype": "float32", "fp8": None},))


def _learned(shape: ModelShape, parent: str) -> LearnedMasks:
    target = ModelShape(**{**asdict(shape), "num_layers": 2})
    kinds = sheared_llama.kinds(shape, target)
    state = LearnerState(
        source=shape, target=target, settings={}, log_alpha={kind.name: torch.zeros(kind.shape) for kind in kinds},
        multipliers={kind.name: torch.zeros(2) for kind in kinds}, moments={}, history=torch.zeros(0, len(kinds), 4),
    )  # fmt: skip
    return LearnedMasks(state, parent, {"tokens": 1, "flops": 1})
