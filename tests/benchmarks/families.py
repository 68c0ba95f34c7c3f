"""Simulated studies: how often any verdict is false, and how many true gaps are found, with scatter pooled and before.

    python tests/benchmarks/families.py --studies 2000

*Before*: every comparison uses the scatter of its own three seeds. About 5 ms per study on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_prune.study.analysis import inference  # noqa: E402
from tests.study.families import Study, told_apart  # noqa: E402

NOTHING = {
    "30 comparisons": Study(),
    "60 comparisons, 6 methods": Study(methods=6),
    "60, all methods beside the same scratch runs": Study(methods=6, dense=True),
    "30, a seed does half as much to all as to each": Study(seed=0.5),
    "30, a seed does twice as much to all as to each": Study(seed=2.0),
    "30, one setting scatters five times as much": Study(settings=5.0),
    "30, scatter differs (log-normal, 0.5)": Study(spread=0.5),
    "30, scatter differs (log-normal, 1)": Study(spread=1.0),
    "30, five seeds": Study(seeds=5),
}
REAL = {
    "30 comparisons, one real": Study(real=1),
    "30 comparisons, 15 real": Study(real=15),
    "60 comparisons, 30 real": Study(methods=6, real=30),
    "60, same scratch runs, 30 real": Study(methods=6, dense=True, real=30),
    "30, one setting scatters five times as much, 15 real": Study(settings=5.0, real=15),
    "30, scatter differs (log-normal, 0.5), 15 real": Study(spread=0.5, real=15),
    "30, a seed does half as much to all, 15 real": Study(seed=0.5, real=15),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, study in (NOTHING | REAL).items():
        generator = np.random.default_rng(options.seed)
        made = [study.comparisons(generator) for _ in range(options.studies)]
        pooled = np.mean([all(inference.shared(one)) for one in made])
        now, before = ([told_apart(one, pool=pool) for one in made] for pool in (True, False))
        false = [100 * np.mean([one[study.real :].any() for one in found]) for found in (now, before)]
        text = f"{name}: a false verdict in {false[0]:.1f}% of studies, before {false[1]:.1f}%"
        if study.real:
            found = [100 * np.mean([one[: study.real].mean() for one in kind]) for kind in (now, before)]
            text += f"; gaps of 5 deviations found {found[0]:.1f}%, before {found[1]:.1f}%"
        print(f"{text}; all pooled in {100 * pooled:.0f}%", flush=True)


if __name__ == "__main__":
    main()
