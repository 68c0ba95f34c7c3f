"""The same stream from several processes: rank 0 builds the caches, all ranks read the same samples."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_prune.data.streams import Stream


def digest(stream):
    found = hashlib.sha256()
    for number in range(len(stream)):
        found.update(stream[number]["tokens"].numpy().tobytes())
    return found.hexdigest()


def worker(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    blend = ["2", f"{folder}/a", "1", f"{folder}/b"]
    stream = Stream.build(blend, 16, seed=3, epochs=2, cache_path=f"{folder}/cache")
    with open(f"{folder}/rank{rank}.json", "w") as handle:
        json.dump([stream.id, len(stream), digest(stream), os.getpid()], handle)
    dist.destroy_process_group()


def test_ranks_agree_with_each_other_and_with_one_process(tmp_path):
    for name in "ab":
        builder = IndexedDatasetBuilder(f"{tmp_path}/{name}.bin", np.uint16)
        for length in np.random.RandomState(ord(name)).randint(1, 50, 60):
            builder.add_document(np.random.RandomState(length).randint(0, 100, length), [length])
        builder.finalize(f"{tmp_path}/{name}.idx")
    multiprocessing.spawn(worker, args=(3, str(tmp_path)), nprocs=3)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert len({pid for *_, pid in found}) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1
    alone = Stream.build(["2", f"{tmp_path}/a", "1", f"{tmp_path}/b"], 16, seed=3, epochs=2)
    assert [f[:3] for f in found] == [[alone.id, len(alone), digest(alone)]] * 3
