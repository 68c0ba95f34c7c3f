"""Streams against an independent reconstruction of Megatron's one-epoch order, in plain NumPy."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune import artifacts
from megatron_prune.data import blend, indexed
from megatron_prune.data.streams import Stream, StreamRange, epoch_seed, parse_range, refuse_overlap
from megatron_prune.errors import DataError, UsageError
from megatron_prune.training.data import refuse_unfit_range
from tests.data.corpora import write_corpus


def random_documents(seed, count=40, longest=50, vocabulary=1000):
    generator = np.random.RandomState(seed)
    return [generator.randint(0, vocabulary, generator.randint(1, longest + 1)) for _ in range(count)]


def one_epoch(documents, seq_length, seed):
    """Megatron's order by hand: shuffle documents, join, cut into S (+1 shared token), shuffle samples."""
    state = np.random.RandomState(seed)
    order = np.arange(len(documents), dtype=np.int32)
    state.shuffle(order)
    joined = np.concatenate([documents[d] for d in order])
    numbers = np.arange((len(joined) - 1) // seq_length, dtype=np.uint32)
    state.shuffle(numbers)
    return [joined[n * seq_length : n * seq_length + seq_length + 1] for n in numbers.astype(int)]


def text(sample):
    return np.append(sample["tokens"].numpy(), sample["labels"].numpy()[-1])


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", random_documents(0))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(1, 3))
def test_every_sample_is_megatrons_one_epoch_order(tmp_path_factory, seq_length, seed, data, epochs):
    folder = tmp_path_factory.mktemp("stream")
    documents = random_documents(data)
    stream = Stream.build(write_corpus(folder / "c", documents), seq_length, seed, epochs)
    expected = [s for e in range(epochs) for s in one_epoch(documents, seq_length, epoch_seed(seed, e))]
    assert len(stream) == len(expected)
    for number, sample in enumerate(expected):
        found = stream[number]
        np.testing.assert_array_equal(text(found), sample)
        np.testing.assert_array_equal(found["tokens"][1:], found["labels"][:-1])
        assert found["loss_mask"].sum() == seq_length
        assert found["position_ids"].tolist() == list(range(seq_length))


def test_a_sample_does_not_depend_on_the_range_asked_for(corpus):
    stream = Stream.build(corpus, 16, seed=3)
    short, long = StreamRange(stream, 4, 10), StreamRange(Stream.build(corpus, 16, seed=3), 0, len(stream))
    for position in range(6):
        assert torch.equal(short[position]["tokens"], long[position + 4]["tokens"])


def test_blend_takes_each_member_in_its_own_order_and_in_proportion(tmp_path):
    documents = [random_documents(1, count=200), random_documents(2, count=30)]
    a, b = (write_corpus(tmp_path / name, found) for name, found in zip("ab", documents, strict=True))
    stream = Stream.build(["30", a, "10", b], 16, seed=5)
    expected = [iter(one_epoch(found, 16, 5)) for found in documents]
    counts = [0, 0]
    for number in range(len(stream)):
        sample = stream[number]
        counts[sample["dataset_id"]] += 1
        np.testing.assert_array_equal(text(sample), next(expected[sample["dataset_id"]]))
        assert abs(counts[0] - 0.75 * (number + 1)) <= 1
    # The end is where the smaller corpus is used up, not a sample earlier.
    assert counts[1] == len(one_epoch(documents[1], 16, 5))


def test_members_without_weights_are_used_up_together(tmp_path):
    documents = [random_documents(1, count=50), random_documents(2, count=30)]
    prefixes = [write_corpus(tmp_path / name, found) for name, found in zip("ab", documents, strict=True)]
    stream = Stream.build(prefixes, 16, seed=5)
    assert len(stream) == sum(len(one_epoch(found, 16, 5)) for found in documents)
    halfway = [stream[i]["dataset_id"] for i in range(len(stream) // 2)]
    assert 0 < sum(halfway) < len(halfway)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 300)), min_size=2, max_size=5))
def test_blend_length_is_the_last_sample_before_a_member_runs_out(members):
    total = sum(weight for weight, _ in members)
    weights, lengths = [weight / total for weight, _ in members], [length for _, length in members]
    counts, samples = [0] * len(members), 0
    while True:  # the greedy rule, written out
        deficits = [w * max(samples, 1) - c for w, c in zip(weights, counts, strict=True)]
        chosen = deficits.index(max(deficits))
        if counts[chosen] == lengths[chosen]:
            break
        counts[chosen], samples = counts[chosen] + 1, samples + 1
    assert blend.blend_length(weights, lengths) == samples


def test_running_out_of_a_blend_is_refused(tmp_path):
    a = write_corpus(tmp_path / "a", random_documents(1, count=200))
    b = write_corpus(tmp_path / "b", random_documents(2, count=10))
    stream = Stream.build(["1", a, "1", b], 16, seed=5)
    with pytest.raises(UsageError, match=f"an end of at most {len(stream)}.*does not wrap"):
        StreamRange(stream, 0, len(stream) + 1)
    with pytest.raises(IndexError):
        stream[len(stream)]


