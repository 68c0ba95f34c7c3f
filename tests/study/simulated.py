"""A made-up study whose losses follow known laws, so that its conclusions can be checked.

Distilled models are lower by ``TAUGHT``, which differs between the arms.

Scratch: ``FLOOR + 3 * (N / 1000)**-0.5``; pruned: ``FLOOR + 0.4 * ratio + 3 * ((N + START) / 1000)**-0.5``, N being
tokens of training, both plus a normal error of ``NOISE`` nats that is a function of the run's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune import artifacts
from megatron_prune.study.prunings import Places
from megatron_prune.training import objective
from tests.study import made_up

FLOOR, START, NOISE = 2.0, 20_000, 0.01
PARENT, UNRETRAINED = 2.4, 3.4
TAUGHT = {"pruned": 0.06, "scratch": 0.2}
BUDGETS = [2_560, 5_120, 10_240, 20_480, 40_960]


def scratch(tokens: float) -> float:
    return FLOOR + 3 * (tokens / 1000) ** -0.5


def pruned(tokens: float, ratio: float) -> float:
    return FLOOR + 0.4 * ratio + 3 * ((tokens + START) / 1000) ** -0.5


def accuracy(loss: float) -> float:
    """Of the tasks, by the loss: 0.8 at 2 nats."""
    return min(0.95, max(0.05, 1.4 - 0.3 * loss))


def error(*parts: object) -> float:
    """A normal error that is a function of ``parts``."""
    return NOISE * float(np.random.default_rng(int(1e12 * made_up.number(*parts))).normal())


class Launcher(made_up.FakeLauncher):
    """Trainings and evaluations whose losses follow the laws."""

    def _pretrain(self, argv: list[str]) -> None:
        super()._pretrain(argv)
        save = Path(made_up.words(argv)["save"])
        account, cell = artifacts.read_json(save / "account.json"), save.parent.name
        batch, length = account["global_batch_size"], account["seq_length"]
        losses = [
            _law(cell, account["start"], step * batch * length) + error(cell, step)
            for step in range(1, account["steps"] + 1)
        ]
        made_up.write_losses(save, account, losses)
        artifacts.write_json(save / "account.json", account)

    def _evaluate(self, argv: list[str]) -> None:
        given = made_up.words(argv)
        load = Path(given["load"])
        cell, account = load.parent.name, load / "account.json"
        if cell.split("-")[0] == "parent":
            loss = PARENT
        elif not account.is_file():
            loss = UNRETRAINED
        else:
            made = artifacts.read_json(account)
            loss = _law(cell, made["start"], made["tokens"]) + error(cell)
            loss -= TAUGHT[cell.split("-")[0]] * (objective.of(made)["name"] == "distill")
        made_up.write_scores(given, dict.fromkeys(made_up.labels_of(given), loss), accuracy=accuracy(loss))


def _law(cell: str, start: str, tokens: int) -> float:
    if start == "random":
        return scratch(tokens)
    percent = next(word[1:] for word in cell.split("-") if word[0] == "r" and word[1:].replace(".", "").isdecimal())
    return pruned(tokens, float(percent) / 100)


def run(folder: Path, **changes: Any) -> Places:
    """A study of a method at two ratios, five budgets, both settings and three seeds, run."""
    asked = {
        "methods": [{"name": "shortgpt"}],
        "ratios": [0.25, 0.5],
        "budgets": BUDGETS,
        "seeds": [1, 2, 3],
        "name": "simulated",
    }
    study = made_up.study(made_up.corpora(folder, train=60_000), **(asked | changes))
    return made_up.run(study, folder / "runs", Launcher())
