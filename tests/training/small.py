"""A training run small enough for a test: its flags, and a rank's function that records the consumed samples."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prune.engine.launch import Job, start_function
from tests.distributed_work import FunctionCall

GLOBAL_BATCH = 8
SEQ_LENGTH = 32

MODEL = (
    "--num-layers 4 --hidden-size 48 --num-attention-heads 6 --group-query-attention --num-query-groups 2 "
    "--kv-channels 10 --ffn-hidden-size 96 --swiglu --normalization RMSNorm --norm-epsilon 3e-4 --disable-bias-linear "
    "--position-embedding-type rope --rotary-base 700 --max-position-embeddings 128 --padded-vocab-size 384 "
    "--untie-embeddings-and-output-weights --init-method-std 0.05 "
    "--attention-dropout 0 --hidden-dropout 0"
).split()


def recipe(corpus: Path, stream_range: str, save: Path | None, *more: object) -> list[str]:
    """Flags of a run, without the model's size."""
    words = (
        f"--seq-length {SEQ_LENGTH} --micro-batch-size 2 --global-batch-size {GLOBAL_BATCH} --lr 1e-2 --min-lr 1e-3 "
        f"--lr-decay-style cosine --lr-warmup-fraction 0.1 --weight-decay 0.1 --seed 7 --log-interval 1 "
        f"--train-data-path {corpus} --stream-range {stream_range} --stream-seed 3 --num-workers 0"
    ).split()
    return [*words, *(["--save", str(save), "--load", str(save)] if save else []), *map(str, more)]


def layout(tp: int = 1, pp: int = 1) -> list[str]:
    return ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]


def kill_ranks(job: Job) -> None:
    """SIGKILL every rank. Once one is dead the launcher ends the others, perhaps earlier than their own kill."""
    for rank in job.ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def train_and_record(argv: list[str], folder: str, kill_at: int | None = None, verb: str = "pretrain") -> int:
    """``pretrain`` in this rank, writing a line for each training micro-batch; SIGKILLs itself at a step."""
    from megatron.training import get_args

    from megatron_prune.__main__ import main
    from megatron_prune.engine import forward

    original = forward.get_batch
    log = open(Path(folder) / f"rank-{os.environ['RANK']}-{os.getpid()}.jsonl", "a")

    def recording(iterator, vp_stage):
        import torch
        from megatron.core import parallel_state as mpu

        batch = original(iterator, vp_stage)
        if torch.is_grad_enabled() and batch["labels"] is not None:
            step = get_args().curr_iteration + 1
            line = {"step": step, "replica": mpu.get_data_parallel_rank(), "labels": batch["labels"].tolist()}
            line["tokens"] = batch["tokens"].tolist() if batch["tokens"] is not None else None
            if mpu.get_tensor_model_parallel_rank() == 0:
                log.write(json.dumps(line) + "\n")
                log.flush()
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return batch

    forward.get_batch = recording
    code = main([verb, *argv])
    forward.get_batch = original
    return code


def record(folder: Path, argv: list[str], nproc: int, kill_at: int | None = None) -> int:
    """Run ``train_and_record`` in ranks; the job's exit code."""
    folder.mkdir(exist_ok=True)
    call = FunctionCall(
        file=str(sys.modules[train_and_record.__module__].__file__),
        module=train_and_record.__module__,
        function="train_and_record",
        arguments=pickle.dumps(((argv, str(folder), kill_at), {})),
        results=str(folder),
    )
    with start_function(call, nproc=nproc, log=folder / "log.txt") as job:
        return job.wait(240)


def consumed(folder: Path) -> dict[int, list[list[int]]]:
    """Labels [samples, S] that each step consumed, over replicas and attempts, sorted; repeats dropped."""
    steps: dict[int, set[tuple[int, ...]]] = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], set()).update(tuple(row) for row in entry["labels"])
    return {step: sorted(list(row) for row in rows) for step, rows in sorted(steps.items())}


def any_plan(parent: Any) -> Any:
    """A plan that drops the second layer of the checkpoint ``parent``."""
    from megatron_prune.structured.plan import PruningPlan

    kept = (0, *range(2, parent.shape.num_layers))
    return PruningPlan(
        method="shortgpt", settings={}, seed=None, ratio=None, ratio_of="linears", source=parent.shape,
        target=replace(parent.shape, num_layers=len(kept)), parent=parent.fingerprint(), kept_layers=kept,
    )  # fmt: skip