def test_identity_is_content_and_settings_and_not_the_path(tmp_path, corpus):
    moved = str(tmp_path / "elsewhere" / "other")
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus + suffix, moved + suffix)
    other = write_corpus(tmp_path / "changed", random_documents(9))
    cache = tmp_path / "cache"
    ids = {
        "same": Stream.build(corpus, 16, 3, cache_path=cache).id,
        "content": Stream.build(other, 16, 3, cache_path=cache).id,
        "length": Stream.build(corpus, 17, 3, cache_path=cache).id,
        "seed": Stream.build(corpus, 16, 4, cache_path=cache).id,
        "epochs": Stream.build(corpus, 16, 3, epochs=2, cache_path=cache).id,
        "blend": Stream.build(["1", corpus, "2", other], 16, 3, cache_path=cache).id,
        "weights": Stream.build(["2", corpus, "1", other], 16, 3, cache_path=cache).id,
    }
    assert len(set(ids.values())) == len(ids)
    built = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert Stream.build(moved, 16, 3, cache_path=cache).id == ids["same"]
    assert Stream.build(["10", moved, "20", other], 16, 3, cache_path=cache).id == ids["blend"]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == built  # found, not built again


def test_a_corpus_made_anew_under_the_same_name_never_meets_old_caches(tmp_path):
    first = Stream.build(write_corpus(tmp_path / "c", random_documents(0)), 16, 3)
    documents = random_documents(1)
    second = Stream.build(write_corpus(tmp_path / "c", documents), 16, 3)
    assert first.id != second.id
    np.testing.assert_array_equal(text(second[0]), one_epoch(documents, 16, 3)[0])


def test_a_killed_cache_build_is_not_taken_for_a_cache(tmp_path, corpus, monkeypatch):
    calls = []

    def killed(path, array, **_):
        calls.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", killed)
        Stream.build(corpus, 16, 3, cache_path=tmp_path / "cache")
    assert calls and not list((tmp_path / "cache").iterdir())
    expected = one_epoch(random_documents(0), 16, 3)
    stream = Stream.build(corpus, 16, 3, cache_path=tmp_path / "cache")
    np.testing.assert_array_equal(text(stream[0]), expected[0])


def test_when_two_build_the_same_caches_the_first_to_finish_wins(tmp_path, corpus, monkeypatch):
    opened = Stream._open

    def overtaken(self, cache, flags):
        parts = opened(self, cache, flags)
        if artifacts.PARTIAL in cache.name:  # while it builds, another process builds the same and finishes first
            with monkeypatch.context() as patch:
                patch.setattr(Stream, "_open", opened)
                Stream.build(corpus, 16, 3, cache_path=tmp_path / "cache")
        return parts

    monkeypatch.setattr(Stream, "_open", overtaken)
    stream = Stream.build(corpus, 16, 3, cache_path=tmp_path / "cache")
    np.testing.assert_array_equal(text(stream[0]), one_epoch(random_documents(0), 16, 3)[0])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"stream-{stream.id[:16]}"]


def test_files_read_without_mapping_give_the_same_samples(corpus):
    mapped, unmapped = (Stream.build(corpus, 16, 3, mmap_bin_files=mmap) for mmap in (True, False))
    assert mapped.id == unmapped.id
    assert all(torch.equal(mapped[i]["tokens"], unmapped[i]["tokens"]) for i in range(len(mapped)))


def test_permutation_stays_inside_the_range_and_is_the_same_for_both_arms(corpus):
    stream = Stream.build(corpus, 8, seed=3)
    ranges = [StreamRange(Stream.build(corpus, 8, seed=3), 10, 60, permutation_seed=7) for _ in range(2)]
    orders = [[r.sample(i) for i in range(len(r))] for r in ranges]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(10, 60)) != orders[0]
    other = StreamRange(stream, 10, 60, permutation_seed=8)
    assert [other.sample(i) for i in range(50)] != orders[0]
    assert torch.equal(ranges[0][3]["tokens"], stream[orders[0][3]]["tokens"])


@pytest.mark.parametrize(
    ("start", "end", "says"),
    [
        (0, 10**6, "does not wrap"),
        (5, 5, "START < END"),
        (-1, 4, "0 <= START"),
        (0, 10, "leave a rest of 2"),
    ],
)
def test_ranges_that_cannot_be_are_refused(corpus, start, end, says):
    with pytest.raises(UsageError, match="--stream-range") as refusal:
        StreamRange(Stream.build(corpus, 8, seed=3), start, end, global_batch_size=4)
    assert says in str(refusal.value)


