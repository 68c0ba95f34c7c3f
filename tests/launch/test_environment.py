"""With launch/environment.sh Megatron accepts a command line. Without a GPU: the rank simulates a Hopper."""

from __future__ import annotations

import argparse
import os
import subprocess

import pytest

from megatron_prune.errors import MegatronPruneError
from tests.engine.test_fp8 import words
from tests.launch.nodes import ROOT

NAMES = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_GRAPH_REGISTER")


def environment(*argv: str, **given: str) -> dict[str, str]:
    """The variables in NAMES after the script was sourced with a command line."""
    clean = {key: value for key, value in os.environ.items() if key not in NAMES}
    script = "source launch/environment.sh; env -0"
    done = subprocess.run(
        ["bash", "-c", script, "node.sh", *argv],
        cwd=ROOT,
        env=clean | given,
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)
    return {name: found[name] for name in NAMES if name in found}


def validated(argv: list[str], variables: dict[str, str]) -> str:
    """In a rank: the answer of Megatron's validation as rank 0 of 64 simulated Hoppers."""
    for name in NAMES:
        os.environ.pop(name, None)
    from packaging.version import Version

    from megatron_prune.engine import cpu

    cpu._cuda_is_available = lambda: True
    os.environ.update(RANK="0", WORLD_SIZE="64", LOCAL_RANK="0", **variables)
    import megatron.core.utils
    import torch

    megatron.core.utils._te_version = Version("2.9.0")
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    from megatron_prune.engine import arguments, installed

    installed.assume(installed.named("te,apex"))
    try:
        arguments.parse("pretrain", argv)
    except MegatronPruneError as error:
        return str(error)
    return "yes"


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_cuda_graphs(distributed, impl: str) -> None:
    argv = words("depth 16", "--bf16", "--cuda-graph-impl", impl)
    assert distributed(validated, 1, argv, environment(*argv)) == ["yes"]
    without = environment(*argv, NCCL_GRAPH_REGISTER="1")  # variables that are already set stay
    assert without["NCCL_GRAPH_REGISTER"] == "1"
    if impl == "transformer_engine":  # the assertion still exists: the local graphs are checked later
        assert "NCCL_GRAPH_REGISTER=0" in distributed(validated, 1, argv, without)[0]


def test_what_megatron_refuses_together_is_not_set() -> None:
    assert environment("pretrain", "--lr", "1") == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_GRAPH_REGISTER": "0",
    }
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment("pretrain", "--use-nccl-ub", "--lr", "1")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment("pretrain", "--async-save", "--lr", "1")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment("pretrain", "--use-torch-fsdp2")
    assert environment("pretrain", PYTORCH_CUDA_ALLOC_CONF="")["PYTORCH_CUDA_ALLOC_CONF"]


TP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("flags", "variables", "answer"),
    [
        (TP, {}, "yes"),  # bare torchrun
        (TP, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "CUDA_DEVICE_MAX_CONNECTIONS"),
        (ASYNC, {}, "yes"),
        (ASYNC, SEGMENTS, "--async-save: expected expandable_segments to be off"),
    ],
)
def test_a_run_sets_what_the_user_did_not(distributed, flags, variables, answer) -> None:
    (got,) = distributed(validated, 1, words("depth 16", "--bf16", *flags), variables)
    assert answer in got


def test_fsdp_keeps_its_queues(monkeypatch) -> None:
    from megatron_prune.engine.arguments import set_connections

    for fsdp, expected in (("use_torch_fsdp2", None), ("use_megatron_fsdp", None), ("", "1")):
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        names = ("use_torch_fsdp2", "use_megatron_fsdp")
        set_connections(argparse.Namespace(**{name: name == fsdp for name in names}))
        assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    set_connections(argparse.Namespace(use_torch_fsdp2=False, use_megatron_fsdp=False))
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
