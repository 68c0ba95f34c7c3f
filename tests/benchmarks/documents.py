"""Simulated evaluation documents: how often 95% intervals over them contain the truth.

    python tests/benchmarks/documents.py --texts 4000

Documents have uneven lengths; their own gaps are normal, or skewed (log-normal). *BCa* is SciPy's, the method
used before. About 10 ms per text on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_prune.study.analysis import inference  # noqa: E402
from tests.study.corpora_made_up import TRUTH, windows  # noqa: E402


def before(gaps: np.ndarray, own: np.ndarray) -> tuple[float, float]:
    sums, number = np.bincount(own, gaps), np.bincount(own).astype(float)
    found = stats.bootstrap(
        (sums, number), lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis), paired=True, vectorized=True,
        n_resamples=2000, method="BCa", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found.low, found.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=4000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    inference.FEWEST_DOCUMENTS = 0  # shows why there is a minimum
    for documents in (12, 30, 60, 200):
        for skewed in (False, True):
            generator = np.random.default_rng(options.seed)
            covered = {"now": 0, "BCa": 0}
            for _ in range(options.texts):
                gaps, own = windows(generator, documents, skewed=skewed)
                found = inference.over_documents(np.zeros((1, len(gaps))), gaps[None], own)
                assert found is not None and found.low is not None and found.high is not None
                covered["now"] += found.low <= TRUTH <= found.high
                low, high = before(gaps, own)
                covered["BCa"] += low <= TRUTH <= high
            shares = ", ".join(f"{name} {100 * value / options.texts:.1f}%" for name, value in covered.items())
            print(f"{documents} documents, {'skewed' if skewed else 'normal'}: cover {shares}", flush=True)


if __name__ == "__main__":
    main()
