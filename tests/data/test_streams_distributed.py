"""The same stream from several processes: rank 0 builds the caches, all ranks read the same samples."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch.distributed as dist

from megatron_prune.data.streams import Stream
from tests.data.corpora import write_corpus


def read(folder):
    blend = ["2", f"{folder}/a", "1", f"{folder}/b"]
    stream = Stream.build(blend, 16, seed=3, epochs=2, cache_path=f"{folder}/cache")
    found = hashlib.sha256()
    for number in range(len(stream)):
        found.update(stream[number]["tokens"].numpy().tobytes())
    return stream.id, len(stream), found.hexdigest()


def read_on_a_rank(folder):
    dist.init_process_group("gloo")
    try:
        return read(folder), os.getpid()
    finally:
        dist.destroy_process_group()


def test_ranks_agree_with_each_other_and_with_one_process(tmp_path, distributed):
    for name in "ab":
        generator = np.random.RandomState(ord(name))
        write_corpus(tmp_path / name, [generator.randint(0, 100, n) for n in generator.randint(1, 50, 60)])
    found = distributed(read_on_a_rank, 3, str(tmp_path))
    assert len({pid for _, pid in found}) == 3
    caches = list((tmp_path / "cache").iterdir())
    assert len(caches) == 1
    built = {path: path.stat().st_mtime_ns for path in caches[0].iterdir()}
    assert [samples for samples, _ in found] == [read(str(tmp_path))] * 3
    assert {path: path.stat().st_mtime_ns for path in caches[0].iterdir()} == built
