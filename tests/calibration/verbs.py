"""calibrate, plan and calibrate --score for one parent, each as a user would call it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


class Verbs:
    """Their files are in ``folder``; ``text`` are flags of every calibration, ``shape`` of every plan."""

    def __init__(
        self, job: Callable[..., Any], parent: Path, corpus: Path, folder: Path, text: list[Any], shape: list[Any]
    ):
        self.job, self.parent, self.corpus, self.folder = job, parent, corpus, folder
        self.statistics, self.plan = folder / "s.safetensors", folder / "plan.json"
        self.load = ["--load", parent]
        self.shape = shape
        self.text = ["--calibration-data-path", corpus, *text]

    def calibrate(self, *more: object) -> None:
        self.job(["calibrate", *self.load, *self.text, "--output", self.statistics, *more]).ok()

    def make(self, *choice: object) -> Any:
        found = ["--statistics", self.statistics, "--output", self.plan]
        return self.job(["plan", "--load", self.parent, *found, *self.shape, *choice])

    def score(self, *more: object, nproc: int = 1) -> Any:
        asked = ["--score", self.folder / "candidates.json", "--statistics", self.statistics]
        return self.job(["calibrate", *self.load, *asked, *more], nproc=nproc)
