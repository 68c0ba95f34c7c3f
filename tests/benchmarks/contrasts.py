"""Simulated studies: how often intervals of questions between comparisons hold the truth, and what their tests find.

    python tests/benchmarks/contrasts.py --studies 2000

Runs have a deviation of sqrt(1/2), so that a gap has one of 1. *False*: p below 0.05 where nothing is there; for the
margin: where the true gap is at it. *Found*: a gap of 5 deviations; a gap of none within a margin of 5. About 5 ms per
study on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_prune.study.analysis import contrasts  # noqa: E402
from tests.study.families import Study  # noqa: E402
from tests.study.sums_made_up import QUESTIONS, answers  # noqa: E402

KINDS = {
    "3 seeds": Study(),
    "3 seeds, one scratch run for all methods": Study(dense=True),
    "3 seeds, a seed does half as much to all as to each": Study(seed=0.5),
    "3 seeds, a seed does twice as much to all as to each": Study(seed=2.0),
    "3 seeds, scatter differs (log-normal, 0.5)": Study(spread=0.5),
    "3 seeds, scatter differs (log-normal, 1)": Study(spread=1.0),
    "5 seeds": Study(seeds=5),
}
GAP = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000, help="of each kind")
    options = parser.parse_args()
    for kind, study in KINDS.items():
        generator = np.random.default_rng(0)
        nothing = [answers(study, generator, 0.0) for _ in range(options.studies)]
        real = [answers(study, generator, GAP) for _ in range(options.studies)]
        for question in QUESTIONS:
            held = [
                one.low is not None and one.high is not None and one.low <= truth <= one.high
                for many in (nothing, real)
                for one, truth in (found[question] for found in many)
            ]
            false = [(found[question][0].p or 0.0) < 0.05 for found in nothing]
            power = [(found[question][0].p or 0.0) < 0.05 for found in real]
            print(f"{kind}: {question}: held {share(held)}, false {share(false)}, found {share(power)}", flush=True)
        at = [(contrasts.equivalence(found["one gap"][0], GAP)[0] or 0.0) < 0.05 for found in real]
        within = [(contrasts.equivalence(found["one gap"][0], GAP)[0] or 0.0) < 0.05 for found in nothing]
        print(f"{kind}: a gap within a margin: false {share(at)}, found {share(within)}", flush=True)


def share(values: list[bool]) -> str:
    return f"{100 * float(np.mean(values)):.1f}%"


if __name__ == "__main__":
    main()
