"""The files in launch/ are valid: shell that parses, a PyTorchJob in YAML, flags that Megatron has."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.launch.nodes import ROOT
from tests.preflight import commands

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_parses(script) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def flags() -> list[str]:
    lines = (LAUNCH / "checkpointing.flags").read_text().splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


def job() -> dict:
    return yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())


def test_megatron_accepts_the_flags_and_the_jobs_command_lines(distributed, tmp_path) -> None:
    (container,) = job()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    model = tmp_path / "llama.flags"
    model.write_text(commands.LLAMA)
    lines = [
        ["--gpus", "64", *commands.train("--tensor-model-parallel-size 2", "--stream-range 0:24414208", *flags())],
        ["--gpus", "16", "--model", str(model), *container["args"]],
    ]
    [[saving, kubernetes]] = distributed(commands.answers, 1, lines)
    assert saving["verdict"] == "yes", commands.reasons(saving, "no")
    assert commands.finding(saving, "storage")["facts"]["kept"] == 6  # four that stay, two in turns
    assert kubernetes["verdict"] == "yes", commands.reasons(kubernetes, "no")
    assert commands.finding(kubernetes, "time")["facts"]["tokens"] == pytest.approx(50e9, rel=1e-3)


def test_the_kubernetes_job_is_one_for_kubeflow() -> None:
    spec = job()["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert job()["kind"] == "PyTorchJob" and container["name"] == "pytorch"
    assert spec["elasticPolicy"]["minReplicas"] == spec["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.ngc"])
def test_docker_files_copy_what_is_there(name) -> None:
    text = (LAUNCH / name).read_text()
    copied = [word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[:-1]]
    assert copied and all((ROOT / path).exists() for path in copied)
    entry = re.search(r'ENTRYPOINT \["bash", "(.*)"\]', text)
    assert entry and (ROOT / entry[1]).is_file()


@pytest.mark.parametrize("broken", [None, "numpy", "transformer_engine_torch"])
def test_the_build_calls_what_the_image_compiled(tmp_path, broken) -> None:
    """tools/check_image.py with stand-ins that import: it fails where a call does."""
    assert "python tools/check_image.py" in (LAUNCH / "Dockerfile.ngc").read_text()
    fails = "def __getattr__(name): raise ImportError('built for another numpy')\n"
    torch = "class cuda:\n    is_available = staticmethod(lambda: False)\n__version__ = '2'\n"
    torch += "def from_numpy(array):\n    raise RuntimeError('Numpy is not available')\n" if broken == "numpy" else (
        "class Tensor:\n    item = lambda self: 1\n    numpy = lambda self: __import__('numpy').ones(1)\n"
        "def from_numpy(array): return Tensor()\n"
    )  # fmt: skip
    extension = fails if broken == "transformer_engine_torch" else "def get_cublasLt_version(): return 1\n"
    stand_ins = {"torch": torch, "transformer_engine_torch": extension, "transformer_engine/pytorch": "",
                 "transformer_engine/__init__": "", "megatron/core": "", "megatron_prune": ""}  # fmt: skip
    for name, text in stand_ins.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tools" / "check_image.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == (broken is None), done.stderr
