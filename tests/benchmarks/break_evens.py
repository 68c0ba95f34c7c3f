"""Simulated ledgers with a known truth, at full size: how often intervals contain it.

    python tests/benchmarks/break_evens.py --ledgers 4000

t intervals over seeds should cover within 2% of 95%; break-even intervals should cover at least 90%; a break-even
beyond the data should be reported inside them in fewer than 5%. The tests do the same on fewer ledgers. Takes
about 20 ms per ledger on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_prune.study.analysis import inference, scaling_laws  # noqa: E402
from tests.study.crossings import holds, simulate  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ledgers", type=int, default=4000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    for seeds in (2, 3, 5, 10):
        print(f"t intervals, {seeds} seeds: cover {100 * _t_coverage(generator, seeds, 5 * options.ledgers):.1f}%")
    for inside in (True, False):
        found = [(scaling_laws.find(arms)[0], truth) for arms, truth in _ledgers(generator, options.ledgers, inside)]
        said = Counter(f"{even.status} by {even.by}" for even, _ in found)
        covered = np.mean([holds(even, truth) for even, truth in found])
        called = np.mean([even.status == "inside" for even, _ in found])
        widths = [even.high / even.low for even, _ in found if even.low and even.high]
        where = "inside" if inside else "beyond"
        print(f"truth {where} the data: said truly in {100 * covered:.1f}%, called inside in {100 * called:.1f}%")
        print(f"  median width {np.median(widths or [np.nan]):.2f}x; {dict(said)}")


def _ledgers(generator: np.random.Generator, count: int, inside: bool):
    return (simulate(generator, inside=inside) for _ in range(count))


def _t_coverage(generator: np.random.Generator, seeds: int, count: int) -> float:
    """Paired runs whose true gap is 0.03 nats."""
    shared = generator.normal(0, 0.2, (count, seeds))
    pruned = 2.5 + shared + generator.normal(0, 0.02, (count, seeds))
    scratch = 2.53 + shared + generator.normal(0, 0.01, (count, seeds))
    found = (inference.paired(p, s) for p, s in zip(pruned, scratch, strict=True))
    return float(np.mean([one.low <= 0.03 <= one.high for one in found]))


if __name__ == "__main__":
    main()
