"""A teacher's cache: what is written is read, in every type; another or a damaged one is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from megatron_prune.artifacts import sha256_file
from megatron_prune.errors import DataError, MegatronPruneError, UsageError
from megatron_prune.training import teacher_cache
from megatron_prune.training.teacher_cache import Taught, open_cache

STREAM = {
    "id": "a" * 64, "seed": 3, "seq_length": 7, "epochs": 1, "blend": [[None, "text"]], "corpora": ["c" * 64],
    "samples": 40,
}  # fmt: skip
TAUGHT = Taught(
    teacher={"path": "parent", "fingerprint": "f" * 64}, stream=STREAM, range=(4, 15), vocabulary=101, tokenizers=(),
    k=5, dtype="float32", shard_samples=4, flops=11,
)  # fmt: skip


def write(folder: Path, taught: Taught = TAUGHT, seed: int = 0) -> torch.Tensor:
    """A complete cache of random log-probabilities, which are returned: [samples, S, vocabulary]."""
    draws = torch.Generator().manual_seed(seed)
    samples = taught.range[1] - taught.range[0]
    whole = (3 * torch.randn(samples, taught.seq_length, taught.vocabulary, generator=draws)).log_softmax(-1)
    top = whole.topk(taught.k)
    rest = whole.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    for shard in range(taught.shards):
        of = slice(*(number - taught.range[0] for number in taught.shard_range(shard)))
        tensors = {"ids": top.indices[of], "log_probabilities": top.values[of], "rest": rest[of]}
        teacher_cache.write_shard(folder, taught, shard, tensors)
    hashes = [sha256_file(teacher_cache.shard_path(folder, shard)) for shard in range(taught.shards)]
    teacher_cache.write_manifest(folder, taught, hashes)
    return whole


@pytest.mark.parametrize(
    ("dtype", "vocabulary", "k", "bytes_per_token"),
    [("float32", 101, 5, 34), ("float16", 101, 101, 408), ("bfloat16", 65_536, 3, 16), ("float16", 65_537, 64, 388)],
)
def test_what_is_written_is_read(tmp_path, dtype, vocabulary, k, bytes_per_token):
    taught = dataclasses.replace(TAUGHT, dtype=dtype, vocabulary=vocabulary, k=k)
    whole = write(tmp_path, taught)
    cache = pickle.loads(pickle.dumps(open_cache(tmp_path)))  # as a worker of a data loader has it
    assert cache.taught == taught and taught.bytes_per_token == bytes_per_token
    stored = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    assert 0 < stored - bytes_per_token * taught.tokens < 512 * taught.shards  # headers
    for sample in (14, 4, 8, 7):
        found, expected = cache.read(sample), whole[sample - 4]
        assert found["ids"].dtype == torch.int32 and found["log_probabilities"].dtype == getattr(torch, dtype)
        assert torch.equal(found["ids"].long(), expected.topk(k).indices)
        assert torch.equal(found["log_probabilities"], expected.topk(k).values.to(found["log_probabilities"].dtype))
        total = found["log_probabilities"].double().exp().sum(-1) + found["rest"].double().exp()
        np.testing.assert_allclose(total, 1, atol={"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype])
    for sample in (3, 15):
        with pytest.raises(IndexError):
            cache.read(sample)


def test_many_shards_are_read_with_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "_OPEN_SHARDS", 2)
    whole = write(tmp_path, dataclasses.replace(TAUGHT, shard_samples=1))
    cache = open_cache(tmp_path)
    for sample in np.random.default_rng(0).integers(4, 15, 40):
        assert torch.equal(cache.read(sample)["log_probabilities"], whole[sample - 4].topk(5).values)
        assert len(cache._open) <= 2


USE = {"stream": STREAM, "samples": (5, 15), "vocabulary": 101, "prefixes": ["text"], "teacher": None}


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ({"samples": (3, 9)}, "expected one of samples 3:9, got {}, a cache of samples 4:15"),
        ({"samples": (5, 16)}, "expected one of samples 5:16, got {}, a cache of samples 4:15"),
        ({"vocabulary": 102},
         "expected one of a vocabulary of 102 words, got {}, a cache of a vocabulary of 101 words"),
        ({"teacher": "e" * 64}, "expected one of a teacher with the weights eeeeeeeeeeee, got {}, a cache of the "
                                "teacher parent with the weights ffffffffffff"),
        ({"prefixes": ["text"]}, "expected one of text by the tokenizer 000000000000, got {}, a cache of text by the "
                                 "tokenizer 111111111111"),
        ({"stream": {"seq_length": 8}}, "expected one of --seq-length 8, got {}, a cache of --seq-length 7"),
        ({"stream": {"seed": 4}}, "expected one of --stream-seed 4, got {}, a cache of --stream-seed 3"),
        ({"stream": {"epochs": 2}}, "expected one of --stream-epochs 2, got {}, a cache of --stream-epochs 1"),
        ({"stream": {"corpora": ["d" * 64], "blend": [[None, "other"]]}},
         "expected one of the corpora other, got {}, a cache of the corpora text"),
        ({"stream": {"corpora": ["d" * 64]}},
         "expected one of the corpora text, got {}, a cache of the corpora text with another content"),
        ({"stream": {"blend": [[0.5, "text"]]}},
         "expected one of these corpora with the weights 0.5, got {}, a cache of corpora with the weights None"),
    ],
)  # fmt: skip
def test_a_cache_of_something_else_is_refused(tmp_path, monkeypatch, use, said):
    write(tmp_path / "cache", dataclasses.replace(TAUGHT, tokenizers=("1" * 64,)))
    monkeypatch.chdir(tmp_path)
    cache = open_cache("cache")
    cache.refuse_other_use(**USE | {"teacher": "f" * 64})  # it is of this use
    if "prefixes" in use:
        Path("text.json").write_text(json.dumps({"tokenizer": {"fingerprint": "0" * 64}}))
    if "stream" in use:
        use = {"stream": STREAM | use["stream"] | {"id": "b" * 64}}
    with pytest.raises(UsageError) as refused:
        cache.refuse_other_use(**USE | use)
    assert str(refused.value).startswith(f"--teacher-cache: {said.format(tmp_path / 'cache')}; make it with ")


def damaged(folder: Path, name: str, place: tuple[int, ...], value: float) -> None:
    """Change a number in the second shard, which holds samples 8 to 11."""
    path = teacher_cache.shard_path(folder, 1)
    tensors = safetensors.torch.load(path.read_bytes())
    numbers = tensors[name].to(torch.int64 if name == "ids" else torch.float32)
    numbers[place] = value
    path.write_bytes(safetensors.torch.save(tensors | {name: numbers.to(tensors[name].dtype)}))


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("ids", (1, 2, 3), 101, "expected ids from 0 to 100, got 101"),
        ("ids", (1, 2, 3), 65_535, "expected ids from 0 to 100, got 65535"),
        ("log_probabilities", (1, 0, 4), float("nan"), "expected finite log-probabilities of at most 0, got nan"),
        ("log_probabilities", (1, 0, 4), float("-inf"), "expected finite log-probabilities of at most 0, got -inf"),
        ("log_probabilities", (1, 0, 4), 0.5, "expected finite log-probabilities of at most 0, got 0.5"),
        ("log_probabilities", (1, 6, slice(None)), -1, "expected probabilities whose sum is at most 1, got 1.8394"),
        ("rest", (1, 6), float("nan"), "expected as logarithm of the rest a finite number of at most 0, got nan"),
        ("rest", (1, 6), 0.25, "expected as logarithm of the rest a finite number of at most 0, got 0.25"),
        ("rest", (1, 6), float("-inf"), "expected as logarithm of the rest a finite number of at most 0, got -inf"),
    ],
)
def test_numbers_that_no_teacher_says_are_refused(tmp_path, name, place, value, said):
    write(tmp_path)
    damaged(tmp_path, name, place, value)
    cache = open_cache(tmp_path)
    cache.read(8)
    with pytest.raises(DataError) as refused:
        cache.read(9)
    assert f"shard-00001.safetensors is damaged: sample 9: {said}" in str(refused.value)


def test_ids_beyond_31_bits_are_refused(tmp_path):
    write(tmp_path, dataclasses.replace(TAUGHT, vocabulary=65_537))
    damaged(tmp_path, "ids", (0, 0, 0), 2**32 - 1)
    with pytest.raises(DataError, match="expected ids from 0 to 65536, got -1"):
        open_cache(tmp_path).read(8)


def test_damaged_files_are_refused(tmp_path):
    write(tmp_path)
    shard = teacher_cache.shard_path(tmp_path, 1)
    content, manifest = shard.read_bytes(), (tmp_path / "manifest.json").read_text()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"expected a file of [\d,]+ bytes, got [\d,]+; remove it and run the same"):
        open_cache(tmp_path)
    assert not teacher_cache.is_written(tmp_path, TAUGHT, 1) and teacher_cache.is_written(tmp_path, TAUGHT, 0)
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        open_cache(tmp_path)
    other = safetensors.torch.save({"ids": torch.zeros(4, 7, 4, dtype=torch.uint16)})
    shard.write_bytes(other + b"\0" * (len(content) - len(other)))
    with pytest.raises(DataError, match="missing, truncated or damaged"):
        open_cache(tmp_path).read(8)
    tensors = safetensors.torch.load(content)
    tensors["ids"], tensors["rest"] = tensors["ids"].view(4, 5, 7), tensors["rest"]
    shard.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(DataError, match=r"expected ids of torch.uint16 \[4, 7, 5\], got torch.uint16 \[4, 5, 7\]"):
        open_cache(tmp_path).read(8)
    for key, value in (
        ("range", [4]), ("range", [4, 4]), ("k", 102), ("k", 0), ("dtype", "float64"), ("shard_samples", 0),
        ("shards", []), ("vocabulary", 2**31), ("version", 2), ("stream", {}), ("teacher", None), ("k", "5"),
    ):  # fmt: skip
        (tmp_path / "manifest.json").write_text(json.dumps(json.loads(manifest) | {key: value}))
        with pytest.raises(MegatronPruneError):
            open_cache(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UsageError, match="expected a folder that teach has written, with a manifest.json"):
        open_cache(tmp_path)
    with pytest.raises(UsageError, match="--teacher-cache: expected a directory of this machine, got msc://"):
        open_cache("msc://profile/cache")
