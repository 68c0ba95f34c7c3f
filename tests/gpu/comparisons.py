"""Pruning in some precision against oracles on the CPU: for the tests on a GPU, and a dry run without one.

``run(words)`` runs a verb on the machine under test, ``oracle(words)`` on the CPU in fp32. Each comparison
returns its figures and asserts that they are within ``TOLERANCES``. The tolerances were chosen beforehand: half of the
bits of a mask at 50% agree by chance, these tests allow 1% of a loss for rounding to bf16, and FP8 has 4 bits less of
mantissa.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.sparse import oracle as float64
from tests.sparse import small

Run = Callable[[Sequence[Any]], Any]
Figures = dict[str, float]


@dataclass(frozen=True)
class Tolerance:
    """The least share of mask bits (of wanda, of sparsegpt) and of kept channels that agree; how far a loss may be."""

    wanda: float
    sparsegpt: float
    kept: float
    loss: float


TOLERANCES = {
    "bf16": Tolerance(wanda=0.97, sparsegpt=0.93, kept=0.9, loss=0.01),
    "current": Tolerance(wanda=0.93, sparsegpt=0.8, kept=0.8, loss=0.05),
    "blockwise": Tolerance(wanda=0.93, sparsegpt=0.8, kept=0.8, loss=0.05),
}
FLAGS = {"bf16": ["--bf16"], **{name: ["--fp8-preset", name] for name in TOLERANCES if name != "bf16"}}


def sparse(run: Run, method: str, kind: str, hf: Path, parent: Path, corpus: Path, folder: Path) -> Figures:
    """``sparsify`` by ``method`` at 50% against Hugging Face's model in float64, pruned block after block there."""
    save = folder / f"{method}-{kind}"
    run([*small.flags(parent, save, method, "--ratio", 0.5, corpus=corpus), *FLAGS[kind]])
    found = small.result(save)
    assert all(int((~kept).sum()) == kept.numel() // 2 for _, kept in found.values())
    _, masks = float64.sparsify(hf, small.corpus_windows(corpus), method)
    same = small.agreement(found, {key: (None, kept) for key, kept in masks.items()})
    least = getattr(TOLERANCES[kind], method)
    assert same >= least, f"{method} in {kind}: {same:.2%} of the mask bits are those of float64, {least:.0%} are asked"
    return {"mask bits as in float64": same}


def width(run: Run, oracle: Run, kind: str, parent: Path, corpus: Path, folder: Path) -> Figures:
    """``prune --method minitron-width``: the channels that are kept."""
    kept = {}
    for name, verb, flags in (("cpu", oracle, []), (kind, run, FLAGS[kind])):
        save = folder / f"width-{name}"
        verb([
            "prune", "--load", parent, "--method", "minitron-width", "--save", save,
            "--target-hidden-size", 32, "--target-ffn-hidden-size", 64, "--divisible-by", 16,
            "--calibration-data-path", corpus, *small.CALIBRATION, *flags,
        ])  # fmt: skip
        plan = json.loads((save / "pruning" / "plan.json").read_text())
        kept[name] = [plan["kept_hidden"], *plan["kept_ffn"]]
    shared = [len(set(a) & set(b)) / len(a) for a, b in zip(kept["cpu"], kept[kind], strict=True)]
    assert min(shared) >= TOLERANCES[kind].kept, shared
    return {"kept channels as in fp32, least of all layers": min(shared)}


def scores(run: Run, oracle: Run, kind: str, parent: Path, corpus: Path, folder: Path) -> Figures:
    """``calibrate --score``: every candidate's loss, and what the choice made of them costs on the CPU."""
    losses = {}
    for name, verb, flags in (("cpu", oracle, []), (kind, run, FLAGS[kind])):
        place = folder / f"scores-{name}"
        place.mkdir()
        statistics = place / "s.safetensors"
        load = ["--load", parent]
        text = ["--calibration-data-path", corpus, *small.CALIBRATION]
        verb(["calibrate", *load, *text, "--output", statistics, *flags])
        plan = ["plan", "--load", parent, "--statistics", statistics, "--method", "minitron-depth"]
        _plan([*plan, "--target-num-layers", 3, "--output", place / "plan.json"])
        verb(["calibrate", *load, "--score", place / "candidates.json", "--statistics", statistics, *flags])
        found = json.loads(statistics.with_suffix(".json").read_text())["scores"]
        losses[name] = {key: score["loss"] for key, score in found.items()}
    cpu, mine = losses["cpu"], losses[kind]
    assert cpu.keys() == mine.keys() and len(cpu) >= 3
    worst = max(abs(mine[key] - cpu[key]) / cpu[key] for key in cpu)
    chosen = min(mine, key=lambda key: mine[key])
    regret = (cpu[chosen] - min(cpu.values())) / min(cpu.values())
    assert max(worst, regret) <= TOLERANCES[kind].loss, (worst, regret)
    return {"candidates' losses, largest relative difference": worst, "loss of the choice above the best": regret}


def _plan(words: Sequence[Any]) -> None:
    """``plan`` needs neither a model nor a GPU; it asks for scores."""
    from megatron_prune.__main__ import main
    from megatron_prune.errors import EXIT_NEEDS_SCORES

    assert main([str(word) for word in words]) == EXIT_NEEDS_SCORES
