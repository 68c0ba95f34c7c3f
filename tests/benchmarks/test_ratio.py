"""The harness itself: the order of its measurements, and the coverage of its interval."""

from __future__ import annotations

import argparse
import json

import numpy
import pytest

from tests.benchmarks.ratio import finish, interleaved, summarise


def test_the_two_take_turns_at_going_first_after_a_warm_up() -> None:
    order: list[str] = []

    def measure(name: str, value: float):
        return lambda: (order.append(name), value)[1]

    found = interleaved("x", measure("a", 3.0), measure("b", 2.0), pairs=6, say=lambda _: None)
    assert "".join(order) == "ab" + "abba" * 3
    assert (found.median, found.low, found.high) == (1.5, 1.5, 1.5)


def test_the_interval_is_the_second_and_ninth_of_ten() -> None:
    ratios = [1.3, 0.9, 1.1, 1.0, 1.2, 1.6, 0.8, 1.4, 1.5, 0.7]
    found = summarise("x", ratios, [1.0] * 10)
    assert (found.low, found.median, found.high) == (0.8, pytest.approx(1.15), 1.5)


def test_the_interval_covers_the_true_median_95_times_in_100() -> None:
    generator = numpy.random.default_rng(0)
    covered = 0
    for _ in range(400):
        times = numpy.exp(generator.normal(0.0, 0.3, 10))  # the true median ratio is 1
        found = summarise("x", list(times), [1.0] * 10)
        covered += found.low <= 1.0 <= found.high
    assert covered / 400 >= 0.95


def test_a_limit_is_judged_by_the_upper_end(tmp_path) -> None:
    args = argparse.Namespace(json=tmp_path / "x.json")
    spread = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.2, 1.2]
    assert finish([summarise("x", spread, [1.0] * 10, limit=1.3)], args) == 0
    assert finish([summarise("x", spread, [1.0] * 10, limit=1.1)], args) == 1
    assert json.loads(args.json.read_text())["ratios"][0]["holds"] is False


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        interleaved("x", lambda: 1.0, lambda: 1.0, pairs=5)
