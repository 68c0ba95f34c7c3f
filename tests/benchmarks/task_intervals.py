"""Simulated studies with tasks: how often 95% intervals of accuracies hold the truth, and what they find.

    python tests/benchmarks/task_intervals.py --studies 2000

About 1 ms per study on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_prune.study.analysis.inference import over_questions  # noqa: E402
from tests.study.answers_made_up import differences  # noqa: E402

TASKS = {
    "a task of 60 questions": [60],
    "a task of 400": [400],
    "a suite of four tasks of 30 to 150": [30, 60, 100, 150],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000, help="of each kind")
    options = parser.parse_args()
    for name, tasks in TASKS.items():
        for seeds in (1, 2, 3, 5):
            parts = []
            for deviation in (0.0,) if seeds == 1 else (0.0, 0.05, 0.1, 0.2, 0.4):
                covered, found, false = [], [], []
                for gap in (0.3, 0.0):
                    drawn, truth = differences(
                        np.random.default_rng(seeds), options.studies, seeds, tasks, seed=deviation, gap=gap
                    )
                    for study in range(options.studies):
                        one = over_questions([table[study] for table in drawn])
                        assert one.low is not None and one.high is not None
                        (found if gap else false).append(one.winner != "neither")
                        covered.append(one.low <= truth <= one.high)
                shares = [100 * float(np.mean(one)) for one in (covered, false, found)]
                parts.append(f"{deviation:g}: {shares[0]:.1f}, {shares[1]:.1f}, {shares[2]:.0f}%")
            print(f"{name}, {seeds} seeds; deviation of skill: held, false, found: {'; '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
