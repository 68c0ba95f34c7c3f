"""Statistics and losses on a GPU are those of the CPU, in fp32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.structured.statistics import read

pytestmark = pytest.mark.gpu


def on_cpu(words: list[str | Path]) -> None:
    """A verb in a process that sees no GPU."""
    command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_statistics_are_those_of_the_cpu(job, tiny_parent, tiny_corpus, tmp_path) -> None:
    words = ["calibrate", "--load", tiny_parent, "--calibration-data-path", tiny_corpus]
    words += ["--calibration-sequences", "8", "--calibration-seq-length", "64"]
    job([*words, "--output", tmp_path / "gpu.safetensors"]).ok()
    on_cpu([*words, "--output", tmp_path / "cpu.safetensors"])
    gpu, cpu = (read(tmp_path / f"{name}.safetensors") for name in ("gpu", "cpu"))
    for name, expected in cpu.tensors.items():
        largest = float(expected.abs().max())
        np.testing.assert_allclose(gpu.tensors[name], expected, rtol=1e-3, atol=1e-3 * largest, err_msg=name)
    assert abs(gpu.loss - cpu.loss) < 1e-3 * cpu.loss


def test_losses_are_those_of_the_cpu(job, figures, tiny_parent, tiny_corpus, tmp_path) -> None:
    words = ["evaluate", "--load", tiny_parent, "--data-path", tiny_corpus]
    words += ["--seq-length", "64", "--windows", "8"]
    job([*words, "--output", tmp_path / "gpu.json"]).ok()
    on_cpu([*words, "--output", tmp_path / "cpu.json"])
    gpu, cpu = (json.loads((tmp_path / f"{name}.json").read_text())["corpora"] for name in ("gpu", "cpu"))
    for label, scores in cpu.items():
        apart = abs(gpu[label]["loss"] - scores["loss"]) / scores["loss"]
        figures({"loss in fp32, relative difference from the CPU's": apart})
        assert apart < 1e-3
