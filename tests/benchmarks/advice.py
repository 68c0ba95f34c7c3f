"""Simulated ledgers: how often ``advise`` is wrong for users who follow it, and how often it answers at once.

    python tests/benchmarks/advice.py --ledgers 2000

False answers should stay below 5%, whether seeds are added as the advice says or at every look. Three seeds should find
a gap of five deviations of a paired difference, with six arms per side as well as with one. *Before*: paired t, the
largest p over the rivals times the number of arms, at every question. About 1 ms per question on one core.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_prune.study.advise.answer import UNKNOWN  # noqa: E402
from tests.study.advise.followers import Losses, Truth, ask, follow, insist  # noqa: E402

GAP = 5 * math.sqrt(2)  # five deviations of a paired difference of runs whose own deviation is 1
NOTHING = {
    "one arm a side": Truth((0,), (0,)),
    "two pruned arms, one scratch": Truth((0, 0), (0,)),
    "six pruned arms, one scratch": Truth((0,) * 6, (0,)),
    "six arms a side": Truth((0,) * 6, (0,) * 6),
    "six a side, seeds matter": Truth((0,) * 6, (0,) * 6, seed=2.0),
    "six a side, one of them three times as noisy": Truth((0,) * 6, (0,) * 6, loud=3.0),
    "six a side, five of no account": Truth((0, 9, 9, 9, 9, 9), (0, 9, 9, 9, 9, 9), loud=3.0),
}
REAL = {
    "one arm a side": Truth((0,), (GAP,)),
    "two arms a side": Truth((0, GAP), (GAP, GAP)),
    "six arms a side, one ahead": Truth((0, *(GAP,) * 5), (GAP,) * 6),
    "six arms a side, all ahead": Truth((0,) * 6, (GAP,) * 6),
}


def before(losses: Losses, seeds: int) -> str:
    pruned, scratch = (side[:, :seeds] for side in losses)
    best, rival = (side[np.argmin(side.mean(axis=1))] for side in (pruned, scratch))
    own, others, first = (pruned, scratch, best) if best.mean() < rival.mean() else (scratch, pruned, rival)
    p = max(stats.ttest_rel(other, first).pvalue for other in others) * len(own)
    return UNKNOWN if p >= 0.05 else "prune" if first is best else "scratch"


def before_at(losses: Losses, looks: tuple[int, ...] = (3, 5, 8, 12, 20)) -> str:
    """At five looks, the first answer."""
    return next((said for seeds in looks if (said := before(losses, seeds)) != UNKNOWN), UNKNOWN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ledgers", type=int, default=2000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, truth in NOTHING.items():
        generator = np.random.default_rng(options.seed)
        made = [truth.losses(generator) for _ in range(options.ledgers)]
        false = [100 * np.mean([truth.wrong(said(one)) for one in made]) for said in (_literally, insist, before_at)]
        rates = "{:.1f}% following the advice, {:.1f}% at every look; before, at five looks, {:.1f}%".format(*false)
        print(f"no difference, {name}: false answers {rates}")
    for name, truth in REAL.items():
        generator = np.random.default_rng(options.seed)
        made = [truth.losses(generator, 3) for _ in range(options.ledgers)]
        found = 100 * np.mean([ask(one, 3).answer == "prune" for one in made])
        earlier = 100 * np.mean([before(one, 3) == "prune" for one in made])
        print(f"five deviations, three seeds, {name}: answered in {found:.1f}%; before in {earlier:.1f}%")


def _literally(losses: Losses) -> str:
    return follow(losses)[0]


if __name__ == "__main__":
    main()