def test_a_range_may_end_with_the_stream_and_not_one_sample_later(corpus):
    stream = Stream.build(corpus, 8, seed=3, epochs=2)
    last = len(stream)
    assert torch.equal(StreamRange(stream, last - 1, last)[0]["tokens"], stream[last - 1]["tokens"])
    with pytest.raises(UsageError, match=f"an end of at most {last}"):
        StreamRange(stream, last - 1, last + 1)
    with pytest.raises(IndexError):
        stream[last]
    arguments = SimpleNamespace(
        train_data_path=[corpus],
        data_path=None,
        seq_length=8,
        stream_epochs=2,
        stream_seed=3,
        stream_allow_seen=False,
        dynamic_batch_every=None,
        batch_schedule=None,
        vocab_size=None,
        padded_vocab_size=1 << 16,
    )
    refuse_unfit_range(SimpleNamespace(stream_range=f"0:{last}", **vars(arguments)), [])
    with pytest.raises(UsageError, match=f"an end of at most {last}"):
        refuse_unfit_range(SimpleNamespace(stream_range=f"0:{last + 1}", **vars(arguments)), [])


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "7:7", "9:3", "-1:4", "1:2:3", "a:b", "1.0:2"])
def test_broken_range_texts_are_refused(text):
    with pytest.raises(UsageError, match="START:END"):
        parse_range(text)
    assert parse_range("1000:2000") == (1000, 2000)


def use(stream, start, end):
    return json.loads(json.dumps({"stream": stream.describe(), "range": [start, end]}))


def test_overlap_is_refused(tmp_path, corpus):
    stream = Stream.build(corpus, 8, seed=3)
    names = ("retraining", "the parent's training")
    refuse_overlap(use(stream, 10, 20), use(stream, 0, 10), names)
    with pytest.raises(DataError, match=r"retraining takes samples 9:20 .* both would see 9:10"):
        refuse_overlap(use(stream, 9, 20), use(stream, 0, 10), names)
    with pytest.raises(DataError, match="different streams"):  # another order of the same text
        refuse_overlap(use(stream, 10, 20), use(Stream.build(corpus, 8, seed=4), 0, 10), names)
    other = Stream.build(write_corpus(tmp_path / "other", random_documents(5)), 8, seed=3)
    refuse_overlap(use(stream, 0, 20), use(other, 0, 20), names)
    both = Stream.build(["1", corpus, "1", other.corpora[0].prefix], 8, seed=3)
    with pytest.raises(DataError, match="different streams"):
        refuse_overlap(use(stream, 0, 2), use(both, 2, 4), names)


def test_epochs_of_one_stream_overlap_each_other(corpus):
    stream = Stream.build(corpus, 8, seed=3, epochs=3)
    epoch, names = stream.samples_per_epoch, ("a", "b")
    assert len(stream) == 3 * epoch
    refuse_overlap(use(stream, epoch, epoch + 5), use(stream, epoch + 5, 2 * epoch), names)
    with pytest.raises(DataError, match="different epochs"):
        refuse_overlap(use(stream, 0, 5), use(stream, epoch, epoch + 5), names)


def test_broken_corpora_are_refused(tmp_path, corpus):
    with pytest.raises(DataError, match="absent.bin does not exist"):
        Stream.build(str(tmp_path / "absent"), 8, 0)
    with pytest.raises(DataError, match="one sample needs 5001"):
        Stream.build(corpus, 5000, 0)
    with pytest.raises(DataError, match="same tokens"):
        Stream.build(["1", corpus, "2", corpus], 8, 0)
    with pytest.raises(UsageError, match="--data-path"):
        Stream.build(["0", corpus, "2", corpus], 8, 0)
    with pytest.raises(UsageError, match="--stream-seed"):
        Stream.build(corpus, 8, -1)
    with pytest.raises(UsageError, match="end-of-document"):
        Stream.build(corpus, 8, 0, eod_mask_loss=True)
    with open(corpus + ".bin", "r+b") as handle:
        handle.truncate(100)
    with pytest.raises(DataError, match="got 100: .*truncated"):
        Stream.build(corpus, 8, 0)
    with open(corpus + ".idx", "r+b") as handle:
        handle.truncate(100)
    with pytest.raises(DataError, match="a truncated Megatron index"):
        Stream.build(corpus, 8, 0)


def test_masks_at_document_ends_follow_the_flags(tmp_path):
    prefix = write_corpus(tmp_path / "c", [np.array([5, 6, 1]), np.array([7, 8, 9, 1])] * 3)
    sample = Stream.build(prefix, 20, 0, eod=1, eod_mask_loss=True, reset_position_ids=True)[0]
    assert torch.equal(sample["loss_mask"] == 0, sample["tokens"] == 1)
    starts = torch.nonzero(sample["tokens"] == 1).flatten() + 1
    assert (sample["position_ids"][starts[starts < 20]] == 0).all()


def test_corpus_that_does_not_fit_the_model_is_refused(tmp_path):
    prefix = write_corpus(tmp_path / "c", [np.array([1, 2, 999, 3])])
    indexed.check_fits_model(prefix, 1000)
    with pytest.raises(DataError, match="got 999"):
        indexed.check_fits_model(prefix, 999)


def test_fingerprint_of_a_large_corpus_sees_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "BLOCKS", 4)
    monkeypatch.setattr(indexed, "BLOCK_BYTES", 64)
    documents = random_documents(0)
    prints = {indexed.fingerprint(write_corpus(tmp_path / "c", documents))}
    for document, place in ((0, 0), (-1, -1)):
        changed = [d.copy() for d in documents]
        changed[document][place] += 1
        prints.add(indexed.fingerprint(write_corpus(tmp_path / "c", changed)))
    assert len(prints) == 3
