"""Batch schedules: proportions by the published formula, whole samples by them, the same for whoever follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.data import blend
from megatron_prune.data.schedule import Schedule, ScheduledRange, allocate, followed, updated
from megatron_prune.data.streams import Stream
from megatron_prune.errors import DataError
from tests.data.corpora import write_corpus


def published(p: np.ndarray, losses: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Algorithm 1 of Sheared-LLaMA, with 1e-4 of equal proportions mixed in."""
    raised = p * np.exp(np.clip(losses - references, 0, None))
    return (1 - 1e-4) * raised / raised.sum() + 1e-4 / len(p)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("corpora", [2, 7])
def test_proportions_follow_the_published_formula(seed, corpora):
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.ones(corpora))
    references = generator.uniform(1, 3, corpora)
    ours = tuple(p)
    for _ in range(5):
        losses = references + generator.normal(0, 1, corpora)  # some below their reference
        p, ours = published(p, losses, references), updated(ours, losses, references)
        np.testing.assert_allclose(ours, p, rtol=1e-12)
    assert np.isclose(sum(ours), 1, rtol=0, atol=1e-12)


def test_a_corpus_below_its_reference_is_left_alone():
    assert updated((0.5, 0.5), (1.0, 9.0), (2.0, 9.0)) == pytest.approx((0.5, 0.5))


def test_huge_losses_do_not_overflow():
    assert updated((0.5, 0.5), (2000.0, 1000.0), (0.0, 0.0)) == pytest.approx((1 - 5e-5, 5e-5))


@pytest.mark.parametrize("seed", range(4))
def test_rounding_is_carried_so_that_no_corpus_falls_behind(seed):
    """Over many short blocks a corpus has its share, though the share of one block is below one sample."""
    generator = np.random.default_rng(seed)
    schedule = new(steps=400, batch=3, every=2, corpora=5, available=10_000)
    due = np.zeros(5)
    while schedule.next_step is not None:
        p = generator.dirichlet(np.full(5, 0.3))
        block = schedule.extend(p)
        due += p * 6
        assert sum(block.counts) == 6
        assert np.abs(due - schedule.taken).max() < 2.5


def test_what_a_corpus_lacks_the_others_give():
    assert allocate((0.5, 0.3, 0.2), 100, (0.0,) * 3, (10, 1000, 1000)) == (10, 54, 36)
    assert allocate((0.5, 0.3, 0.2), 100, (0.0,) * 3, (10, 20, 1000)) == (10, 20, 70)
    assert allocate((1.0, 0.0), 5, (0.0, 0.0), (2, 3)) == (2, 3)
    with pytest.raises(DataError, match="6 samples are to be drawn, and all corpora together have 5 left"):
        allocate((0.5, 0.5), 6, (0.0, 0.0), (2, 3))


def new(steps=10, batch=8, every=4, corpora=3, available=1000, permutation=None, begins=None) -> Schedule:
    stream = {"id": "s", "blend": [[None, str(i)] for i in range(corpora)]}
    return Schedule(stream, 0, steps, batch, every, permutation, begins or (0,) * corpora, (available,) * corpora, {})


def whole(permutation=None, **more) -> Schedule:
    schedule = new(permutation=permutation, begins=(5, 0, 7), **more)
    for p in ((0.5, 0.3, 0.2), (0.1, 0.1, 0.8), (0.25, 0.5, 0.25)):
        schedule.extend(p)
    return schedule


def read(schedule: Schedule) -> list[tuple[int, int]]:
    place = ScheduledRange(None, schedule)
    return [place.sample(position) for position in range(schedule.steps * schedule.global_batch_size)]


def test_a_run_reads_every_corpus_in_order_without_a_gap():
    schedule = whole()
    samples = read(schedule)
    for corpus, (first, end) in enumerate(schedule.domains):
        assert [number for one, number in samples if one == corpus] == list(range(first, end))
    assert [sum(one == 0 for one, _ in samples[step * 8 : step * 8 + 8]) for step in range(4)] == [4, 4, 4, 4]
    assert schedule.next_step is None and sum(schedule.taken) == 80


@pytest.mark.parametrize("seed", [0, 5])
def test_a_permutation_stays_inside_each_block(seed):
    plain, permuted = read(whole()), read(whole(permutation=seed))
    assert plain != permuted
    for first, end in ((0, 32), (32, 64), (64, 80)):
        assert sorted(plain[first:end]) == sorted(permuted[first:end])
    assert permuted == read(whole(permutation=seed)) != read(whole(permutation=seed + 1))
    alike = new(permutation=seed)
    first, second = ([alike.extend((0.5, 0.25, 0.25)), alike.order(number)][1] for number in range(2))
    assert first[0].tolist() != second[0].tolist()  # every block has its own


def test_what_is_not_known_yet_cannot_be_read():
    schedule = new()
    schedule.extend((0.5, 0.3, 0.2))
    place = ScheduledRange(None, schedule)
    assert place.sample(31)[0] in range(3)
    with pytest.raises(LookupError, match="step 4"):
        place.sample(32)


@pytest.mark.parametrize("permutation", [None, 3])
def test_a_longer_run_follows_and_goes_on_with_the_last_proportions(permutation):
    earlier = whole(permutation)
    same, longer = followed(earlier, 10), followed(earlier, 19)
    assert read(same) == read(earlier) and same.hash == earlier.hash
    assert read(longer)[:80] == read(earlier)
    assert [block.step for block in longer.blocks] == [0, 4, 8, 10, 14, 18]
    assert {block.proportions for block in longer.blocks[2:]} == {(0.25, 0.5, 0.25)}
    again = followed(longer, 30)
    assert read(again)[: 19 * 8] == read(longer)
    assert Schedule.of(json.loads(json.dumps(again.to_json()))) == again


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "batch_schedule.json"
    whole().write(path)
    assert Schedule.read(path) == whole()
    good = json.loads(path.read_text())
    for change in (
        {"version": 0}, {"blocks": good["blocks"][1:]}, {"begins": [0]}, {"steps": 11}, {"more": 1}, {"blocks": 3},
        {"blocks": [{**good["blocks"][0], "counts": [1, 2, 3]}]},
    ):  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=r"batch_schedule.json is not a batch schedule, or damaged"):
            Schedule.read(path)


@pytest.mark.parametrize("weights", [None, (3, 1, 2.5)])
def test_ranges_of_corpora_are_those_of_megatrons_blend(weights, tmp_path: Path):
    generator = np.random.default_rng(1)
    prefixes = [
        write_corpus(tmp_path / f"c{i}", [generator.integers(0, 300, n) for n in generator.integers(5, 60, 40 + 9 * i)])
        for i in range(3)
    ]
    words = prefixes if weights is None else [w for p in zip(map(str, weights), prefixes, strict=True) for w in p]
    stream = Stream.build(words, 16, 3)
    (part,) = stream.parts
    corpora = stream.corpora
    for start, end in ((0, 1), (7, 50), (0, len(stream)), (len(stream) - 3, len(stream))):
        found = blend.ranges(corpora, 16, start, end)
        assert found == stream.ranges(start, end)
        for corpus, (first, until) in enumerate(found):
            numbers = [int(part.dataset_sample_index[i]) for i in range(start, end) if part.dataset_index[i] == corpus]
            assert numbers == list(range(first, until))
        free = blend.after(corpora, 16, [until for _, until in found])
        assert free <= end and (end - free) < 3
        assert all(a >= b for (a, _), (_, b) in zip(blend.ranges(corpora, 16, free, len(stream)), found, strict=True))
