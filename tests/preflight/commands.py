"""Command lines for preflight, and its answers in a rank, where Megatron is already imported."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

LLAMA = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --kv-channels 128 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --rotary-base 500000 --max-position-embeddings 8192 --padded-vocab-size 128256 "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0"
)
RECIPE = (
    "--seq-length 8192 --micro-batch-size 1 --global-batch-size 512 --lr 3e-4 --bf16 --use-distributed-optimizer "
    "--overlap-grad-reduce --overlap-param-gather --data-path /not/here --stream-range 0:51200 --save /not/here/run "
    "--save-interval 50"
)
FP8 = "--fp8-preset current"


def train(layout: str, *more: str, model: str = LLAMA) -> list[str]:
    """A training of ``model`` with ``layout``; later flags win."""
    return ["pretrain", *f"{model} {RECIPE} {layout} {' '.join(more)}".split()]


def answers(lines: list[list[str]]) -> list[dict[str, Any]]:
    """The answer of preflight to each, with its exit code under ``code``."""
    from megatron_prune.cli.cluster_commands import preflight_main

    found = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answer.json"
        for line in lines:
            code = preflight_main(["--output", str(output), *line])
            found.append(json.loads(output.read_text()) | {"code": code})
    return found


def reasons(answer: dict[str, Any], verdict: str) -> str:
    """All reasons with this verdict, each after the name of its check."""
    return "\n".join(f"{f['check']}: {f['reason']}" for f in answer["findings"] if f["verdict"] == verdict)


def finding(answer: dict[str, Any], check: str) -> dict[str, Any]:
    (found,) = (f for f in answer["findings"] if f["check"] == check)
    return found
